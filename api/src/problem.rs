// SPDX-License-Identifier: Apache-2.0

//! Refusals and failures of the API: `application/problem+json` (RFC 9457).

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use utoipa::ToSchema;

use crate::Missing;

// Boxed texts keep the type small enough to be returned by value.
/// A refusal or failure, as it goes over the wire.
///
/// `code` is for programs and never changes its meaning; `detail` is for people and names the thing, the cause
/// and the cure.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, thiserror::Error)]
#[error("{detail}")]
pub struct Problem {
    /// `urn:portcullis:problem:` and the code.
    #[serde(rename = "type")]
    #[schema(value_type = String)]
    pub kind: Box<str>,
    /// Stable code.
    pub code: ProblemCode,
    /// The code in words: the same for all problems of this code.
    #[schema(value_type = String)]
    pub title: Box<str>,
    /// The HTTP status.
    pub status: u16,
    /// The thing, the cause and the cure.
    pub detail: String,
    /// Where in the request the problem is, as a path such as `adapters[0].mac` or the name of a parameter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub field: Option<Box<str>>,
    /// The request's id, which is also in the `x-request-id` header and in the agent's log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub request_id: Option<Box<str>>,
}

impl Problem {
    /// A problem of this code; `detail` names the thing, the cause and the cure.
    pub fn new(code: ProblemCode, detail: impl Into<String>) -> Self {
        Problem {
            kind: format!("urn:portcullis:problem:{}", code.as_str()).into(),
            code,
            title: code.title().into(),
            status: code.status(),
            detail: detail.into(),
            field: None,
            request_id: None,
        }
    }

    /// A part of the request is not valid; `field` names it.
    pub fn invalid(field: impl Into<Box<str>>, detail: impl Into<String>) -> Self {
        Problem { field: Some(field.into()), ..Problem::new(ProblemCode::InvalidRequest, detail) }
    }

    /// The object that a path names does not exist.
    pub fn not_found(missing: &Missing) -> Self {
        Problem::new(ProblemCode::NotFound, format!("{missing}."))
    }

    /// The object has changed since the caller read it.
    pub fn revision_mismatch(expected: u64, found: u64) -> Self {
        Problem::new(
            ProblemCode::RevisionMismatch,
            format!(
                "The object is at revision {found}, not {expected}: read it again and repeat the change."
            ),
        )
    }
}

/// Makes the enum, its wire names, statuses, titles, causes and cures from one table, which `docs/errors.md` copies.
macro_rules! problem_codes {
    ($($(#[$doc:meta])* $variant:ident = $name:literal, $status:literal, $title:literal, $cause:literal, $cure:literal;)*) => {
        /// Stable codes of problems.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum ProblemCode {
            $($(#[$doc])* $variant,)*
        }

        impl ProblemCode {
            /// Every code.
            pub const ALL: &[ProblemCode] = &[$(ProblemCode::$variant,)*];

            /// The name on the wire.
            pub fn as_str(self) -> &'static str {
                match self { $(ProblemCode::$variant => $name,)* }
            }

            /// The HTTP status that problems of this code have.
            pub fn status(self) -> u16 {
                match self { $(ProblemCode::$variant => $status,)* }
            }

            /// The code in words.
            pub fn title(self) -> &'static str {
                match self { $(ProblemCode::$variant => $title,)* }
            }

            /// The usual cause. A problem's `detail` has the actual one.
            pub fn cause(self) -> &'static str {
                match self { $(ProblemCode::$variant => $cause,)* }
            }

            /// The usual cure.
            pub fn cure(self) -> &'static str {
                match self { $(ProblemCode::$variant => $cure,)* }
            }
        }
    };
}

problem_codes! {
    /// A field, parameter or header is not valid; `field` names it.
    InvalidRequest = "invalid_request", 400, "The request is not valid",
        "A field of the body, a parameter or a header has a value that it cannot have, is missing, or is not known.",
        "Correct what `field` names; `detail` says what it takes, `/v1/openapi.json` has every type.";
    /// The token is missing or unknown.
    Unauthorized = "unauthorized", 401, "Who is asking?",
        "A request over TCP has no token, or one that is not in the agent's token file.",
        "Send `authorization: Bearer TOKEN` (`--token-file`); after a change of the file restart the agent.";
    /// The caller may not do this.
    Forbidden = "forbidden", 403, "Not allowed",
        "The Host header does not name the agent, a web page sent the request, or the kernel did not tell who is at the other end of the socket.",
        "Address the agent by its address or a name of `--allowed-host`, and not from a page.";
    /// No such object or path.
    NotFound = "not_found", 404, "Not found",
        "No object has this name or id, or nothing is at this path.",
        "List the objects; a name is bound to its object only as long as that exists.";
    /// The path is right, the method is not.
    MethodNotAllowed = "method_not_allowed", 405, "Method not allowed",
        "The path does not take this method.",
        "Use one of those in the `allow` header.";
    /// The request did not arrive in time.
    RequestTimeout = "request_timeout", 408, "The request took too long",
        "The body did not arrive within 20 s.",
        "Send it faster, or look for what holds it up on the way.";
    /// Another object has this name.
    NameTaken = "name_taken", 409, "The name is taken",
        "Another object of this kind has the name.",
        "Choose another name, or delete the other object.";
    /// The object's state does not allow this.
    WrongState = "wrong_state", 409, "Wrong state",
        "The VM, or the PF, is in a state in which this cannot be done.",
        "Do what `detail` says first, as a rule: boot, resume or stop the VM.";
    /// `If-Match` does not match.
    RevisionMismatch = "revision_mismatch", 412, "The object has changed",
        "The object is not at the revision of `If-Match`: somebody else has changed it, or there is none.",
        "Read the object again and repeat the change on what it is now.";
    /// The body is larger than the API takes.
    BodyTooLarge = "body_too_large", 413, "The body is too large",
        "The body has more than 64 KiB, or input for a console more than 4096 bytes.",
        "Send less at once.";
    /// The API does not take the body's type.
    UnsupportedMediaType = "unsupported_media_type", 415, "Unsupported media type",
        "The body's content type is not JSON.",
        "Send `content-type: application/json`, or `application/merge-patch+json` with PATCH.";
    /// An unexpected failure; `detail` is for a bug report.
    Internal = "internal", 500, "Internal error",
        "The agent met something that it does not know, or it is broken; sysfs could not be read, for example.",
        "Look for the request's id in the agent's log, and report it with that.";
    /// The agent is about to end, or its store cannot be used.
    Unavailable = "unavailable", 503, "The agent cannot serve this now",
        "The agent is about to end, its database cannot be used, or it has as many objects as it manages.",
        "Try again; if it stays so, look at the agent's log and at the space on the disk of `--state-dir`.";

    /// The agent already serves as many clients or streams as it can at once.
    TooManyClients = "too_many_clients", 503, "Too many clients",
        "256 clients are connected to the listener, 64 of them your user's on the socket, or 64 follow events or read consoles.",
        "End some of them, or try again later.";

    /// `/dev/kvm` is missing, cannot be opened, or lacks a capability.
    KvmUnavailable = "kvm_unavailable", 503, "KVM is not available",
        "`/dev/kvm` is missing, cannot be opened, or lacks what is needed.",
        "Turn virtualization on in the firmware, load `kvm_intel` or `kvm_amd`; in a VM, allow nesting.";
    /// VFIO or an IOMMU is missing on this host.
    VfioUnavailable = "vfio_unavailable", 503, "VFIO is not available",
        "`vfio-pci` is not loaded, or the device has no IOMMU.",
        "Load `vfio-pci`; turn the IOMMU on in the firmware and with `intel_iommu=on` on the kernel's command line.";
    /// RLIMIT_MEMLOCK is too low for the VM's DMA.
    MemlockTooSmall = "memlock_too_small", 503, "Not enough lockable memory",
        "The agent's limit for locked memory is below what DMA of this guest needs.",
        "Raise it: `LimitMEMLOCK=infinity` in the agent's unit, or `ulimit -l unlimited`.";
    /// Guest memory is not available (huge pages included).
    MemoryUnavailable = "memory_unavailable", 503, "Not enough memory",
        "The host does not have the memory that the guest is to get, or not as huge pages.",
        "Stop other VMs, give the VM less memory, or reserve huge pages (`/proc/sys/vm/nr_hugepages`).";
    /// The vmm's sandbox cannot be built on this host.
    SandboxUnavailable = "sandbox_unavailable", 503, "The sandbox cannot be built",
        "This host cannot build a part of the sandbox, or it is off and the VM has functions of the host.",
        "Do what `detail` says for that part; leave `--sandbox-off` away.";
    /// The vmm process could not be started, crashed, or does not answer.
    VmmFailed = "vmm_failed", 500, "The VM's process failed",
        "The VM's process could not be started, has crashed, or does not answer.",
        "Read its log in the run directory of the VM; stop the VM and boot it again.";

    /// The kernel file does not exist.
    KernelNotFound = "kernel_not_found", 422, "No such kernel file",
        "There is no file at `boot.kernel`; a relative path is looked up in the image directories.",
        "Correct the path, or put the file into a directory of `--image-dir`.";
    /// The caller may not read the kernel file, or it is no regular file.
    KernelUnreadable = "kernel_unreadable", 403, "The kernel file cannot be read",
        "The caller's user may not read the kernel, or it is no regular file.",
        "Let the caller read it, or put it into a directory of `--image-dir`.";
    /// The file is not a bootable kernel.
    KernelInvalid = "kernel_invalid", 422, "Not a kernel",
        "The file is neither a bzImage nor an ELF kernel for x86-64 (started at its PVH entry, or at its 64-bit entry without one), is cut or damaged, or does not fit into the guest's memory, with the initramfs or without.",
        "Name a kernel for x86-64 (`vmlinuz` of a distribution), or give the VM more memory.";
    /// The initramfs file does not exist.
    InitramfsNotFound = "initramfs_not_found", 422, "No such initramfs file",
        "There is no file at `boot.initramfs`.",
        "Correct the path, or put the file into a directory of `--image-dir`.";
    /// The caller may not read the initramfs file, or it is no regular file.
    InitramfsUnreadable = "initramfs_unreadable", 403, "The initramfs file cannot be read",
        "The caller's user may not read the initramfs, or it is no regular file.",
        "Let the caller read it, or put it into a directory of `--image-dir`.";
    /// The initramfs is larger than the guest's memory.
    InitramfsInvalid = "initramfs_invalid", 422, "The initramfs cannot be used",
        "The initramfs is larger than the guest's memory.",
        "Give the VM more memory, or make the initramfs smaller.";

    /// The VF named in the specification does not exist.
    VfNotFound = "vf_not_found", 422, "No such VF",
        "`adapters[].vf` names no VF of this host, or one whose PF is no uplink of the port group's switch.",
        "List the VFs (`portcullis vf list`) and name one of them, or none.";
    /// The VF belongs to another VM or user.
    VfInUse = "vf_in_use", 409, "The VF is in use",
        "The VF belongs to another VM.",
        "Stop that VM, or name another VF, or none.";
    /// No VF is free.
    NoFreeVf = "no_free_vf", 409, "No VF is free",
        "All VFs of the uplinks of the port group's switch are in use, or none of the uplinks can enforce its policy.",
        "Stop a VM, make more VFs (`portcullis pf set-vfs`), or add an uplink to the switch.";
    /// The host removed the VF while it was in use.
    VfRemoved = "vf_removed", 409, "The VF was removed",
        "The host has removed the VF: the number of VFs was changed, or the PF's driver was unloaded.",
        "Make the VFs again and boot the VM again.";
    /// The PCI device named in the specification does not exist.
    DeviceNotFound = "device_not_found", 422, "No such device",
        "`devices` names no PCI function of this host.",
        "List them with `lspci -D` and correct the address.";
    /// The device belongs to another VM or user.
    DeviceInUse = "device_in_use", 409, "The device is in use",
        "Another VM or the host uses the function (an interface that is up, a mounted disk), or its driver keeps it.",
        "Stop that VM, or whatever uses the function on the host.";
    /// The host's operator does not allow VMs to have the function.
    NotAssignable = "not_assignable", 403, "The function is not assignable",
        "The agent's operator has not named the function of `devices`, or has named PFs and not that of the VF.",
        "Use a function that is named, or start the agent with `--assignable` and the name in the problem's detail.";
    /// The device cannot be given to a guest (for instance: it has neither MSI nor MSI-X).
    DeviceUnsupported = "device_unsupported", 422, "The device cannot be assigned",
        "The function cannot be given to a guest: it has no MSI or MSI-X, or no reset, or is of another kind.",
        "VFs of network adapters belong under `adapters`; `serve --assignable BDF,no-reset` allows one without reset.";
    /// The device failed while it was in use.
    DeviceFailed = "device_failed", 409, "The device failed",
        "The function reported an error or could not be cleaned of its last tenant; it stays claimed until it is.",
        "Boot or delete the VM again, which tries once more; reset the PF if that does not help.";
    /// Other devices of the IOMMU group are in use by host drivers.
    GroupNotViable = "group_not_viable", 409, "The IOMMU group is not viable",
        "Other functions of the IOMMU group have drivers of the host.",
        "Give all of the group to the VM, unbind the others from their drivers, or use another slot.";
    /// Interrupt remapping is off.
    InterruptRemappingOff = "interrupt_remapping_off", 503, "Interrupt remapping is off",
        "The IOMMU does not remap interrupts: a guest could raise the host's.",
        "Turn interrupt remapping on in the firmware (and `intremap=on`), or use another host.";

    /// The PF's link is administratively down.
    PfDown = "pf_down", 409, "The PF is down",
        "The PF's interface is administratively down, so its VFs carry nothing.",
        "`ip link set PF up`.";
    /// The PF's driver refused or does not support a setting.
    PfRefused = "pf_refused", 409, "The PF refused a setting",
        "The PF's driver refused a setting or does not know it, or the PF cannot be asked.",
        "Read the kernel's log; leave the setting to its default if the adapter cannot do it.";
    /// The number of VFs cannot change while one is in use.
    VfsInUse = "vfs_in_use", 409, "VFs are in use",
        "The number of VFs cannot change while a VM has one of them.",
        "Stop the VMs that `detail` names.";
    /// The PF cannot have this many VFs.
    TooManyVfs = "too_many_vfs", 422, "Too many VFs",
        "The PF cannot have this many VFs (a simulated one has at least one).",
        "Ask for at most `status.max_vfs`.";

    /// The address belongs to another adapter.
    MacInUse = "mac_in_use", 409, "The MAC address is in use",
        "Another adapter has the address, as its own or as what its guest was granted.",
        "Choose another address, or leave it out: the agent makes one.";
    /// The port group named in the specification does not exist.
    PortGroupNotFound = "port_group_not_found", 422, "No such port group",
        "An adapter names a port group that does not exist.",
        "Create it first, or name another; without one the adapter is in `default`.";
    /// Ports use the port group.
    PortGroupInUse = "port_group_in_use", 409, "The port group is in use",
        "Ports use the port group, or it is the one called `default`, which stays.",
        "Move or delete the VMs whose adapters name it.";
    /// The switch named in the specification does not exist.
    SwitchNotFound = "switch_not_found", 422, "No such switch",
        "A port group names a switch that does not exist.",
        "Create it first, or name another.";
    /// Port groups use the switch.
    SwitchInUse = "switch_in_use", 409, "The switch is in use",
        "The switch has port groups, is the one called `default`, or the PF is an uplink of another switch.",
        "Delete its port groups, or take the PF from the other switch first.";
    /// The PF cannot enforce the port group's policy.
    PolicyUnenforceable = "policy_unenforceable", 409, "The PF cannot enforce the policy",
        "The PF's driver cannot hold a VF to a setting of the policy, or has no room for it.",
        "Change the setting that `detail` names, or use a PF that can.";
}

impl std::fmt::Display for ProblemCode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Serialize for ProblemCode {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for ProblemCode {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        // A newer agent may have codes that this build lacks: their status and detail still inform the user.
        Ok(Self::ALL.iter().copied().find(|code| code.as_str() == name).unwrap_or(ProblemCode::Internal))
    }
}

impl utoipa::PartialSchema for ProblemCode {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::schema::Schema> {
        utoipa::openapi::ObjectBuilder::new()
            .schema_type(utoipa::openapi::Type::String)
            .description(Some("Stable codes of problems."))
            .enum_values(Some(Self::ALL.iter().map(|code| code.as_str())))
            .into()
    }
}

impl ToSchema for ProblemCode {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_unique_and_round_trip() {
        let mut names = std::collections::BTreeSet::new();
        for code in ProblemCode::ALL {
            assert!(names.insert(code.as_str()), "{code} twice");
            assert!((400..600).contains(&code.status()), "{code}");
            let json = serde_json::to_string(code).unwrap();
            assert_eq!(serde_json::from_str::<ProblemCode>(&json).unwrap(), *code);
        }
    }

    #[test]
    fn a_problem_has_the_members_of_rfc_9457() {
        let problem = Problem::invalid("adapters[0].mac", "not an address");
        assert_eq!(
            serde_json::to_value(&problem).unwrap(),
            serde_json::json!({
                "type": "urn:portcullis:problem:invalid_request", "code": "invalid_request",
                "title": "The request is not valid", "status": 400, "detail": "not an address",
                "field": "adapters[0].mac",
            })
        );
    }

    #[test]
    fn a_code_of_a_newer_agent_is_read_as_internal() {
        assert_eq!(serde_json::from_str::<ProblemCode>("\"of_the_future\"").unwrap(), ProblemCode::Internal);
    }
}
