// SPDX-License-Identifier: Apache-2.0

//! The texts of each cause code: `docs/errors.md` is a copy of them.

use super::CauseCode;

impl CauseCode {
    /// Every code.
    pub const ALL: [CauseCode; 10] = [
        CauseCode::PoweredOff,
        CauseCode::Stopped,
        CauseCode::BootFailed,
        CauseCode::MachineFailed,
        CauseCode::VmmCrashed,
        CauseCode::VmmMisbehaved,
        CauseCode::VfRemoved,
        CauseCode::DeviceFailed,
        CauseCode::HostRestarted,
        CauseCode::DiskFull,
    ];

    /// The name on the wire.
    pub fn as_str(self) -> &'static str {
        self.texts().0
    }

    /// The meaning, as a sentence.
    pub fn meaning(self) -> &'static str {
        self.texts().1
    }

    /// The cure, as a sentence.
    pub fn cure(self) -> &'static str {
        self.texts().2
    }

    fn texts(self) -> (&'static str, &'static str, &'static str) {
        match self {
            CauseCode::PoweredOff => ("powered_off", "The guest powered off.", "Nothing: boot it again."),
            CauseCode::Stopped => ("stopped", "A request stopped the VM.", "Nothing: boot it again."),
            CauseCode::BootFailed => (
                "boot_failed",
                "The boot failed; `problem` has the code of the reason.",
                "Follow the cure of that problem code.",
            ),
            CauseCode::MachineFailed => (
                "machine_failed",
                "The machine could not continue: KVM cannot run an operation of the guest, or the guest reset itself 64 times in a row within a second of each start. (A triple fault is a reset.)",
                "Read the console; boot another kernel.",
            ),
            CauseCode::VmmCrashed => (
                "vmm_crashed",
                "The VM's process ended without reporting a reason.",
                "Read its last output in `detail` and its log in the run directory; report the crash.",
            ),
            CauseCode::VmmMisbehaved => (
                "vmm_misbehaved",
                "The VM's process violated the control protocol, probably because its guest has taken it over, and was killed.",
                "Treat the guest as hostile: keep its console and log, and examine them before you boot it again.",
            ),
            CauseCode::VfRemoved => (
                "vf_removed",
                "The host removed a VF or device from the running VM; the guest runs on without it.",
                "Make the VFs again, then stop and boot the VM.",
            ),
            CauseCode::DeviceFailed => (
                "device_failed",
                "A function reported an unrecoverable error, or the process of its simulated PF ended.",
                "Read the kernel's log, then stop and boot the VM.",
            ),
            CauseCode::HostRestarted => (
                "host_restarted",
                "The host was restarted while the VM was running.",
                "Nothing: boot it again.",
            ),
            CauseCode::DiskFull => (
                "disk_full",
                "The file system of a disk is full, and the VM is paused.",
                "Make room there: the VM goes on by itself, or at once with `vm resume`.",
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use utoipa::{PartialSchema as _, openapi};

    use super::*;

    #[test]
    fn every_code_is_listed_under_its_name() {
        let openapi::RefOr::T(openapi::Schema::Object(schema)) = CauseCode::schema() else { panic!() };
        let names: Vec<_> = CauseCode::ALL.iter().map(|code| serde_json::json!(code.as_str())).collect();
        assert_eq!(schema.enum_values, Some(names));
        for code in CauseCode::ALL {
            assert_eq!(serde_json::to_value(code).unwrap(), code.as_str());
        }
    }
}
