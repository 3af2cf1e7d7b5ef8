// SPDX-License-Identifier: Apache-2.0

//! The problems of each operation, for the document.
//!
//! Problems that follow from an operation's parameters and body are not listed again; any operation can fail by the
//! agent's own problems (`internal`, `unavailable`). The API's tests compare every problem that they receive.

use std::collections::BTreeMap;

use utoipa::openapi::{
    Components, ContentBuilder, ObjectBuilder, Ref, RefOr, Response, ResponseBuilder, Type,
    example::ExampleBuilder,
    header::HeaderBuilder,
    path::{Operation, ParameterIn},
};

use crate::{
    Problem,
    ProblemCode::{self, *},
};

/// The problems of releasing a function of the host.
const GIVING_BACK: [ProblemCode; 6] =
    [DeviceFailed, DeviceInUse, PfDown, PfRefused, VfRemoved, VfioUnavailable];

/// Whether the operation ends with the release of functions, or begins with a release that an earlier operation could not
/// complete.
fn gives_back(operation: &str) -> bool {
    matches!(operation, "put_vm" | "patch_vm" | "delete_vm" | "boot_vm" | "shutdown_vm" | "stop_vm")
}

/// The codes that belong to an operation itself; None if it is not known here, which a test finds.
fn own(operation: &str) -> Option<&'static [ProblemCode]> {
    Some(match operation {
        "list_vms" | "get_vm" | "list_pfs" | "get_pf" | "list_vfs" => &[],
        "read_console" | "events" => &[TooManyClients],
        "lease_vm" => &[WrongState, TooManyClients],
        "end_lease" => &[],
        "list_switches" | "get_switch" | "list_port_groups" | "get_port_group" => &[],
        "list_ports" | "get_port" | "list_decisions" => &[],
        "create_vm" => &[NameTaken, MacInUse, PortGroupNotFound],
        "put_vm" | "patch_vm" => &[WrongState, NameTaken, MacInUse, PortGroupNotFound],
        // Unlike the object of a PUT, the original of a copy must exist.
        "clone_vm" => &[NotFound, NameTaken, MacInUse],
        "delete_vm" => &[WrongState],
        "boot_vm" => &[
            WrongState,
            KvmUnavailable,
            VfioUnavailable,
            MemlockTooSmall,
            MemoryUnavailable,
            PlacementUnavailable,
            CpuFeatureUnavailable,
            SandboxUnavailable,
            VmmFailed,
            KernelNotFound,
            KernelUnreadable,
            KernelInvalid,
            NoKernelOnDisk,
            InitramfsNotFound,
            InitramfsUnreadable,
            InitramfsInvalid,
            VfNotFound,
            VfInUse,
            NoFreeVf,
            VfRemoved,
            DeviceNotFound,
            DeviceInUse,
            DeviceUnsupported,
            NotAssignable,
            DeviceFailed,
            GroupNotViable,
            InterruptRemappingOff,
            PfDown,
            PfRefused,
            MacInUse,
            PortGroupNotFound,
            PolicyUnenforceable,
        ],
        "pause_vm" | "resume_vm" | "reboot_vm" | "shutdown_vm" | "stop_vm" => &[WrongState, VmmFailed],
        "resize_disk" => &[WrongState, VmmFailed, DiskInvalid],
        "vm_stats" | "write_console" => &[WrongState, VmmFailed],
        "set_vfs" => &[WrongState, PfRefused, VfsInUse, TooManyVfs],
        "put_switch" => &[NotFound, SwitchInUse, PolicyUnenforceable],
        "delete_switch" => &[SwitchInUse],
        "put_port_group" => &[NotFound, SwitchNotFound, PolicyUnenforceable],
        "patch_port_group" => &[SwitchNotFound, PolicyUnenforceable],
        "delete_port_group" => &[PortGroupInUse],
        "patch_port" => &[PolicyUnenforceable],
        _ => return None,
    })
}

/// Every problem code of an operation; None if the operation is not known here.
fn codes(operation: &Operation) -> Option<Vec<ProblemCode>> {
    let id = operation.operation_id.as_deref()?;
    let mut codes = own(id)?.to_vec();
    if gives_back(id) {
        codes.extend(GIVING_BACK);
    }
    // Any request over TCP, or of a web page, may be refused.
    codes.extend([Internal, Unavailable, Unauthorized, Forbidden]);
    for parameter in operation.parameters.iter().flatten() {
        let RefOr::T(parameter) = parameter else { continue };
        codes.push(InvalidRequest);
        match parameter.parameter_in {
            // The object of a PUT may be new.
            ParameterIn::Path if !operation_creates(operation) => codes.push(NotFound),
            ParameterIn::Header if parameter.name == "if-match" => codes.push(RevisionMismatch),
            _ => {}
        }
    }
    if let Some(RefOr::T(body)) = &operation.request_body {
        codes.extend([InvalidRequest, BodyTooLarge, RequestTimeout]);
        if body.content.keys().any(|kind| kind.contains("json")) {
            codes.push(UnsupportedMediaType);
        }
    }
    codes.sort_unstable();
    codes.dedup();
    Some(codes)
}

fn operation_creates(operation: &Operation) -> bool {
    operation.responses.responses.contains_key("201")
}

/// Adds the problem responses to an operation: one for each status with its codes, and `default` for the codes of a newer
/// agent.
pub(super) fn add(operation: &mut Operation) {
    let mut by_status: BTreeMap<u16, Vec<ProblemCode>> = BTreeMap::new();
    for code in codes(operation).unwrap_or_default() {
        by_status.entry(code.status()).or_default().push(code);
    }
    let responses = &mut operation.responses.responses;
    for (status, response) in responses.iter_mut() {
        if let RefOr::T(response) = response
            && response.description.is_empty()
        {
            // OpenAPI requires a description for each.
            response.description = if status == "201" { "Created." } else { "Done." }.to_owned();
        }
    }
    for (status, codes) in by_status {
        let listed: Vec<String> =
            codes.iter().map(|code| format!("`{}`: {}", code.as_str(), code.title())).collect();
        responses.insert(status.to_string(), RefOr::T(problem(&listed.join("; "), &codes)));
    }
    responses.insert("default".to_owned(), RefOr::T(problem("The request was refused or failed.", &[])));
    for response in responses.values_mut() {
        if let RefOr::T(response) = response {
            response.headers.insert(REQUEST_ID.to_owned(), RefOr::Ref(Ref::new(REQUEST_ID_HEADER)));
        }
    }
}

/// The header of every response.
const REQUEST_ID: &str = "x-request-id";

/// The component that describes it.
const REQUEST_ID_HEADER: &str = "#/components/headers/x-request-id";

/// Adds the header of every response.
pub(super) fn add_header(components: &mut Components) {
    let header = HeaderBuilder::new()
        .schema(Some(ObjectBuilder::new().schema_type(Type::String)))
        .description(Some("The request's id: the caller's own, if the caller sent a valid one"));
    components.headers.insert(REQUEST_ID.to_owned(), RefOr::T(header.build()));
}

/// The problem response with one of these codes, with an example of each.
fn problem(description: &str, codes: &[ProblemCode]) -> Response {
    let examples = codes.iter().map(|code| {
        let detail = format!("{} {}", code.cause(), code.cure());
        let request_id = Some("8a6e0804-2bd0-4672-b79d-d97027f9071a".into());
        let example = serde_json::to_value(Problem { request_id, ..Problem::new(*code, detail) });
        (code.as_str(), RefOr::T(ExampleBuilder::new().value(example.ok()).build()))
    });
    let content = ContentBuilder::new()
        .schema(Some(Ref::from_schema_name("Problem")))
        .examples_from_iter(examples)
        .build();
    ResponseBuilder::new().description(description).content("application/problem+json", content).build()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_is_known_here() {
        let document = crate::openapi();
        let mut count = 0;
        for path in document.paths.paths.values() {
            for operation in
                [&path.get, &path.put, &path.post, &path.patch, &path.delete].into_iter().flatten()
            {
                assert!(codes(operation).is_some(), "{:?}", operation.operation_id);
                count += 1;
            }
        }
        assert!(count >= 30, "{count}");
    }
}
