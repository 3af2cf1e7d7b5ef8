// SPDX-License-Identifier: Apache-2.0

//! Responses of the handlers and the router.

use std::time::Instant;

use axum::{
    Json,
    extract::{MatchedPath, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use serde::Serialize;
use tracing::Instrument as _;
use uuid::Uuid;

use super::Shared;
use crate::{
    Answered, Backend, Problem, ProblemCode,
    types::{Cursor, List, Listed, MAX_PAGE, Page},
};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let kind = [(header::CONTENT_TYPE, "application/problem+json")];
        let mut response = (status, kind, serde_json::to_vec(&self).unwrap_or_default()).into_response();
        if self.code == ProblemCode::Unauthorized {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        // `identify` writes it once more, with the request's id.
        response.extensions_mut().insert(self);
        response
    }
}

/// An object with its revision as ETag.
pub(super) fn revisioned<T: Serialize>(status: StatusCode, revision: u64, object: &T) -> Response {
    let mut response = (status, Json(object)).into_response();
    if let Ok(etag) = HeaderValue::from_str(&format!("\"{revision}\"")) {
        response.headers_mut().insert(header::ETAG, etag);
    }
    response
}

/// The requested page, out of all objects.
pub(super) fn page<T: Listed>(mut items: Vec<T>, page: &Page) -> Result<Json<List<T>>, Problem> {
    let limit = page.limit.unwrap_or(MAX_PAGE);
    check_limit(limit)?;
    items.sort_by_cached_key(Listed::key);
    if let Some(cursor) = &page.cursor {
        items.retain(|item| item.key().as_str() > cursor.key());
    }
    Ok(cut(items, limit))
}

pub(super) fn check_limit(limit: u32) -> Result<(), Problem> {
    if (1..=MAX_PAGE).contains(&limit) {
        return Ok(());
    }
    Err(Problem::invalid("limit", format!("limit: {limit} is not a number from 1 to {MAX_PAGE}.")))
}

/// The first of these items, with a cursor to the next page if there are more.
pub(super) fn cut<T: Listed>(mut items: Vec<T>, limit: u32) -> Json<List<T>> {
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let more = items.len() > limit;
    items.truncate(limit);
    let next = items.last().filter(|_| more).map(|last| Cursor::after(last.key()));
    Json(List { items, next })
}

/// A request's id: the caller's own if it is fit for a log, else a UUID.
#[derive(Clone)]
pub(super) struct RequestId(HeaderValue, Box<str>);

/// The longest id that a caller may choose, in bytes.
const MAX_REQUEST_ID: usize = 128;

impl RequestId {
    pub(super) fn new() -> Self {
        Self::named(&Uuid::new_v4().to_string())
            .unwrap_or(RequestId(HeaderValue::from_static("-"), "-".into()))
    }

    fn named(text: &str) -> Option<Self> {
        let fit = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:/+=".contains(&byte);
        if !(1..=MAX_REQUEST_ID).contains(&text.len()) || !text.bytes().all(fit) {
            return None;
        }
        Some(RequestId(HeaderValue::from_str(text).ok()?, text.into()))
    }

    /// The id of a request with these headers. Several ids count as none.
    fn of(headers: &HeaderMap) -> Self {
        let mut given = headers.get_all(REQUEST_ID).iter();
        let only = match (given.next(), given.next()) {
            (Some(id), None) => id.to_str().ok(),
            _ => None,
        };
        only.and_then(Self::named).unwrap_or_else(Self::new)
    }

    pub(super) fn as_str(&self) -> &str {
        &self.1
    }
}

/// Gives each request an id. The response, its problem and all its lines in the log carry the id.
pub(super) async fn identify(State(backend): State<Shared>, request: Request, next: Next) -> Response {
    let id = RequestId::of(request.headers());
    // A span of the highest level: every line of the log names its request.
    let span = tracing::error_span!("request", id = id.as_str());
    answer(id, request, next, &*backend).instrument(span).await
}

async fn answer(id: RequestId, request: Request, next: Next, backend: &dyn Backend) -> Response {
    let route = request.extensions().get::<MatchedPath>().cloned();
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let begun = Instant::now();
    let mut response = next.run(request).await;
    if let Some(mut problem) = response.extensions_mut().remove::<Problem>() {
        problem.request_id = Some(id.as_str().into());
        if problem.status >= 500 {
            tracing::warn!(%method, ?path, code = %problem.code, detail = %problem.detail, "request failed");
        }
        // Written again: the length has changed, and headers of the router (`allow`) must stay.
        let kept = std::mem::take(response.headers_mut());
        response = problem.into_response();
        for (name, value) in &kept {
            if !response.headers().contains_key(name) {
                response.headers_mut().append(name, value.clone());
            }
        }
    }
    response.headers_mut().insert(REQUEST_ID, id.0);
    let status = response.status().as_u16();
    let elapsed = begun.elapsed();
    let route = route.as_ref().map_or("", MatchedPath::as_str);
    backend.answered(&Answered { route, method: known(&method), status, elapsed });
    tracing::debug!(%method, ?path, status, ?elapsed, "request");
    response
}

/// The name of a method; `OTHER` for names that callers make up.
fn known(method: &Method) -> &'static str {
    let all = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"];
    all.into_iter().find(|name| method.as_str() == *name).unwrap_or("OTHER")
}

/// No route has this path.
pub(super) async fn no_such_path(uri: Uri) -> Problem {
    let path: String = uri.path().chars().take(200).collect();
    Problem::new(
        ProblemCode::NotFound,
        format!("The API has no path {path:?}; /v1/openapi.json lists all paths."),
    )
}

/// The path has a route, but not for this method.
pub(super) async fn no_such_method(method: Method, uri: Uri) -> Problem {
    let path: String = uri.path().chars().take(200).collect();
    let method: String = method.as_str().chars().take(20).collect();
    let detail = format!("{path:?} does not take {method:?}; the allow header lists its methods.");
    Problem::new(ProblemCode::MethodNotAllowed, detail)
}
