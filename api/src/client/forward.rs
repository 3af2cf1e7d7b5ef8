// SPDX-License-Identifier: Apache-2.0

//! Forwards the requests of another client, such as a browser, in this client's name.

use axum::body::Bytes;
use http_body_util::Full;
use hyper::{
    HeaderMap, Method, Request, Response,
    body::Incoming,
    header::{CONTENT_TYPE, HeaderName, IF_MATCH},
};
use tokio::time::timeout;

use super::{Client, ClientError, PATIENCE};

/// The headers to forward. Headers in which a browser describes itself (`origin`, `cookie`, `sec-fetch-site`) stay out.
const HANDED_ON: [HeaderName; 3] = [CONTENT_TYPE, IF_MATCH, HeaderName::from_static("last-event-id")];

impl Client {
    /// Sends another client's request in this client's name. Returns the response with its body still to come; a
    /// refusal is a response, too. Forwards only the headers that the API reads. `path` belongs to this API, and has
    /// its query.
    ///
    /// # Errors
    /// The agent cannot be reached, or does not start to respond within a minute.
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
