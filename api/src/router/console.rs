// SPDX-License-Identifier: Apache-2.0

//! `/v1/vms/{name}/console`.

use std::{convert::Infallible, pin::Pin, task};

use axum::{
    Extension, Json,
    body::{Body, Bytes},
    extract::{Request, State},
    http::header,
    response::{IntoResponse, Response},
};
use futures_core::Stream;
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    MAX_CONSOLE_INPUT, Shared,
    extract::{Named, Query, read_body},
    streams::{Counted, Streams},
};
use crate::{
    Caller, Problem,
    backend::ConsoleRead,
    types::{ConsoleTaken, schema},
};

pub(super) fn routes() -> OpenApiRouter<Shared> {
    OpenApiRouter::new().routes(routes!(read_console, write_console))
}

/// The part of a console's log to read.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Part {
    /// The first byte; the oldest one that is kept if it is absent or no longer kept.
    offset: Option<u64>,
    /// Keeps the stream open for new output, until the VM ends.
    #[serde(default)]
    #[param(default = false)]
    follow: bool,
}

/// Reads a VM's serial console.
///
/// A bounded log of the guest's output, which outlives the VM's process.
#[utoipa::path(get, path = "/v1/vms/{name}/console", tag = "vms",
    params(("name" = String, Path, description = "Name or id"), Part),
    responses((status = 200, body = inline(schema::Binary), content_type = "application/octet-stream",
        headers(("console-offset" = u64, description = "Offset of the first byte of the body")))))]
async fn read_console(
    State(backend): State<Shared>,
    Named(vm): Named,
    Query(part): Query<Part>,
    Extension(streams): Extension<Streams>,
) -> Result<Response, Problem> {
    let _room = streams.consoles()?;
    let read = backend.read_console(vm, part.offset, part.follow).await?;
    let headers = [
        (header::CONTENT_TYPE, "application/octet-stream".to_owned()),
        (header::CACHE_CONTROL, "no-store".to_owned()),
        (header::HeaderName::from_static("console-offset"), read.start.to_string()),
    ];
    Ok((headers, Body::from_stream(Counted { stream: Chunks(read), _room })).into_response())
}

/// Types on a VM's serial console.
///
/// The guest may take fewer bytes than were sent: send the rest again.
#[utoipa::path(post, path = "/v1/vms/{name}/console", tag = "vms",
    params(("name" = String, Path, description = "Name or id")),
    request_body(content = inline(schema::Binary), content_type = "application/octet-stream", description = "At most 4096 bytes"),
    responses((status = 200, body = ConsoleTaken)))]
async fn write_console(
    State(backend): State<Shared>,
    caller: Caller,
    Named(vm): Named,
    request: Request,
) -> Result<Json<ConsoleTaken>, Problem> {
    let bytes: Bytes = read_body(request, MAX_CONSOLE_INPUT).await?;
    let taken = backend.write_console(caller, vm, bytes).await?;
    Ok(Json(ConsoleTaken { taken }))
}

/// A console's bytes as the stream of a response body.
struct Chunks(ConsoleRead);

impl Stream for Chunks {
    type Item = Result<Bytes, Infallible>;
    fn poll_next(
        mut self: Pin<&mut Self>,
        context: &mut task::Context<'_>,
    ) -> task::Poll<Option<Result<Bytes, Infallible>>> {
        self.0.bytes.as_mut().poll_next(context).map(|chunk| chunk.map(Ok))
    }
}
