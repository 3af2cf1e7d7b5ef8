//! The API about itself: the OpenAPI document and health.

use axum::{
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use utoipa::OpenApi;

use super::{Shared, codes};
use crate::Problem;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Portcullis",
        description = "Virtual machines with SR-IOV virtual functions under the policy of port groups.",
        version = "1"
    ),
    servers((url = "/")),
    components(schemas(Problem)),
    tags(
        (name = "vms", description = "Virtual machines"),
        (name = "host", description = "Physical and virtual functions of the host"),
        (name = "policy", description = "Switches, port groups, ports, decisions, events")
    )
)]
pub(super) struct Document;

/// The OpenAPI document of the whole API, [`router_with_policy`](super::router_with_policy).
pub fn openapi() -> utoipa::openapi::OpenApi {
    let mut document = super::routes().into_openapi();
    document.merge(super::policy_routes().into_openapi());
    complete(&mut document);
    document
}

/// Adds what follows for each operation: the problems that it answers with.
pub(super) fn complete(document: &mut utoipa::openapi::OpenApi) {
    for path in document.paths.paths.values_mut() {
        let all = [&mut path.get, &mut path.put, &mut path.post, &mut path.patch, &mut path.delete];
        all.into_iter().flatten().for_each(codes::add);
    }
}

/// `GET /v1/openapi.json`.
pub(super) async fn serve_document(text: String) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], text).into_response()
}

/// `GET /healthz`: plain text, for probes.
pub(super) async fn healthz(State(backend): State<Shared>) -> Response {
    let complaints = backend.health().await.complaints;
    if complaints.is_empty() {
        return "ok\n".into_response();
    }
    (StatusCode::SERVICE_UNAVAILABLE, complaints.join("\n") + "\n").into_response()
}
