// SPDX-License-Identifier: Apache-2.0

//! `/ui`: the page of `portcullis ui`.

use axum::{
    http::header,
    response::{IntoResponse, Response},
};
use uuid::Uuid;

/// The page. Each response has its own nonce in place of [`NONCE`].
const PAGE: &str = include_str!("../../ui/index.html");

const NONCE: &str = "nonce=\"NONCE\"";

/// `GET /ui`. Only the page's own script and styles run, it connects to its own origin only, no page can frame it, and
/// texts of the agent can become text nodes only (Trusted Types).
pub(super) async fn page() -> Response {
    let nonce = Uuid::new_v4().simple();
    let policy = format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src data:; connect-src 'self'; \
         frame-ancestors 'none'; base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; \
         trusted-types 'none'"
    );
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8".to_owned()),
        (header::CONTENT_SECURITY_POLICY, policy),
        (header::CACHE_CONTROL, "no-store".to_owned()),
        (header::REFERRER_POLICY, "no-referrer".to_owned()),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff".to_owned()),
        (header::X_FRAME_OPTIONS, "DENY".to_owned()),
    ];
    (headers, PAGE.replace(NONCE, &format!("nonce=\"{nonce}\""))).into_response()
}

#[cfg(test)]
mod tests {
    use netpolicy::Outcome;

    use super::*;

    #[test]
    fn the_page_has_every_setting_and_every_word() {
        for setting in netpolicy::Setting::ALL {
            assert!(PAGE.contains(&format!("\n  {setting}: {{ label:")), "{setting}");
        }
        let verdicts = [
            (Outcome::Allowed, "Allowed"),
            (Outcome::Denied, "Denied"),
            (Outcome::Revoked, "Revoked"),
            (Outcome::Repaired, "Corrected"),
            (Outcome::Reverted, "Rolled back"),
        ];
        for (verdict, word) in verdicts {
            let name = serde_json::to_value(verdict).unwrap();
            let (name, label) = (name.as_str().unwrap(), word.to_lowercase());
            assert!(PAGE.contains(&format!("\n  {name}: {{ label: \"{label}\"")), "{name}");
            assert!(PAGE.contains(&format!("<option value=\"{name}\">{word}</option>")), "{name}");
        }
        assert_eq!(PAGE.matches("<option value=\"").count(), 1 + verdicts.len(), "all, and each alone");
    }

    #[test]
    fn nothing_comes_from_elsewhere_and_no_text_becomes_html() {
        assert_eq!(PAGE.matches(NONCE).count(), 2, "one script, one style");
        for word in [
            "innerHTML",
            "outerHTML",
            "insertAdjacent",
            "document.write",
            "eval(",
            "Function(",
            " src=",
            "@import",
            "url(",
        ] {
            assert!(!PAGE.contains(word), "{word}");
        }
        // The name of an XML namespace is not an address to fetch.
        let addresses = PAGE.replace("http://www.w3.org/2000/svg", "");
        assert!(!addresses.contains("http:") && !addresses.contains("https:"));
    }

    #[tokio::test]
    async fn each_answer_has_a_nonce_of_its_own() {
        let policy = |response: &Response| {
            response.headers()[header::CONTENT_SECURITY_POLICY].to_str().unwrap().to_owned()
        };
        let (first, second) = (page().await, page().await);
        assert_ne!(policy(&first), policy(&second));
        let nonce = policy(&first).split("'nonce-").nth(1).unwrap().split('\'').next().unwrap().to_owned();
        let body = axum::body::to_bytes(first.into_body(), 1 << 20).await.unwrap();
        let text = String::from_utf8(body.to_vec()).unwrap();
        assert_eq!(text.matches(&format!("nonce=\"{nonce}\"")).count(), 2);
        assert!(!text.contains(NONCE));
    }
}
