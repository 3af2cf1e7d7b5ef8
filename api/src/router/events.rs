// SPDX-License-Identifier: Apache-2.0

//! `/v1/events`: server-sent events.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use axum::{
    Error, Extension,
    extract::State,
    http::HeaderMap,
    response::{
        IntoResponse, Response,
        sse::{self, KeepAlive, Sse},
    },
};
use futures_core::Stream;
use tokio::sync::mpsc;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    policy::Policy,
    streams::{Counted, Streams},
};
use crate::{Problem, types::Event};

pub(super) fn routes() -> OpenApiRouter<Policy> {
    OpenApiRouter::new().routes(routes!(events))
}

/// Streams the agent's events, as server-sent events.
///
/// `event:` is the kind, `data:` an `Event` as JSON on one line. After a break, send the last `id:` as `Last-Event-ID` to miss
/// nothing. The event `gap` says that too many events have passed meanwhile: read the objects again.
#[utoipa::path(get, path = "/v1/events", tag = "policy",
    params(("last-event-id" = u64, Header, description = "Goes on after this event")),
    responses((status = 200, body = String, content_type = "text/event-stream")))]
async fn events(
    State(backend): State<Policy>,
    Extension(streams): Extension<Streams>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let after = match headers.get("last-event-id") {
        None => None,
        Some(value) => {
            let id = value.to_str().ok().and_then(|text| text.parse().ok());
            Some(id.ok_or_else(|| {
                Problem::invalid("last-event-id", "Last-Event-ID must be the id of an event of this API.")
            })?)
        }
    };
    let _room = streams.events()?;
    let stream = Counted { stream: Events(backend.events(after).await?), _room };
    Ok(Sse::new(stream).keep_alive(KeepAlive::default()).into_response())
}

/// Events as the stream of a response.
struct Events(mpsc::Receiver<Event>);

impl Stream for Events {
    type Item = Result<sse::Event, Error>;
    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let written = |event: Event| {
            sse::Event::default().id(event.id.to_string()).event(event.what.name()).json_data(&event)
        };
        self.0.poll_recv(context).map(|event| event.map(written))
    }
}
