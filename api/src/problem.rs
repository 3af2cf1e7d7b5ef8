//! What the API answers when it cannot do what was asked: `application/problem+json` (RFC 9457).

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use utoipa::ToSchema;

/// A refusal or failure, as it goes over the wire. (Boxed texts keep it small enough to be returned by value.)
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
    /// `urn:uuid:` and the request's id, which is also in the `x-request-id` header and in the agent's log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub instance: Option<Box<str>>,
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
            instance: None,
        }
    }

    /// Something in the request is not as it must be; `field` says where.
    pub fn invalid(field: impl Into<Box<str>>, detail: impl Into<String>) -> Self {
        Problem { field: Some(field.into()), ..Problem::new(ProblemCode::InvalidRequest, detail) }
    }

    /// Nothing of this kind has this name or id.
    pub fn not_found(kind: &str, name: &dyn std::fmt::Display) -> Self {
        Problem::new(
            ProblemCode::NotFound,
            format!("There is no {kind} {name}; list them to see which there are."),
        )
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

/// Makes the enum, its wire names, statuses and titles from one table.
macro_rules! problem_codes {
    ($($(#[$doc:meta])* $variant:ident = $name:literal, $status:literal, $title:literal;)*) => {
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
        }
    };
}

problem_codes! {
    /// A field, parameter or header is not as it must be; `field` says which.
    InvalidRequest = "invalid_request", 400, "The request is not valid";
    /// No token, or none that the agent knows.
    Unauthorized = "unauthorized", 401, "Who is asking?";
    /// The caller may not do this.
    Forbidden = "forbidden", 403, "Not allowed";
    /// No such object or path.
    NotFound = "not_found", 404, "Not found";
    /// The path is right, the method is not.
    MethodNotAllowed = "method_not_allowed", 405, "Method not allowed";
    /// The request did not arrive in time.
    RequestTimeout = "request_timeout", 408, "The request took too long";
    /// Another object has this name.
    NameTaken = "name_taken", 409, "The name is taken";
    /// The object's state does not allow this.
    WrongState = "wrong_state", 409, "Wrong state";
    /// `If-Match` does not match.
    RevisionMismatch = "revision_mismatch", 412, "The object has changed";
    /// The body is larger than the API takes.
    BodyTooLarge = "body_too_large", 413, "The body is too large";
    /// The body's type is none that the API takes.
    UnsupportedMediaType = "unsupported_media_type", 415, "Unsupported media type";
    /// Something that should not happen; `detail` is for a bug report.
    Internal = "internal", 500, "Internal error";
    /// The agent is about to end, or its store cannot be used.
    Unavailable = "unavailable", 503, "The agent cannot serve this now";

    /// As many clients are connected, or follow a stream, as the agent serves at once.
    TooManyClients = "too_many_clients", 503, "Too many clients";

    /// `/dev/kvm` is missing, cannot be opened, or lacks a capability.
    KvmUnavailable = "kvm_unavailable", 503, "KVM is not available";
    /// VFIO or an IOMMU is missing on this host.
    VfioUnavailable = "vfio_unavailable", 503, "VFIO is not available";
    /// RLIMIT_MEMLOCK is below what the VM's DMA needs.
    MemlockTooSmall = "memlock_too_small", 503, "Not enough lockable memory";
    /// Guest memory cannot be had (huge pages included).
    MemoryUnavailable = "memory_unavailable", 503, "Not enough memory";
    /// The vmm's sandbox cannot be built on this host.
    SandboxUnavailable = "sandbox_unavailable", 503, "The sandbox cannot be built";
    /// The vmm process could not be started, crashed, or does not answer.
    VmmFailed = "vmm_failed", 500, "The VM's process failed";

    /// The kernel file does not exist.
    KernelNotFound = "kernel_not_found", 422, "No such kernel file";
    /// The caller may not read the kernel file, or it is no regular file.
    KernelUnreadable = "kernel_unreadable", 403, "The kernel file cannot be read";
    /// The file is no kernel that can be booted.
    KernelInvalid = "kernel_invalid", 422, "Not a kernel";
    /// The initramfs file does not exist.
    InitramfsNotFound = "initramfs_not_found", 422, "No such initramfs file";
    /// The caller may not read the initramfs file, or it is no regular file.
    InitramfsUnreadable = "initramfs_unreadable", 403, "The initramfs file cannot be read";
    /// The initramfs does not fit into the guest's memory.
    InitramfsInvalid = "initramfs_invalid", 422, "The initramfs cannot be used";

    /// The VF named in the specification does not exist.
    VfNotFound = "vf_not_found", 422, "No such VF";
    /// The VF belongs to another VM or user.
    VfInUse = "vf_in_use", 409, "The VF is in use";
    /// No VF is free.
    NoFreeVf = "no_free_vf", 409, "No VF is free";
    /// The host removed the VF while it was in use.
    VfRemoved = "vf_removed", 409, "The VF was removed";
    /// The PCI device named in the specification does not exist.
    DeviceNotFound = "device_not_found", 422, "No such device";
    /// The device belongs to another VM or user.
    DeviceInUse = "device_in_use", 409, "The device is in use";
    /// The device cannot be given to a guest (for instance: it has neither MSI nor MSI-X).
    DeviceUnsupported = "device_unsupported", 422, "The device cannot be assigned";
    /// The device failed while it was in use.
    DeviceFailed = "device_failed", 409, "The device failed";
    /// Other devices of the IOMMU group are in use by host drivers.
    GroupNotViable = "group_not_viable", 409, "The IOMMU group is not viable";
    /// Interrupt remapping is off.
    InterruptRemappingOff = "interrupt_remapping_off", 503, "Interrupt remapping is off";

    /// The PF's link is administratively down.
    PfDown = "pf_down", 409, "The PF is down";
    /// The PF's driver refused or does not support a setting.
    PfRefused = "pf_refused", 409, "The PF refused a setting";
    /// The number of VFs cannot change while one is in use.
    VfsInUse = "vfs_in_use", 409, "VFs are in use";
    /// The PF cannot have this many VFs.
    TooManyVfs = "too_many_vfs", 422, "Too many VFs";

    /// The address belongs to another adapter.
    MacInUse = "mac_in_use", 409, "The MAC address is in use";
    /// The port group named in the specification does not exist.
    PortGroupNotFound = "port_group_not_found", 422, "No such port group";
    /// Ports use the port group.
    PortGroupInUse = "port_group_in_use", 409, "The port group is in use";
    /// The switch named in the specification does not exist.
    SwitchNotFound = "switch_not_found", 422, "No such switch";
    /// Port groups use the switch.
    SwitchInUse = "switch_in_use", 409, "The switch is in use";
    /// The PF cannot do what the port group asks for.
    PolicyUnenforceable = "policy_unenforceable", 409, "The PF cannot enforce the policy";
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
        // A newer agent may know codes that this build does not: its status and detail still tell the user.
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
