// SPDX-License-Identifier: Apache-2.0

//! `/v1/vms`.

use axum::{
    Json,
    extract::State,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Deserialize;
use serde_json::Value;
use utoipa::IntoParams;
use utoipa_axum::{router::OpenApiRouter, routes};
use uuid::Uuid;

use super::{
    Shared,
    extract::{Body, IfMatch, Named, Query, VmBody, Wait},
    merge::{TRIES, merged},
    policy::at,
    respond::{page, revisioned},
};
use crate::{
    Caller, LeaseTerms, Problem, ProblemCode,
    types::{schema, *},
};

pub(super) fn routes() -> OpenApiRouter<Shared> {
    OpenApiRouter::new()
        .routes(routes!(list_vms, create_vm))
        .routes(routes!(get_vm, put_vm, patch_vm, delete_vm))
        .routes(routes!(clone_vm))
        .routes(routes!(boot_vm))
        .routes(routes!(pause_vm))
        .routes(routes!(resume_vm))
        .routes(routes!(reboot_vm))
        .routes(routes!(shutdown_vm))
        .routes(routes!(stop_vm))
        .routes(routes!(resize_disk))
        .routes(routes!(vm_stats))
}

/// Lists the VMs.
///
/// Ordered by name, without `status.placement`.
#[utoipa::path(get, path = "/v1/vms", tag = "vms", params(Page),
    responses((status = 200, body = List<Vm>)))]
async fn list_vms(
    State(backend): State<Shared>,
    Query(part): Query<Page>,
) -> Result<Json<List<Vm>>, Problem> {
    page(backend.list_vms().await?, &part)
}

/// `?leased=true&holder=…`.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Creation {
    /// Has the VM live by a lease from the beginning: it is deleted unless a client takes the lease within 60 s.
    #[serde(default)]
    #[param(default = false)]
    leased: bool,
    /// A UUID that the client has drawn: nothing but it takes the lease. Has no effect without `leased`.
    #[param(value_type = Option<String>, format = Uuid)]
    holder: Option<Uuid>,
}

/// Creates a VM.
///
/// It holds nothing of the host until it is booted. Each of its adapters is a port from now on.
#[utoipa::path(post, path = "/v1/vms", tag = "vms", request_body = VmSpec, params(Creation), responses(
    (status = 201, body = Vm, headers(("etag" = String, description = "The revision"), ("location" = String)))
))]
async fn create_vm(
    State(backend): State<Shared>,
    caller: Caller,
    Query(creation): Query<Creation>,
    Body(spec): VmBody<VmSpec>,
) -> Result<Response, Problem> {
    spec.check()?;
    let lease = creation.leased.then_some(LeaseTerms { holder: creation.holder });
    Ok(created(&backend.create_vm(caller, spec, lease).await?))
}

fn created(vm: &Vm) -> Response {
    let mut response = revisioned(StatusCode::CREATED, vm.revision, vm);
    if let Ok(location) = HeaderValue::from_str(&format!("/v1/vms/{}", vm.id)) {
        response.headers_mut().insert(header::LOCATION, location);
    }
    response
}

/// Shows a VM.
///
/// `status` has its state, the cause of its end, the VFs and devices that it holds, and while an operation takes time, its
/// progress (`operation`). Only this call returns `status.placement`.
#[utoipa::path(get, path = "/v1/vms/{name}", tag = "vms",
    params(("name" = String, Path, description = "Name or id")),
    responses((status = 200, body = Vm, headers(("etag" = String, description = "The revision")))))]
async fn get_vm(State(backend): State<Shared>, Named(vm): Named) -> Result<Response, Problem> {
    let vm = backend.get_vm(vm).await?;
    Ok(revisioned(StatusCode::OK, vm.revision, &vm))
}

/// Replaces a VM's specification.
///
/// Another name renames it. Refused unless the VM is at rest; only `restart`, `autostart`, `cloud_init` and `credentials` may
/// change while it runs. A text that is `(hidden)`, as answers have it, stays as it is stored. Its ports keep their ids, and keep their
/// overrides as long as they stay in their port group.
#[utoipa::path(put, path = "/v1/vms/{name}", tag = "vms", request_body = VmSpec,
    params(
        ("name" = String, Path, description = "Name or id"),
        ("if-match" = inline(schema::Etag), Header, description = "The revision that it must be at")
    ),
    responses((status = 200, body = Vm, headers(("etag" = String, description = "The revision")))))]
async fn put_vm(
    State(backend): State<Shared>,
    caller: Caller,
    Named(vm): Named,
    IfMatch(expect): IfMatch,
    Body(spec): VmBody<VmSpec>,
) -> Result<Response, Problem> {
    spec.check()?;
    let vm = backend.put_vm(caller, vm, spec, expect).await?;
    Ok(revisioned(StatusCode::OK, vm.revision, &vm))
}

/// Changes a part of a VM's specification.
///
/// A JSON merge patch (RFC 7396), for which the same holds as for PUT. Lists are replaced as a whole. Without `If-Match` the
/// patch is applied on top of concurrent changes.
#[utoipa::path(patch, path = "/v1/vms/{name}", tag = "vms",
    request_body(content = schema::VmPatch, content_type = "application/merge-patch+json",
        description = "Members of the specification; null takes one back to its default"),
    params(
        ("name" = String, Path, description = "Name or id"),
        ("if-match" = inline(schema::Etag), Header, description = "The revision that it must be at")
    ),
    responses((status = 200, body = Vm, headers(("etag" = String, description = "The revision")))))]
async fn patch_vm(
    State(backend): State<Shared>,
    caller: Caller,
    Named(vm): Named,
    IfMatch(expect): IfMatch,
    Body(patch): VmBody<Value>,
) -> Result<Response, Problem> {
    let mut tries = 1;
    loop {
        let found = backend.get_vm(vm.clone()).await?;
        let revision = at(found.revision, expect)?;
        let spec: VmSpec = merged(&found.spec, &patch)?;
        spec.check()?;
        // By id: between the two calls the name could come to mean another VM.
        match backend.put_vm(caller.clone(), ObjectRef::Id(found.id), spec, revision).await {
            // Another request was faster: keep its change, and make this one on top of it.
            Err(problem) if problem.code == ProblemCode::RevisionMismatch && tries < TRIES => tries += 1,
            done => return done.map(|vm| revisioned(StatusCode::OK, vm.revision, &vm)),
        }
    }
}

/// Creates a VM like another one.
///
/// It has an id and a name of its own, and its adapters have addresses and VFs that the agent chooses. The VM may run
/// meanwhile; data that its guest has written anywhere is not copied.
#[utoipa::path(post, path = "/v1/vms/{name}/clone", tag = "vms", request_body = CloneSpec,
    params(("name" = String, Path, description = "Name or id of the VM to copy")),
    responses((status = 201, body = Vm, headers(("etag" = String, description = "The revision"), ("location" = String)))))]
async fn clone_vm(
    State(backend): State<Shared>,
    caller: Caller,
    Named(vm): Named,
    Body(copy): Body<CloneSpec>,
) -> Result<Response, Problem> {
    Ok(created(&backend.clone_vm(caller, vm, copy.name).await?))
}

/// Deletes a VM.
///
/// Stops it if it runs and releases its functions. Responds when that is done.
#[utoipa::path(delete, path = "/v1/vms/{name}", tag = "vms",
    params(
        ("name" = String, Path, description = "Name or id"),
        ("if-match" = inline(schema::Etag), Header, description = "The revision that it must be at")
    ),
    responses((status = 204)))]
async fn delete_vm(
    State(backend): State<Shared>,
    caller: Caller,
    Named(vm): Named,
    IfMatch(expect): IfMatch,
) -> Result<StatusCode, Problem> {
    backend.delete_vm(caller, vm, expect).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// One route for each [`VmAction`].
macro_rules! actions {
    ($($(#[$doc:meta])* $handler:ident = $path:literal, $action:ident;)*) => {$(
        $(#[$doc])*
        #[utoipa::path(post, path = $path, tag = "vms",
            params(("name" = String, Path, description = "Name or id"), Wait),
            responses(
                (status = 200, body = Vm, description = "The action is complete"),
                (status = 202, body = Vm, description = "The action goes on")
            ))]
        async fn $handler(
            backend: State<Shared>,
            caller: Caller,
            vm: Named,
            wait: Query<Wait>,
        ) -> Result<Response, Problem> {
            act(backend, caller, vm, wait, VmAction::$action).await
        }
    )*};
}

actions! {
    /// Boots a VM.
    ///
    /// Claims its devices, has its adapters' policy set on their PFs, builds the machine and runs it.
    boot_vm = "/v1/vms/{name}/boot", Boot;
    /// Pauses a running VM.
    ///
    /// Its vCPUs stand still. One that is paused already stays so.
    pause_vm = "/v1/vms/{name}/pause", Pause;
    /// Lets a paused VM go on.
    ///
    /// One that runs already goes on.
    resume_vm = "/v1/vms/{name}/resume", Resume;
    /// Resets a VM and boots it again.
    ///
    /// The reset needs no consent of the guest. Its adapters have their initial addresses again.
    reboot_vm = "/v1/vms/{name}/reboot", Reboot;
    /// Presses a VM's power button.
    ///
    /// Complete when the guest has powered off, if it does.
    shutdown_vm = "/v1/vms/{name}/shutdown", Shutdown;
    /// Ends a VM at once.
    ///
    /// Gives back its devices. One that is at rest stays so.
    stop_vm = "/v1/vms/{name}/stop", Stop;
}

async fn act(
    State(backend): State<Shared>,
    caller: Caller,
    Named(vm): Named,
    Query(wait): Query<Wait>,
    action: VmAction,
) -> Result<Response, Problem> {
    let progress = backend.act(caller, vm, action, wait.duration()?).await?;
    let status = if progress.complete { StatusCode::OK } else { StatusCode::ACCEPTED };
    Ok(revisioned(status, progress.vm.revision, &progress.vm))
}

/// Enlarges a disk of a running VM.
///
/// The guest learns the new size at once, and enlarges its partitions and file systems by itself. The new part reads as zeroes. A
/// raw file, or a qcow2 image, becomes longer; a block device must have been enlarged before. A disk never becomes smaller. The
/// disk of a stopped VM is enlarged by `qemu-img resize` or `truncate`. Responds when the size is on stable storage.
#[utoipa::path(post, path = "/v1/vms/{name}/resize-disk", tag = "vms", request_body = DiskSize,
    params(("name" = String, Path, description = "Name or id")),
    responses((status = 200, body = DiskSize)))]
async fn resize_disk(
    State(backend): State<Shared>,
    caller: Caller,
    Named(vm): Named,
    Body(wanted): Body<DiskSize>,
) -> Result<Json<DiskSize>, Problem> {
    wanted.check()?;
    backend.resize_disk(caller, vm, wanted.clone()).await?;
    Ok(Json(wanted))
}

/// Shows a VM's counters.
///
/// Exits by reason, mailbox messages, the time to the guest's first instruction. Refused while it has no process.
#[utoipa::path(get, path = "/v1/vms/{name}/stats", tag = "vms",
    params(("name" = String, Path, description = "Name or id")),
    responses((status = 200, body = VmStats)))]
async fn vm_stats(State(backend): State<Shared>, Named(vm): Named) -> Result<Response, Problem> {
    Ok(Json(backend.stats(vm).await?).into_response())
}
