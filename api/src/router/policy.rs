// SPDX-License-Identifier: Apache-2.0

//! `/v1/switches`, `/v1/port-groups`, `/v1/ports`, `/v1/decisions`.

use std::sync::Arc;

use axum::{Json, extract::State, http::StatusCode, response::Response};
use serde_json::Value;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    extract::{Body, IfMatch, MustExist, Named, Query},
    merge::{TRIES, merged},
    respond::{check_limit, cut, page, revisioned},
};
use crate::{
    Caller, PolicyBackend, Problem, ProblemCode, Put,
    types::{schema, *},
};

pub(super) type Policy = Arc<dyn PolicyBackend>;

pub(super) fn routes() -> OpenApiRouter<Policy> {
    OpenApiRouter::new()
        .routes(routes!(list_switches))
        .routes(routes!(get_switch, put_switch, delete_switch))
        .routes(routes!(list_port_groups))
        .routes(routes!(get_port_group, put_port_group, patch_port_group, delete_port_group))
        .routes(routes!(list_ports))
        .routes(routes!(get_port, patch_port))
        .routes(routes!(list_decisions))
}

fn put<T: serde::Serialize>(put: &Put<T>, revision: u64) -> Response {
    let status = if put.created { StatusCode::CREATED } else { StatusCode::OK };
    revisioned(status, revision, &put.object)
}

fn name_of(text: &str) -> Result<Name, Problem> {
    text.parse().map_err(|error| Problem::invalid("name", format!("name: {error}.")))
}

/// The revision that a change must expect of an object at `found`; `expect` is the revision of `If-Match`.
pub(super) fn at(found: u64, expect: Option<u64>) -> Result<Option<u64>, Problem> {
    match expect {
        Some(expect) if expect != found => Err(Problem::revision_mismatch(expect, found)),
        _ => Ok(Some(found)),
    }
}

/// Lists the switches.
///
/// Ordered by name. There is always one called `default`.
#[utoipa::path(get, path = "/v1/switches", tag = "policy", params(Page),
    responses((status = 200, body = List<Switch>)))]
async fn list_switches(
    State(backend): State<Policy>,
    Query(part): Query<Page>,
) -> Result<Json<List<Switch>>, Problem> {
    page(backend.list_switches().await?, &part)
}

/// Shows a switch.
///
/// `status` counts its port groups and their ports.
#[utoipa::path(get, path = "/v1/switches/{name}", tag = "policy",
    params(("name" = String, Path, description = "Name or id")),
    responses((status = 200, body = Switch, headers(("etag" = String, description = "The revision")))))]
async fn get_switch(State(backend): State<Policy>, Named(switch): Named) -> Result<Response, Problem> {
    let switch = backend.get_switch(switch).await?;
    Ok(revisioned(StatusCode::OK, switch.revision, &switch))
}

/// Creates a switch or replaces its specification.
///
/// Running VMs are subject to it at once: the agent revokes all that its ports may no longer have. A PF is an uplink of one
/// switch only: naming a PF moves it from the switch `default`, unless that one has been edited.
#[utoipa::path(put, path = "/v1/switches/{name}", tag = "policy", request_body = SwitchSpec,
    params(
        ("name" = Name, Path, description = "Name, or id of one that exists"),
        ("if-match" = inline(schema::Etag), Header, description = "The revision that it must be at")
    ),
    responses(
        (status = 200, body = Switch, headers(("etag" = String, description = "The revision"))),
        (status = 201, body = Switch, headers(("etag" = String, description = "The revision")))
    ))]
async fn put_switch(
    State(backend): State<Policy>,
    caller: Caller,
    Named(switch): Named,
    IfMatch(expect): IfMatch,
    MustExist(must_exist): MustExist,
    Body(spec): Body<SwitchSpec>,
) -> Result<Response, Problem> {
    if must_exist {
        backend.get_switch(switch.clone()).await?;
    }
    let name = match switch {
        ObjectRef::Name(name) => name_of(&name)?,
        id => backend.get_switch(id).await?.name,
    };
    let done = backend.put_switch(caller, name, spec, expect).await?;
    Ok(put(&done, done.object.revision))
}

/// Deletes a switch.
///
/// Refused while it has port groups. The one called `default` stays.
#[utoipa::path(delete, path = "/v1/switches/{name}", tag = "policy",
    params(
        ("name" = String, Path, description = "Name or id"),
        ("if-match" = inline(schema::Etag), Header, description = "The revision that it must be at")
    ),
    responses((status = 204)))]
async fn delete_switch(
    State(backend): State<Policy>,
    caller: Caller,
    Named(switch): Named,
    IfMatch(expect): IfMatch,
) -> Result<StatusCode, Problem> {
    backend.delete_switch(caller, switch, expect).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Lists the port groups.
///
/// Ordered by name. There is always one called `default`.
#[utoipa::path(get, path = "/v1/port-groups", tag = "policy", params(Page),
    responses((status = 200, body = List<PortGroup>)))]
async fn list_port_groups(
    State(backend): State<Policy>,
    Query(part): Query<Page>,
) -> Result<Json<List<PortGroup>>, Problem> {
    page(backend.list_port_groups().await?, &part)
}

/// Shows a port group.
///
/// `status.policy` has every setting that its ports are subject to, and the level that decided each.
#[utoipa::path(get, path = "/v1/port-groups/{name}", tag = "policy",
    params(("name" = String, Path, description = "Name or id")),
    responses((status = 200, body = PortGroup, headers(("etag" = String, description = "The revision")))))]
async fn get_port_group(State(backend): State<Policy>, Named(group): Named) -> Result<Response, Problem> {
    let group = backend.get_port_group(group).await?;
    Ok(revisioned(StatusCode::OK, group.revision, &group))
}

/// Creates a port group or replaces its specification.
///
/// Running VMs are subject to it at once: the agent revokes all that their guests may no longer have. Refused if the PF of a
/// running VM cannot enforce it. The switch of a group never changes.
#[utoipa::path(put, path = "/v1/port-groups/{name}", tag = "policy", request_body = PortGroupSpec,
    params(
        ("name" = Name, Path, description = "Name, or id of one that exists"),
        ("if-match" = inline(schema::Etag), Header, description = "The revision that it must be at")
    ),
    responses(
        (status = 200, body = PortGroup, headers(("etag" = String, description = "The revision"))),
        (status = 201, body = PortGroup, headers(("etag" = String, description = "The revision")))
    ))]
async fn put_port_group(
    State(backend): State<Policy>,
    caller: Caller,
    Named(group): Named,
    IfMatch(expect): IfMatch,
    MustExist(must_exist): MustExist,
    Body(spec): Body<PortGroupSpec>,
) -> Result<Response, Problem> {
    if must_exist {
        backend.get_port_group(group.clone()).await?;
    }
    let name = match group {
        ObjectRef::Name(name) => name_of(&name)?,
        id => backend.get_port_group(id).await?.name,
    };
    let done = backend.put_port_group(caller, name, spec, expect).await?;
    Ok(put(&done, done.object.revision))
}

/// Changes a part of a port group's specification.
///
/// A JSON merge patch (RFC 7396), in which each setting is replaced as a whole. Without `If-Match` it applies on top of
/// concurrent changes. Running VMs are subject to it at once.
#[utoipa::path(patch, path = "/v1/port-groups/{name}", tag = "policy",
    request_body(content = schema::PortGroupPatch, content_type = "application/merge-patch+json",
        description = "Members of the specification; null leaves a setting to the switch"),
    params(
        ("name" = String, Path, description = "Name or id"),
        ("if-match" = inline(schema::Etag), Header, description = "The revision that it must be at")
    ),
    responses((status = 200, body = PortGroup, headers(("etag" = String, description = "The revision")))))]
async fn patch_port_group(
    State(backend): State<Policy>,
    caller: Caller,
    Named(group): Named,
    IfMatch(expect): IfMatch,
    Body(patch): Body<Value>,
) -> Result<Response, Problem> {
    let mut tries = 1;
    loop {
        let found = backend.get_port_group(group.clone()).await?;
        let revision = at(found.revision, expect)?;
        let spec = merged(&found.spec, &patch)?;
        match backend.put_port_group(caller.clone(), found.name, spec, revision).await {
            // Another caller's change came first: it stays, and this one applies on top of it.
            Err(problem) if problem.code == ProblemCode::RevisionMismatch && tries < TRIES => tries += 1,
            done => return done.map(|done| put(&done, done.object.revision)),
        }
    }
}

/// Deletes a port group.
///
/// Refused while ports use it. The one called `default` stays.
#[utoipa::path(delete, path = "/v1/port-groups/{name}", tag = "policy",
    params(
        ("name" = String, Path, description = "Name or id"),
        ("if-match" = inline(schema::Etag), Header, description = "The revision that it must be at")
    ),
    responses((status = 204)))]
async fn delete_port_group(
    State(backend): State<Policy>,
    caller: Caller,
    Named(group): Named,
    IfMatch(expect): IfMatch,
) -> Result<StatusCode, Problem> {
    backend.delete_port_group(caller, group, expect).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Lists the ports.
///
/// Ordered by VM and adapter. An adapter of a VM is a port from the VM's creation to its deletion.
#[utoipa::path(get, path = "/v1/ports", tag = "policy", params(Page),
    responses((status = 200, body = List<Port>)))]
async fn list_ports(
    State(backend): State<Policy>,
    Query(part): Query<Page>,
) -> Result<Json<List<Port>>, Problem> {
    page(backend.list_ports().await?, &part)
}

/// Shows a port.
///
/// The initial address is the adapter's own, the effective one is the PF's setting, and the guest's is the one that the guest
/// believes to have: they differ after a silent refusal.
#[utoipa::path(get, path = "/v1/ports/{id}", tag = "policy",
    params(("id" = String, Path, description = "Id, or name with its slash as %2F")),
    responses((status = 200, body = Port, headers(("etag" = String, description = "The revision")))))]
async fn get_port(State(backend): State<Policy>, Named(port): Named) -> Result<Response, Problem> {
    let port = backend.get_port(port).await?;
    Ok(revisioned(StatusCode::OK, port.revision, &port))
}

/// Changes a part of a port's specification.
///
/// A JSON merge patch (RFC 7396), in which each setting is replaced as a whole. It blocks the port, or overrides settings where
/// its group allows that. A running VM is subject to it at once.
#[utoipa::path(patch, path = "/v1/ports/{id}", tag = "policy",
    request_body(content = schema::PortPatch, content_type = "application/merge-patch+json",
        description = "Members of the specification; null leaves a setting to the port group"),
    params(
        ("id" = String, Path, description = "Id, or name with its slash as %2F"),
        ("if-match" = inline(schema::Etag), Header, description = "The revision that it must be at")
    ),
    responses((status = 200, body = Port, headers(("etag" = String, description = "The revision")))))]
async fn patch_port(
    State(backend): State<Policy>,
    caller: Caller,
    Named(port): Named,
    IfMatch(expect): IfMatch,
    Body(patch): Body<Value>,
) -> Result<Response, Problem> {
    let mut tries = 1;
    loop {
        let found = backend.get_port(port.clone()).await?;
        let revision = at(found.revision, expect)?;
        let spec = merged(&found.spec, &patch)?;
        // By id: between the two calls the name could become another port's.
        match backend.put_port(caller.clone(), ObjectRef::Id(found.id), spec, revision).await {
            Err(problem) if problem.code == ProblemCode::RevisionMismatch && tries < TRIES => tries += 1,
            done => return done.map(|port| revisioned(StatusCode::OK, port.revision, &port)),
        }
    }
}

/// Lists decisions, the latest first.
///
/// A decision is the record of a guest's request, or of an action of the agent itself. Equal decisions are counted in one
/// record, the oldest records go first, and no port can push out those of others.
#[utoipa::path(get, path = "/v1/decisions", tag = "policy", params(DecisionFilter),
    responses((status = 200, body = List<Decision>)))]
async fn list_decisions(
    State(backend): State<Policy>,
    Query(filter): Query<DecisionFilter>,
) -> Result<Json<List<Decision>>, Problem> {
    check_limit(filter.limit)?;
    let begun = filter.cursor.filter(|cursor| !cursor.key().is_empty());
    if begun.as_ref().is_some_and(|cursor| cursor.decision().is_none()) {
        return Err(Problem::invalid("cursor", "cursor: this is not the `next` of a page of decisions."));
    }
    let limit = filter.limit;
    // One more, to know whether there is another page.
    let filter = DecisionFilter { limit: limit.saturating_add(1), cursor: begun, ..filter };
    Ok(cut(backend.decisions(filter).await?, limit))
}
