// SPDX-License-Identifier: Apache-2.0

//! `/v1/pfs` and `/v1/vfs`.

use axum::{Json, extract::State, http::StatusCode, response::Response};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    Shared,
    extract::{Body, IfMatch, Named, Query},
    respond::{page, revisioned},
};
use crate::{
    Caller, Problem,
    types::{schema, *},
};

pub(super) fn routes() -> OpenApiRouter<Shared> {
    OpenApiRouter::new()
        .routes(routes!(list_pfs))
        .routes(routes!(get_pf))
        .routes(routes!(set_vfs))
        .routes(routes!(list_vfs))
}

/// Lists the PFs.
///
/// Ordered by name: every SR-IOV network adapter of the host, with its driver and its VFs.
#[utoipa::path(get, path = "/v1/pfs", tag = "host", params(Page),
    responses((status = 200, body = List<Pf>)))]
async fn list_pfs(
    State(backend): State<Shared>,
    Query(part): Query<Page>,
) -> Result<Json<List<Pf>>, Problem> {
    page(backend.list_pfs().await?, &part)
}

/// Shows a PF.
///
/// Its id is made from its PCI address and outlives new names.
#[utoipa::path(get, path = "/v1/pfs/{name}", tag = "host",
    params(("name" = String, Path, description = "Interface name or id")),
    responses((status = 200, body = Pf, headers(("etag" = String, description = "The revision")))))]
async fn get_pf(State(backend): State<Shared>, Named(pf): Named) -> Result<Response, Problem> {
    let pf = backend.get_pf(pf).await?;
    Ok(revisioned(StatusCode::OK, pf.revision, &pf))
}

/// Changes how many VFs a PF has.
///
/// Refused while any of them is in use. The kernel changes the number from or to 0 only.
#[utoipa::path(put, path = "/v1/pfs/{name}/vfs", tag = "host", request_body = VfCount,
    params(
        ("name" = String, Path, description = "Interface name or id"),
        ("if-match" = inline(schema::Etag), Header, description = "The revision that it must be at")
    ),
    responses((status = 200, body = Pf, headers(("etag" = String, description = "The revision")))))]
async fn set_vfs(
    State(backend): State<Shared>,
    caller: Caller,
    Named(pf): Named,
    IfMatch(expect): IfMatch,
    Body(VfCount { count }): Body<VfCount>,
) -> Result<Response, Problem> {
    let pf = backend.set_vfs(caller, pf, count, expect).await?;
    Ok(revisioned(StatusCode::OK, pf.revision, &pf))
}

/// Lists the VFs.
///
/// Ordered by PF and number, with the VM that holds each.
#[utoipa::path(get, path = "/v1/vfs", tag = "host", params(Page),
    responses((status = 200, body = List<Vf>)))]
async fn list_vfs(
    State(backend): State<Shared>,
    Query(part): Query<Page>,
) -> Result<Json<List<Vf>>, Problem> {
    page(backend.list_vfs().await?, &part)
}
