// SPDX-License-Identifier: Apache-2.0

//! The routes, and the OpenAPI document that is generated from them.

mod auth;
mod codes;
mod console;
mod events;
mod examples;
mod extract;
#[cfg(any(test, feature = "test-support"))]
pub mod fuzz;
mod host;
mod lease;
mod merge;
mod meta;
mod places;
mod policy;
mod respond;
mod serve;
mod shared;
mod streams;
mod ui;
mod vms;
mod write_timeout;

use std::{sync::Arc, time::Duration};

use axum::{Extension, Router, extract::DefaultBodyLimit, middleware, routing::get};
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;

pub use auth::{Gate, Peer};
pub(crate) use lease::LEASE_BEAT;
pub use meta::openapi;
pub use places::Source;
pub use serve::{Limits, Listener, serve};

use crate::{Backend, PolicyBackend};

/// The most bytes that a request's body may have, unless it is the specification of a VM.
pub const MAX_BODY: usize = 64 << 10;

/// The most bytes that the specification of a VM may have: that of others, and the texts for the guest's first boot.
pub const MAX_VM_BODY: usize = 512 << 10;

/// The most bytes that can be typed on a console in one request.
pub const MAX_CONSOLE_INPUT: usize = 4 << 10;

/// The longest time for a request's body to arrive.
const BODY_TIME: Duration = Duration::from_secs(20);

/// The longest wait in seconds that `?wait=` takes.
pub const MAX_WAIT_SECONDS: u64 = 600;

/// The handlers' state.
type Shared = Arc<dyn Backend>;

/// The API of VMs and the host on top of a backend.
///
/// It expects a [`Peer`] in each request's extensions: [`serve`] puts it there. Without one it refuses every
/// change.
pub fn router(backend: Arc<dyn Backend>) -> Router {
    assemble(routes().with_state(backend.clone()), backend)
}

/// The whole API: [`router`] and the switches' part.
pub fn router_with_policy(backend: Arc<dyn Backend>, policy: Arc<dyn PolicyBackend>) -> Router {
    let routes = routes().with_state(backend.clone()).merge(policy_routes().with_state(policy));
    assemble(routes, backend)
}

/// Adds the routes outside of the document, and the layers around all routes.
fn assemble(routes: OpenApiRouter, backend: Arc<dyn Backend>) -> Router {
    let routes: Router = routes.into();
    routes
        .route("/v1/openapi.json", get(meta::serve_document))
        .route("/healthz", get(meta::healthz).with_state(Arc::clone(&backend)))
        .route("/metrics", get(meta::metrics).with_state(Arc::clone(&backend)))
        .route("/ui", get(ui::page))
        .fallback(respond::no_such_path)
        .method_not_allowed_fallback(respond::no_such_method)
        .layer(Extension(streams::Streams::default()))
        .layer(DefaultBodyLimit::max(MAX_VM_BODY))
        .layer(middleware::from_fn_with_state(Arc::clone(&backend), auth::admit))
        .layer(middleware::from_fn_with_state(backend, respond::identify))
}

/// The documented routes of VMs and the host.
fn routes() -> OpenApiRouter<Shared> {
    OpenApiRouter::with_openapi(meta::Document::openapi())
        .merge(vms::routes())
        .merge(console::routes())
        .merge(lease::routes())
        .merge(host::routes())
}

/// The documented routes of the switches.
fn policy_routes() -> OpenApiRouter<policy::Policy> {
    policy::routes().merge(events::routes())
}
