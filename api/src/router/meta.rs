// SPDX-License-Identifier: Apache-2.0

//! The API about itself: the OpenAPI document and health.

use axum::{
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use utoipa::{
    Modify, OpenApi,
    openapi::{
        RefOr, Required,
        path::{ParameterBuilder, ParameterIn},
        security::{HttpAuthScheme, HttpBuilder, SecurityScheme},
    },
};

use super::{Shared, codes, examples, shared};
use crate::{Problem, types::Event};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Portcullis",
        description = "Virtual machines with SR-IOV virtual functions under the policy of port groups.",
        version = "1"
    ),
    servers((url = "/")),
    components(schemas(Problem, Event)),
    security((), ("token" = [])),
    modifiers(&Token),
    tags(
        (name = "vms", description = "Virtual machines"),
        (name = "host", description = "Physical and virtual functions of the host"),
        (name = "policy", description = "Switches, port groups, ports, decisions, events")
    )
)]
pub(super) struct Document;

/// Describes the authentication of clients.
struct Token;

impl Modify for Token {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let description = "Over TCP: a token of the agent's token file (`--token-file`). The Unix socket \
                           needs none: the kernel identifies the caller's user.";
        let scheme = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).description(Some(description)).build();
        let components = document.components.get_or_insert_default();
        components.add_security_scheme("token", SecurityScheme::Http(scheme));
    }
}

/// The OpenAPI document of the whole API, [`router_with_policy`](super::router_with_policy).
pub fn openapi() -> utoipa::openapi::OpenApi {
    let mut document = super::routes().into_openapi();
    document.merge(super::policy_routes().into_openapi());
    complete(&mut document);
    document
}

/// Adds the derived parts of each operation: its problems, examples, and the header that each response has.
fn complete(document: &mut utoipa::openapi::OpenApi) {
    for (template, path) in &mut document.paths.paths {
        let all = [&mut path.get, &mut path.put, &mut path.post, &mut path.patch, &mut path.delete];
        for operation in all.into_iter().flatten() {
            codes::add(operation);
            examples::add(operation);
            for parameter in operation.parameters.iter_mut().flatten() {
                let RefOr::T(parameter) = parameter else { continue };
                if parameter.parameter_in == ParameterIn::Header {
                    parameter.required = Required::False;
                }
                let example = examples::parameter(template, &parameter.name);
                *parameter = ParameterBuilder::from(parameter.clone()).example(example).build();
            }
        }
    }
    codes::add_header(document.components.get_or_insert_default());
    shared::refer(document);
}

/// The text of [`openapi`], which a test compares with it. To generate it takes more time than all else at an agent's start.
const DOCUMENT: &str = include_str!("../../../resources/openapi.json");

/// `GET /v1/openapi.json`.
pub(super) async fn serve_document() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], DOCUMENT).into_response()
}

/// `GET /metrics`: for Prometheus.
pub(super) async fn metrics(State(backend): State<Shared>) -> Result<Response, Problem> {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    Ok(([(header::CONTENT_TYPE, kind)], backend.metrics().await?).into_response())
}

/// `GET /healthz`: plain text, for probes.
pub(super) async fn healthz(State(backend): State<Shared>) -> Response {
    let complaints = backend.health().await.complaints;
    if complaints.is_empty() {
        return "ok\n".into_response();
    }
    (StatusCode::SERVICE_UNAVAILABLE, complaints.join("\n") + "\n").into_response()
}
