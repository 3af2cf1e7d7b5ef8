// SPDX-License-Identifier: Apache-2.0

//! `/v1/vms/{name}/lease`: VMs that live no longer than their clients.

use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    Extension,
    body::{Body, Bytes},
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use futures_core::Stream;
use serde::Deserialize;
use tokio::time::{Interval, interval};
use utoipa::IntoParams;
use utoipa_axum::{router::OpenApiRouter, routes};
use uuid::Uuid;

use super::{
    Shared,
    auth::Peer,
    extract::{Named, Query},
    places::{Place, Source},
    streams::Streams,
};
use crate::{Caller, Lease, LeaseTerms, Problem};

/// The time between two lines of a lease. A client that reads none for three times as long has lost the agent.
pub(crate) const LEASE_BEAT: Duration = Duration::from_secs(10);

pub(super) fn routes() -> OpenApiRouter<Shared> {
    OpenApiRouter::new().routes(routes!(lease_vm, end_lease))
}

/// `?holder=…`.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Holder {
    /// A UUID that the client has drawn, the same when it takes the lease again. A lease with a holder is this client's alone.
    #[param(value_type = Option<String>, format = Uuid)]
    holder: Option<Uuid>,
}

/// Takes the lease of a VM.
///
/// The VM lives by the lease from now on. The answer is an empty line every 10 s and has no end of its own: when the client closes the
/// connection, or is killed, the agent stops and deletes the VM, unless another client holds the lease, too. An agent that starts
/// waits 60 s for the client to take the lease again (`status.lease.until`). The answer ends when the VM is deleted or its lease is
/// ended by DELETE. Of several clients with a `holder`, one gets the lease; the others are refused (`wrong_state`) until it has
/// ended, also while the agent waits for that client.
#[utoipa::path(post, path = "/v1/vms/{name}/lease", tag = "vms",
    params(("name" = String, Path, description = "Name or id"), Holder),
    responses((status = 200, body = String, content_type = "text/plain", description = "The lease is held")))]
async fn lease_vm(
    State(backend): State<Shared>,
    caller: Caller,
    Named(vm): Named,
    Query(Holder { holder }): Query<Holder>,
    Extension(streams): Extension<Streams>,
    peer: Option<Extension<Peer>>,
) -> Result<Response, Problem> {
    let source = peer.and_then(|Extension(peer)| peer.source()).unwrap_or(Source::User(None));
    let _place = streams.leases(source)?;
    let lease = backend.lease_vm(caller, vm, LeaseTerms { holder }).await?;
    let headers = [(header::CONTENT_TYPE, "text/plain"), (header::CACHE_CONTROL, "no-store")];
    let lines = Lines { lease, beat: interval(LEASE_BEAT), _place };
    Ok((headers, Body::from_stream(lines)).into_response())
}

/// Ends the lease of a VM.
///
/// The VM lives on without it, and the answers to those who hold the lease end. A VM without a lease stays as it is.
#[utoipa::path(delete, path = "/v1/vms/{name}/lease", tag = "vms",
    params(("name" = String, Path, description = "Name or id")),
    responses((status = 204)))]
async fn end_lease(
    State(backend): State<Shared>,
    caller: Caller,
    Named(vm): Named,
) -> Result<StatusCode, Problem> {
    backend.end_lease(caller, vm).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// The lines of an answer, which holds the lease and its place as long as it is sent.
struct Lines {
    lease: Lease,
    beat: Interval,
    _place: Place,
}

impl Stream for Lines {
    type Item = Result<Bytes, Infallible>;
    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if Pin::new(&mut self.lease).poll(context).is_ready() {
            return Poll::Ready(None);
        }
        self.beat.poll_tick(context).map(|_| Some(Ok(Bytes::from_static(b"\n"))))
    }
}
