// SPDX-License-Identifier: Apache-2.0

//! Extractors of the handlers. Each fault of a request becomes a problem that names the field.

use std::{error::Error as _, time::Duration};

use axum::{
    body::{Bytes, to_bytes},
    extract::{FromRequest, FromRequestParts, Path, Request},
    http::{HeaderMap, header, request::Parts},
};
use http_body_util::LengthLimitError;
use serde::{Deserialize, de::DeserializeOwned};
use tokio::time::timeout;
use utoipa::IntoParams;

use super::{BODY_TIME, MAX_BODY, MAX_VM_BODY, MAX_WAIT_SECONDS};
use crate::{Caller, Problem, ProblemCode, document, types::ObjectRef};

/// A body of JSON, of at most `LIMIT` bytes.
pub(super) struct Body<T, const LIMIT: usize = MAX_BODY>(pub(super) T);

/// The specification of a VM, or a patch of it.
pub(super) type VmBody<T> = Body<T, MAX_VM_BODY>;

impl<S: Send + Sync, T: DeserializeOwned, const LIMIT: usize> FromRequest<S> for Body<T, LIMIT> {
    type Rejection = Problem;
    async fn from_request(request: Request, _state: &S) -> Result<Self, Problem> {
        if !takes_json(request.headers()) {
            let detail = "The body must be JSON: send content-type: application/json.";
            return Err(Problem::new(ProblemCode::UnsupportedMediaType, detail));
        }
        let bytes = read_body(request, LIMIT).await?;
        let value = document::json(&bytes)
            .map_err(|error| Problem::invalid("body", format!("The body is not one JSON value: {error}.")))?;
        document::read(value).map(Body).map_err(|error| misread(&error, "body"))
    }
}

/// The problem of a text that cannot be read. Its field is `whole` if no part of the text is at fault.
pub(super) fn misread<E: std::fmt::Display>(error: &serde_path_to_error::Error<E>, whole: &str) -> Problem {
    // The path ends in "?" where the input ended before the place had a name.
    let path = error.path().to_string();
    let field = match path.trim_end_matches(['?', '.']) {
        "" => whole,
        field => field,
    };
    Problem::invalid(field, format!("{field}: {}.", error.inner()))
}

/// Whether the body's type is JSON, or missing.
fn takes_json(headers: &HeaderMap) -> bool {
    let Some(kind) = headers.get(header::CONTENT_TYPE) else { return true };
    let kind = kind.to_str().unwrap_or_default().split(';').next().unwrap_or_default().trim();
    ["application/json", "application/merge-patch+json"].iter().any(|known| kind.eq_ignore_ascii_case(known))
}

/// Reads the body, at most `limit` bytes of it.
pub(super) async fn read_body(request: Request, limit: usize) -> Result<Bytes, Problem> {
    let read = timeout(BODY_TIME, to_bytes(request.into_body(), limit)).await.map_err(|_| {
        let detail = format!("The body did not arrive within {} s: send it faster.", BODY_TIME.as_secs());
        Problem::new(ProblemCode::RequestTimeout, detail)
    })?;
    read.map_err(|error| match error.source().is_some_and(|source| source.is::<LengthLimitError>()) {
        true => Problem::new(ProblemCode::BodyTooLarge, format!("A body here has at most {limit} bytes.")),
        false => Problem::invalid("body", "The body could not be read: the connection ended within it."),
    })
}

/// The query.
pub(super) struct Query<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Query<T> {
    type Rejection = Problem;
    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Problem> {
        let pairs = form_urlencoded::parse(parts.uri.query().unwrap_or_default().as_bytes());
        serde_path_to_error::deserialize(serde_urlencoded::Deserializer::new(pairs))
            .map(Query)
            .map_err(|error| misread(&error, "query"))
    }
}

/// `?wait=SECONDS`.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Wait {
    /// Waits at most this many seconds for the action to complete. The answer is 200 if it has, 202 if it goes on.
    #[serde(default)]
    #[param(minimum = 0, maximum = 600, default = 0)]
    wait: u64,
}

impl Wait {
    /// The time to wait.
    pub(super) fn duration(&self) -> Result<Duration, Problem> {
        if self.wait > MAX_WAIT_SECONDS {
            let detail =
                format!("wait: {} is not a number of seconds from 0 to {MAX_WAIT_SECONDS}.", self.wait);
            return Err(Problem::invalid("wait", detail));
        }
        Ok(Duration::from_secs(self.wait))
    }
}

/// `{name}` of the path: a name or an id.
pub(super) struct Named(pub(super) ObjectRef);

impl<S: Send + Sync> FromRequestParts<S> for Named {
    type Rejection = Problem;
    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let Path(name) = Path::<String>::from_request_parts(parts, state)
            .await
            .map_err(|_| Problem::invalid("name", "The name in the path is not UTF-8."))?;
        Ok(Named(name.into()))
    }
}

/// The revision of `If-Match`; None if there is no such header, or it is `*`.
pub(super) struct IfMatch(pub(super) Option<u64>);

impl<S: Send + Sync> FromRequestParts<S> for IfMatch {
    type Rejection = Problem;
    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Problem> {
        // An ignored condition would let a forbidden change through.
        if let Some(other) = OTHER_CONDITIONS.iter().find(|name| parts.headers.contains_key(*name)) {
            let detail =
                format!("Changes do not support {other}: use If-Match, or POST to create a new object.");
            return Err(Problem::invalid(other.as_str(), detail));
        }
        let mut values = parts.headers.get_all(header::IF_MATCH).iter();
        let (Some(value), None) = (values.next(), values.next()) else {
            // Several headers are refused like any other text that is not a revision.
            return if parts.headers.contains_key(header::IF_MATCH) {
                Err(not_a_revision())
            } else {
                Ok(IfMatch(None))
            };
        };
        let text = value.to_str().map_err(|_| not_a_revision())?.trim();
        if text == "*" {
            return Ok(IfMatch(None));
        }
        let bare = text.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).unwrap_or(text);
        bare.parse().map(|revision| IfMatch(Some(revision))).map_err(|_| not_a_revision())
    }
}

/// Conditions of RFC 9110, section 13.1, that this API does not have.
const OTHER_CONDITIONS: [header::HeaderName; 2] = [header::IF_NONE_MATCH, header::IF_UNMODIFIED_SINCE];

/// Whether `If-Match: *` requires the object to exist, at any revision.
pub(super) struct MustExist(pub(super) bool);

impl<S: Send + Sync> FromRequestParts<S> for MustExist {
    type Rejection = Problem;
    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Problem> {
        Ok(MustExist(parts.headers.get(header::IF_MATCH).is_some_and(|value| value == "*")))
    }
}

fn not_a_revision() -> Problem {
    Problem::invalid("if-match", "If-Match takes one ETag of this API, such as \"3\", or *.")
}

impl<S: Send + Sync> FromRequestParts<S> for Caller {
    type Rejection = Problem;
    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Problem> {
        // Never guess: a caller of uid 0 may read every file.
        parts.extensions.get::<Caller>().cloned().ok_or_else(|| {
            Problem::new(ProblemCode::Forbidden, "The agent could not identify the caller of this request.")
        })
    }
}
