// SPDX-License-Identifier: Apache-2.0

//! Requests of somebody else, handed on.

use axum::body::Bytes;
use http_body_util::Full;
use hyper::{
    HeaderMap, Method, Request, Response,
    body::Incoming,
    header::{CONTENT_TYPE, HeaderName, IF_MATCH},
};
use tokio::time::timeout;

use super::{Client, ClientError, PATIENCE};

/// The headers that are handed on. What a browser says of itself (`origin`, `cookie`, `sec-fetch-site`) is not.
const HANDED_ON: [HeaderName; 3] = [CONTENT_TYPE, IF_MATCH, HeaderName::from_static("last-event-id")];

impl Client {
    /// Sends somebody else's request in this client's name, and returns the answer as it begins: a refusal is one, too.
    /// Of the headers only those go along that the API reads. `path` is one of this API, with its query.
    ///
    /// # Errors
    /// The agent cannot be reached, or does not begin an answer within a minute.
    pub async fn forward(
        &self,
        method: Method,
        path: &str,
        headers: &HeaderMap,
        body: Bytes,
    ) -> Result<Response<Incoming>, ClientError> {
        let mut request = Request::new(Full::new(body));
        let strange = |what: &dyn ToString| ClientError::Strange {
            request: format!("{method} {path}"),
            what: what.to_string(),
        };
        *request.uri_mut() = path.parse().map_err(|error| strange(&error))?;
        for name in HANDED_ON {
            for value in headers.get_all(&name) {
                request.headers_mut().append(name.clone(), value.clone());
            }
        }
        *request.method_mut() = method.clone();
        let timed_out = || ClientError::TimedOut { agent: self.agent.to_string(), waited: PATIENCE };
        timeout(PATIENCE, self.transmit(request)).await.map_err(|_| timed_out())?
    }
}
