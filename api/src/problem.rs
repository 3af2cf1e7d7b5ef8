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
        "A field of the body, a parameter or a header is missing, unknown, or has a value that is not allowed.",
        "Correct the place that `field` names; `detail` has the accepted values, `/v1/openapi.json` every type.";
    /// The token is missing or unknown.
    Unauthorized = "unauthorized", 401, "The token is missing or unknown",
        "A request over TCP has no token, or a token that is not in the agent's token file.",
        "Send `authorization: Bearer TOKEN` (`--token-file`); restart the agent after a change of the file.";
    /// The caller may not do this.
    Forbidden = "forbidden", 403, "Not allowed",
        "The Host header does not name the agent, a web page sent the request, or the kernel did not identify the caller at the other end of the socket.",
        "Use the agent's address or a name of `--allowed-host`, and do not send the request from a web page.";
    /// No such object or path.
    NotFound = "not_found", 404, "Not found",
        "No object has this name or id, or the API has no such path.",
        "List the objects; a name refers to an object only while the object exists.";
    /// The path is right, the method is not.
    MethodNotAllowed = "method_not_allowed", 405, "Method not allowed",
        "The path does not take this method.",
        "Use a method of the `allow` header.";
    /// The request did not arrive in time.
    RequestTimeout = "request_timeout", 408, "The request took too long",
        "The body did not arrive within 20 s.",
        "Send the body faster, or find the delay between client and agent.";
    /// Another object has this name.
    NameTaken = "name_taken", 409, "The name is taken",
        "Another object of this kind has the name.",
        "Choose another name, or delete the other object.";
    /// The object's state does not allow this.
    WrongState = "wrong_state", 409, "Wrong state",
        "The state of the VM, or of the PF, does not allow the action.",
        "Follow `detail` first: as a rule, boot, resume or stop the VM.";
    /// `If-Match` does not match.
    RevisionMismatch = "revision_mismatch", 412, "The object has changed",
        "The object is not at the revision of `If-Match`: another client has changed it, or it does not exist.",
        "Read the object again and repeat the change on its current state.";
    /// The body is larger than the API takes.
    BodyTooLarge = "body_too_large", 413, "The body is too large",
        "The body has more than 64 KiB, the specification of a VM more than 512 KiB, or console input more than 4096 bytes.",
        "Send less at once.";
    /// The API does not take the body's type.
    UnsupportedMediaType = "unsupported_media_type", 415, "Unsupported media type",
        "The body's content type is not JSON.",
        "Send `content-type: application/json`, or `application/merge-patch+json` with PATCH.";
    /// An unexpected failure; `detail` is for a bug report.
    Internal = "internal", 500, "Internal error",
        "The agent met an unexpected condition, or it has a bug; it could not read sysfs, for example.",
        "Find the request's id in the agent's log, and report the problem with these lines.";
    /// The agent is about to end, or its store cannot be used.
    Unavailable = "unavailable", 503, "The agent cannot serve this now",
        "The agent is about to end, its database cannot be used, or the agent is at its limit of objects.",
        "Try again; if the problem persists, check the agent's log and the free disk space of `--state-dir`.";

    /// The agent already serves as many clients or streams as it can at once.
    TooManyClients = "too_many_clients", 503, "Too many clients",
        "The listener has 256 clients, your user has 64 on the socket, or 64 clients follow events or read consoles.",
        "End some connections, or try again later.";

    /// `/dev/kvm` is missing, cannot be opened, or lacks a capability.
    KvmUnavailable = "kvm_unavailable", 503, "KVM is not available",
        "`/dev/kvm` is missing, cannot be opened, or lacks a required capability.",
        "Turn virtualization on in the firmware, load `kvm_intel` or `kvm_amd`; in a VM, allow nesting.";
    /// VFIO or an IOMMU is missing on this host.
    VfioUnavailable = "vfio_unavailable", 503, "VFIO is not available",
        "`vfio-pci` is not loaded, or the device has no IOMMU.",
        "Load `vfio-pci`; turn the IOMMU on in the firmware and with `intel_iommu=on` on the kernel's command line.";
    /// RLIMIT_MEMLOCK is too low for the VM's DMA.
    MemlockTooSmall = "memlock_too_small", 503, "Not enough lockable memory",
        "The agent's limit of locked memory is too low for DMA of this guest.",
        "Raise the limit: `LimitMEMLOCK=infinity` in the agent's unit, or `ulimit -l unlimited`.";
    /// Guest memory is not available (huge pages included).
    MemoryUnavailable = "memory_unavailable", 503, "Not enough memory",
        "The host has too little memory for the guest, or too few huge pages of its size, on any node or on that of `placement`; or a control group above the VM's has a limit of huge pages.",
        "Stop other VMs, give the VM less memory, or reserve huge pages of its size (`/sys/kernel/mm/hugepages/hugepages-*kB/nr_hugepages`), or on its node (`/sys/devices/system/node/node*/hugepages`).";
    /// The VM cannot be where its specification places it.
    PlacementUnavailable = "placement_unavailable", 409, "The placement is not possible",
        "A CPU of `placement` is offline, or the cpuset of VMs' processes lacks it; the NUMA node does not exist or has no memory; or the adapters of `numa = \"of_adapters\"` are on several nodes.",
        "Name CPUs and a node that `portcullis check` shows, or leave that part out.";
    /// KVM of this host lacks a feature of the guest's CPUs.
    CpuFeatureUnavailable = "cpu_feature_unavailable", 409, "The host lacks a feature of CPUs",
        "KVM on this host has no nested virtualization, or no performance counters, and `cpu_features` asks for them.",
        "Load `kvm_intel` or `kvm_amd` with `nested=1`, `kvm` with `enable_pmu=1`, or turn the feature off.";
    /// The vmm's sandbox cannot be built on this host.
    SandboxUnavailable = "sandbox_unavailable", 503, "The sandbox cannot be built",
        "This host cannot build a part of the sandbox, or a part is off and the VM has functions of the host.",
        "Follow `detail` for that part; start the agent without `--sandbox-off`.";
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
        "The caller's user may not read the kernel, or it is not a regular file.",
        "Make the file readable for the caller, or put it into a directory of `--image-dir`.";
    /// The file is not a bootable kernel.
    KernelInvalid = "kernel_invalid", 422, "Not a kernel",
        "The file is neither a bzImage nor an ELF kernel for x86-64 (started at its PVH entry, or at its 64-bit entry without one), is truncated or damaged, or does not fit into the guest's memory, with the initramfs or without.",
        "Name a kernel for x86-64 (`vmlinuz` of a distribution), or give the VM more memory.";
    /// The disk to boot from has no kernel that can be booted.
    NoKernelOnDisk = "no_kernel_on_disk", 422, "No kernel on the disk",
        "The disk of `boot.disk` has no kernel that can be booted: none is installed, or its file systems are damaged, encrypted or of an unsupported kind.",
        "Install a kernel in the guest at one of the places that `detail` lists, or boot with `boot.kernel`.";
    /// The initramfs file does not exist.
    InitramfsNotFound = "initramfs_not_found", 422, "No such initramfs file",
        "There is no file at `boot.initramfs`, or at one of its paths.",
        "Correct the path, or put the file into a directory of `--image-dir`.";
    /// The caller may not read the initramfs file, or it is no regular file.
    InitramfsUnreadable = "initramfs_unreadable", 403, "The initramfs file cannot be read",
        "The caller's user may not read the initramfs, or it is not a regular file.",
        "Make the file readable for the caller, or put it into a directory of `--image-dir`.";
    /// The initramfs is larger than the guest's memory.
    InitramfsInvalid = "initramfs_invalid", 422, "The initramfs cannot be used",
        "The initramfs is larger than the guest's memory: all of its files together.",
        "Give the VM more memory, or make the initramfs smaller.";

    /// A disk's file does not exist.
    DiskNotFound = "disk_not_found", 422, "No such disk file",
        "There is no file at `disks[].path`; a relative path is looked up in the disk directories, and for a read-only disk in the image directories.",
        "Correct the path, or make the file (`truncate --size=8G FILE`) in a directory of `--disk-dir`.";
    /// The caller may not use a disk's file, or it is neither a regular file nor a block device.
    DiskUnreadable = "disk_unreadable", 403, "The disk's file cannot be opened",
        "The caller's user, or an author of the specification, may not read or write the file, or it is neither a regular file nor a block device.",
        "Give that user the right, put the file into a directory of `--disk-dir`, or make the disk `read_only` or `ephemeral`.";
    /// Another process uses the disk's file.
    DiskInUse = "disk_in_use", 409, "The disk is in use",
        "Another VM, QEMU or another program has locked the file.",
        "End the user, which `detail` names where the agent can see it; give the VM a copy; or make the disk `read_only` or `ephemeral` for all its users.";
    /// A disk's file has less than a sector, or is no usable image of its format.
    DiskInvalid = "disk_invalid", 422, "The disk cannot be used",
        "The file is shorter than a sector of 512 bytes, is no image of its format, has a feature that is not supported, is damaged, or has other backing files than `disks[].backing`.",
        "Follow `detail`, which names the command: mostly `qemu-img convert -O qcow2`, `qemu-img check -r all` or `qemu-img rebase`.";

    /// The agent has no file for the changes of an ephemeral disk.
    EphemeralUnavailable = "ephemeral_unavailable", 503, "No file for an ephemeral disk",
        "No file for the changes of an ephemeral disk can be made in the directory of `serve --ephemeral-dir`, or in `ephemeral` in the state directory.",
        "Follow `detail`: make the directory writable for the agent, make room on its file system, or choose one on ext4, XFS, Btrfs or tmpfs.";

    /// A NIC's interface is not among those that VMs may use.
    InterfaceNotAllowed = "interface_not_allowed", 403, "VMs may not use the interface",
        "The agent's operator has not let VMs use the interface of `nics[]`.",
        "Start the agent with `--interface NAME`, or name an interface that it was started with.";
    /// A NIC's interface does not exist.
    InterfaceNotFound = "interface_not_found", 422, "No such interface",
        "There is no interface of this name and kind in the agent's network namespace.",
        "Make the interface, as `detail` shows, or correct the name.";
    /// A NIC's interface cannot be used.
    InterfaceUnusable = "interface_unusable", 409, "The interface cannot be used",
        "Another process has the interface open, it has other properties than the NIC, or the kernel refuses a step; `detail` has the cause.",
        "Follow `detail`.";

    /// The VF named in the specification does not exist.
    VfNotFound = "vf_not_found", 422, "No such VF",
        "`adapters[].vf` names no VF of this host, or a VF with a PF that is not an uplink of the port group's switch.",
        "List the VFs (`portcullis vf list`) and name one of them, or leave `vf` out.";
    /// The VF belongs to another VM or user.
    VfInUse = "vf_in_use", 409, "The VF is in use",
        "The VF belongs to another VM.",
        "Stop that VM, name another VF, or leave `vf` out.";
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
        "Another VM or the host uses the function (an interface that is up, a mounted disk), or its driver does not release it.",
        "Stop that VM, or end the use of the function on the host.";
    /// The host's operator does not allow VMs to have the function.
    NotAssignable = "not_assignable", 403, "The function is not assignable",
        "The agent's `--assignable` options do not name the function of `devices`, or name PFs without the PF of the VF.",
        "Use an assignable function, or start the agent with `--assignable` and the name in the problem's detail.";
    /// The device cannot be given to a guest (for instance: it has neither MSI nor MSI-X).
    DeviceUnsupported = "device_unsupported", 422, "The device cannot be assigned",
        "A guest cannot have the function: it has no MSI or MSI-X, or no reset, or is of an unsupported kind.",
        "Name VFs of network adapters under `adapters`; `serve --assignable BDF,no-reset` allows a function without a reset.";
    /// The device failed while it was in use.
    DeviceFailed = "device_failed", 409, "The device failed",
        "The function reported an error, or could not be scrubbed after its last tenant; it stays claimed until it is.",
        "Boot or delete the VM again, which repeats the scrub; reset the PF if that does not help.";
    /// Other devices of the IOMMU group are in use by host drivers.
    GroupNotViable = "group_not_viable", 409, "The IOMMU group is not viable",
        "Other functions of the IOMMU group have drivers of the host.",
        "Give the whole group to the VM, unbind the others from their drivers, or use another slot.";
    /// Interrupt remapping is off.
    InterruptRemappingOff = "interrupt_remapping_off", 503, "Interrupt remapping is off",
        "The IOMMU does not remap interrupts: a guest could raise interrupts of the host.",
        "Turn interrupt remapping on in the firmware (and `intremap=on`), or use another host.";

    /// The PF's link is administratively down.
    PfDown = "pf_down", 409, "The PF is down",
        "The PF's interface is administratively down, so its VFs have no link.",
        "Run `ip link set PF up`.";
    /// The PF's driver refused or does not support a setting.
    PfRefused = "pf_refused", 409, "The PF refused a setting",
        "The PF's driver refused a setting or does not support it, or the agent cannot reach the PF.",
        "Read the kernel's log; leave the setting at its default if the adapter does not support it.";
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
        "Another adapter has the address, as its initial address or by a granted request of its guest.",
        "Choose another address, or leave it out: the agent generates one.";
    /// The port group named in the specification does not exist.
    PortGroupNotFound = "port_group_not_found", 422, "No such port group",
        "An adapter names a port group that does not exist.",
        "Create it first, or name another; without one the adapter is in `default`.";
    /// Ports use the port group.
    PortGroupInUse = "port_group_in_use", 409, "The port group is in use",
        "Ports use the port group, or it is `default`, which cannot be deleted.",
        "Move the adapters to another port group, or delete their VMs.";
    /// The switch named in the specification does not exist.
    SwitchNotFound = "switch_not_found", 422, "No such switch",
        "A port group names a switch that does not exist.",
        "Create it first, or name another.";
    /// Port groups use the switch.
    SwitchInUse = "switch_in_use", 409, "The switch is in use",
        "The switch has port groups, it is `default`, which cannot be deleted, or the PF is an uplink of another switch.",
        "Delete its port groups, or remove the PF from the other switch first.";
    /// The PF cannot enforce the port group's policy.
    PolicyUnenforceable = "policy_unenforceable", 409, "The PF cannot enforce the policy",
        "The PF's driver cannot enforce a setting of the policy on a VF, or has no room for it.",
        "Change the setting that `detail` names, or use a PF that can enforce it.";
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
