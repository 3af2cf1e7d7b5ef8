// SPDX-License-Identifier: Apache-2.0

//! The proxy between the page and the agent.
//!
//! | from | needs | gets |
//! |---|---|---|
//! | `/` | nothing | the page: a text without secrets, the same for every client |
//! | `POST /session` | the link's token, once | the session's token |
//! | `/v1/…` | the session's token | the agent's response |
//!
//! Tokens come in the `authorization` header. A browser sends it for no page but the one that has the token: there is no
//! cookie that another site's page, or another service on another port of this host, could exploit. `Host`, `Origin` and
//! `Sec-Fetch-Site` are checked all the same.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, Ordering},
};

use api::{
    Caller, Client, Gate, Problem, ProblemCode,
    router::{MAX_VM_BODY, Peer},
    token::Tokens,
};
use axum::{
    Json, Router,
    body::Body,
    extract::{Request, State},
    http::{HeaderMap, Method, header, request::Parts},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{any, get, post},
};
use uuid::Uuid;

use super::browser::Way;
use crate::{error::CliError, output::warn};

/// The names of the two tokens.
const LINK: &str = "link";
const SESSION: &str = "session";

/// The longest time for the body of a request to arrive.
const BODY_TIME: std::time::Duration = std::time::Duration::from_secs(20);

/// The proxy before it serves.
pub(super) struct Proxy {
    client: Client,
    link: String,
    session: String,
    gate: Arc<Gate>,
}

/// The proxy while it serves.
struct Serving {
    client: Client,
    session: String,
    used: AtomicBool,
    warned: AtomicBool,
    way: Mutex<Option<Way>>,
}

impl Proxy {
    pub(super) fn new(client: Client) -> Result<Self, CliError> {
        let (link, session) = (secret(), secret());
        // The gate compares them in constant time.
        let tokens = Tokens::parse(&format!("{LINK}:{link}\n{SESSION}:{session}\n"))
            .map_err(|error| CliError::Usage(error.to_string()))?;
        Ok(Self { client, link, session, gate: Arc::new(Gate::new(tokens, [])) })
    }

    /// The token that is good for one session.
    pub(super) fn link(&self) -> &str {
        &self.link
    }

    pub(super) fn gate(&self) -> Arc<Gate> {
        Arc::clone(&self.gate)
    }

    /// The routes. `way` is removed once the link has been used.
    pub(super) fn router(self, way: Option<Way>) -> Router {
        let serving = Serving {
            client: self.client,
            session: self.session,
            used: AtomicBool::new(false),
            warned: AtomicBool::new(false),
            way: Mutex::new(way),
        };
        Router::new()
            .route("/", get(page))
            .route("/session", post(begin))
            .route("/v1/{*path}", any(forward))
            .fallback(async || Problem::new(ProblemCode::NotFound, "There is no such page here."))
            .layer(middleware::from_fn(check))
            .with_state(Arc::new(serving))
    }
}

/// 244 random bits.
fn secret() -> String {
    format!("{}{}", Uuid::new_v4().simple(), Uuid::new_v4().simple())
}

/// Refuses requests from other sites' pages, and foreign host names that resolve to this host.
async fn check(request: Request, next: Next) -> Response {
    let (mut head, body) = request.into_parts();
    match checked(&mut head) {
        Ok(()) => next.run(Request::from_parts(head, body)).await,
        Err(problem) => problem.into_response(),
    }
}

fn checked(head: &mut Parts) -> Result<(), Problem> {
    let Some(Peer::Network { gate, local, .. }) = head.extensions.get::<Peer>().cloned() else {
        return Err(Problem::new(ProblemCode::Forbidden, "This page is served over TCP only."));
    };
    gate.check_host(head, local)?;
    // Following a link to the page is harmless: without the link's token the page shows nothing.
    let opens = head.uri.path() == "/" && head.method == Method::GET;
    if !opens && !is_own(&head.headers) {
        let detail = "The request comes from a page of another site (Origin, Sec-Fetch-Site), and this \
                      server accepts only its own page.";
        return Err(Problem::new(ProblemCode::Forbidden, detail));
    }
    if let Ok(Caller::Token(name)) = gate.admit(head, local) {
        head.extensions.insert(Token(name));
    }
    Ok(())
}

/// Whether the request comes from the page itself, or from no page at all.
fn is_own(headers: &HeaderMap) -> bool {
    let text = |value: &header::HeaderValue| value.to_str().unwrap_or_default().to_owned();
    let host = headers.get(header::HOST).map(text).unwrap_or_default();
    let mut origins = headers.get_all(header::ORIGIN).iter().map(text);
    let mut sites = headers.get_all("sec-fetch-site").iter().map(text);
    origins.all(|origin| origin == format!("http://{host}"))
        && sites.all(|site| site == "same-origin" || site == "none")
}

/// The name of the token in a request.
#[derive(Clone)]
struct Token(Arc<str>);

fn has(head: &Parts, name: &str) -> bool {
    head.extensions.get::<Token>().is_some_and(|token| *token.0 == *name)
}

/// `GET /`: the agent's page.
async fn page(State(serving): State<Arc<Serving>>) -> Response {
    answer(&serving.client, Method::GET, "/ui", &HeaderMap::new(), axum::body::Bytes::new()).await
}

/// `POST /session`: exchanges the link's token for the session's.
async fn begin(State(serving): State<Arc<Serving>>, request: Request) -> Result<Response, Problem> {
    let (head, _) = request.into_parts();
    if !has(&head, LINK) {
        return Err(unauthorized("This link is not from this command: open the link that it printed."));
    }
    if serving.used.swap(true, Ordering::SeqCst) {
        if !serving.warned.swap(true, Ordering::SeqCst) {
            warn(format_args!(
                "portcullis: Refused a second use of the link. If you did not open it the first time, end \
                 this command."
            ));
        }
        return Err(unauthorized(
            "This link was used before, and it works once. If you did not use it, end the command portcullis \
             ui. For another page, start another command.",
        ));
    }
    drop(serving.way.lock().map(|mut way| way.take()));
    let kept = [(header::CACHE_CONTROL, "no-store")];
    Ok((kept, Json(serde_json::json!({ "session": serving.session }))).into_response())
}

/// `/v1/…`: forwards the page's requests to the agent.
async fn forward(State(serving): State<Arc<Serving>>, request: Request) -> Result<Response, Problem> {
    let (head, body) = request.into_parts();
    if !has(&head, SESSION) {
        return Err(unauthorized(
            "The session of this page has ended: start portcullis ui again, and open its link.",
        ));
    }
    let read = tokio::time::timeout(BODY_TIME, axum::body::to_bytes(body, MAX_VM_BODY)).await;
    let Ok(Ok(body)) = read else {
        let detail = format!("The body is longer than {MAX_VM_BODY} bytes, or did not arrive in time.");
        return Err(Problem::invalid("body", detail));
    };
    let path = head.uri.path_and_query().map_or("/", |path| path.as_str());
    Ok(answer(&serving.client, head.method, path, &head.headers, body).await)
}

/// The agent's response, or the problem of reaching it.
async fn answer(
    client: &Client,
    method: Method,
    path: &str,
    headers: &HeaderMap,
    body: axum::body::Bytes,
) -> Response {
    match client.forward(method, path, headers, body).await {
        Ok(answer) => {
            let (mut head, body) = answer.into_parts();
            // These headers describe the connection to the agent, not this one.
            for name in [header::CONNECTION, header::TRANSFER_ENCODING] {
                head.headers.remove(name);
            }
            Response::from_parts(head, Body::new(body))
        }
        Err(error) => Problem::new(ProblemCode::Unavailable, format!("{error}.")).into_response(),
    }
}

fn unauthorized(detail: &str) -> Problem {
    Problem::new(ProblemCode::Unauthorized, detail)
}
