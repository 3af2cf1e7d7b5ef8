// SPDX-License-Identifier: Apache-2.0

//! Bearer tokens, which admit clients to the API over TCP.

use std::{fmt, sync::Arc};

use subtle::{Choice, ConstantTimeEq};

/// The fewest characters of a token: a shorter one can be guessed.
pub const MIN_TOKEN: usize = 32;

/// The most characters of a token.
const MAX_TOKEN: usize = 256;

/// The most tokens of a file.
const MAX_TOKENS: usize = 64;

/// The longest name.
const MAX_NAME: usize = 63;

/// Why a text has no valid tokens. It never discloses a token.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// A line is malformed.
    #[error(
        "line {0} is not NAME:TOKEN, with a name of letters, digits, '-', '_' and '.', and a token of {MIN_TOKEN} to \
         {MAX_TOKEN} visible characters (`openssl rand -hex 32` makes one)"
    )]
    Line(usize),
    /// A name is repeated.
    #[error("line {0} has the name of an earlier line")]
    Twice(usize),
    /// There is no token.
    #[error("it has no line NAME:TOKEN")]
    Empty,
    /// There are too many tokens.
    #[error("it has more than {MAX_TOKENS} tokens")]
    TooMany,
}

/// Tokens, each with a name for its user in records.
#[derive(Clone)]
pub struct Tokens(Vec<(Arc<str>, Box<str>)>);

impl Tokens {
    /// Reads lines `NAME:TOKEN`; skips empty ones and those that begin with `#`.
    ///
    /// # Errors
    /// See [`TokenError`].
    pub fn parse(text: &str) -> Result<Self, TokenError> {
        let mut tokens: Vec<(Arc<str>, Box<str>)> = Vec::new();
        for (n, line) in text.lines().enumerate() {
            let (n, line) = (n + 1, line.trim());
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let (name, token) = line.split_once(':').ok_or(TokenError::Line(n))?;
            let of_name = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
            if !(1..=MAX_NAME).contains(&name.len())
                || !name.bytes().all(of_name)
                || !(MIN_TOKEN..=MAX_TOKEN).contains(&token.len())
                || !token.bytes().all(|byte| byte.is_ascii_graphic())
            {
                return Err(TokenError::Line(n));
            }
            if tokens.iter().any(|(known, _)| **known == *name) {
                return Err(TokenError::Twice(n));
            }
            if tokens.len() >= MAX_TOKENS {
                return Err(TokenError::TooMany);
            }
            tokens.push((name.into(), token.into()));
        }
        if tokens.is_empty() { Err(TokenError::Empty) } else { Ok(Tokens(tokens)) }
    }

    /// The name of a token. The time depends on lengths only, not on the correct part of a guess.
    #[must_use]
    pub fn name_of(&self, token: &[u8]) -> Option<Arc<str>> {
        let mut found = None;
        // Compare all tokens: the time must not depend on the first match.
        for (name, known) in &self.0 {
            let same: Choice = known.as_bytes().ct_eq(token);
            if same.into() {
                found = Some(Arc::clone(name));
            }
        }
        found
    }

    /// The first token, which a client uses.
    #[must_use]
    pub fn first(&self) -> &str {
        self.0.first().map_or("", |(_, token)| token)
    }
}

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.iter().map(|(name, _)| name)).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "0123456789abcdef0123456789abcdef";
    const B: &str = "0123456789abcdef0123456789abcdeX";

    #[test]
    fn each_token_has_its_name_and_nothing_else_has_one() {
        let tokens = Tokens::parse(&format!("# who\n\nci:{A}\n  ops.1:{B}\n")).unwrap();
        assert_eq!(tokens.name_of(A.as_bytes()).as_deref(), Some("ci"));
        assert_eq!(tokens.name_of(B.as_bytes()).as_deref(), Some("ops.1"));
        assert_eq!(tokens.first(), A);
        for wrong in ["", "ci", &A[1..], &format!("{A} "), &A.to_uppercase()] {
            assert_eq!(tokens.name_of(wrong.as_bytes()), None, "{wrong}");
        }
        assert!(!format!("{tokens:?}").contains(A), "tokens are not for logs");
    }

    #[test]
    fn what_is_no_list_of_tokens_is_refused_without_showing_it() {
        for (text, error) in [
            ("", TokenError::Empty),
            ("# none\n", TokenError::Empty),
            (A, TokenError::Line(1)),
            (&format!("\nci:{}", &A[1..]), TokenError::Line(2)),
            (&format!("c i:{A}"), TokenError::Line(1)),
            (&format!(":{A}"), TokenError::Line(1)),
            (&format!("ci:{A} x"), TokenError::Line(1)),
            (&format!("ci:{A}\nci:{B}"), TokenError::Twice(2)),
        ] {
            let found = Tokens::parse(text).unwrap_err();
            assert_eq!(found, error, "{text}");
            assert!(!found.to_string().contains(&A[1..]));
        }
        let many: String = (0..=MAX_TOKENS).map(|n| format!("t{n}:{A}\n")).collect();
        assert_eq!(Tokens::parse(&many).unwrap_err(), TokenError::TooMany);
    }
}
