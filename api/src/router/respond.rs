//! What handlers and the router answer.

use std::time::Instant;

use axum::{
    Json,
    extract::Request,
    http::{HeaderName, HeaderValue, Method, StatusCode, Uri, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use serde::Serialize;
use uuid::Uuid;

use crate::{Problem, ProblemCode};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let kind = [(header::CONTENT_TYPE, "application/problem+json")];
        let mut response = (status, kind, serde_json::to_vec(&self).unwrap_or_default()).into_response();
        if self.code == ProblemCode::Unauthorized {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        // `identify` writes it once more with the request's id.
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

/// Gives each request an id, which the answer, its problem and the log carry.
pub(super) async fn identify(request: Request, next: Next) -> Response {
    let id = Uuid::new_v4();
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let begun = Instant::now();
    let mut response = next.run(request).await;
    if let Some(mut problem) = response.extensions_mut().remove::<Problem>() {
        problem.instance = Some(format!("urn:uuid:{id}").into());
        if problem.status >= 500 {
            tracing::warn!(request = %id, %method, ?path, code = %problem.code, detail = %problem.detail, "request failed");
        }
        // Written anew: the length has changed, and what the router added (`allow`) must stay.
        let kept = std::mem::take(response.headers_mut());
        response = problem.into_response();
        for (name, value) in &kept {
            if !response.headers().contains_key(name) {
                response.headers_mut().append(name, value.clone());
            }
        }
    }
    if let Ok(value) = HeaderValue::from_str(&id.to_string()) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    let status = response.status().as_u16();
    tracing::debug!(request = %id, %method, ?path, status, elapsed = ?begun.elapsed(), "request");
    response
}

/// No route has this path.
pub(super) async fn no_such_path(uri: Uri) -> Problem {
    let path: String = uri.path().chars().take(200).collect();
    Problem::new(
        ProblemCode::NotFound,
        format!("There is nothing at {path:?}; /v1/openapi.json lists what there is."),
    )
}

/// The path has a route, but not for this method.
pub(super) async fn no_such_method(method: Method, uri: Uri) -> Problem {
    let path: String = uri.path().chars().take(200).collect();
    let method: String = method.as_str().chars().take(20).collect();
    let detail = format!("{path:?} does not take {method:?}; the allow header lists what it takes.");
    Problem::new(ProblemCode::MethodNotAllowed, detail)
}
