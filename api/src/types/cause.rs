// SPDX-License-Identifier: Apache-2.0

//! The texts of each cause code: `docs/errors.md` is a copy of them.

use super::CauseCode;

impl CauseCode {
    /// Every code.
    pub const ALL: [CauseCode; 9] = [
        CauseCode::PoweredOff,
        CauseCode::Stopped,
        CauseCode::BootFailed,
        CauseCode::MachineFailed,
        CauseCode::VmmCrashed,
        CauseCode::VmmMisbehaved,
        CauseCode::VfRemoved,
        CauseCode::DeviceFailed,
        CauseCode::HostRestarted,
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
                "The VM could not be booted; `problem` has the code of why.",
                "As for that problem code.",
            ),
            CauseCode::MachineFailed => (
                "machine_failed",
                "The machine could not go on: the guest did what KVM cannot run, or reset itself 64 times in a row within a second of each start. (A triple fault resets.)",
                "Read the console; boot another kernel.",
            ),
            CauseCode::VmmCrashed => (
                "vmm_crashed",
                "The VM's process ended without saying why.",
                "Read its last words in `detail` and its log in the run directory; report it.",
            ),
            CauseCode::VmmMisbehaved => (
                "vmm_misbehaved",
                "The VM's process said to the agent what none says that its guest has not taken over, and was killed.",
                "Take the guest for hostile: keep its console and log, and do not boot it again unexamined.",
            ),
            CauseCode::VfRemoved => (
                "vf_removed",
                "The host took a VF or device from the running VM; the guest goes on without it.",
                "Make the VFs again, then stop and boot the VM.",
            ),
            CauseCode::DeviceFailed => (
                "device_failed",
                "A function reported an error that it cannot recover from, or its simulated PF's process ended.",
                "Read the kernel's log, then stop and boot the VM.",
            ),
            CauseCode::HostRestarted => (
                "host_restarted",
                "The host was restarted while the VM was running.",
                "Nothing: boot it again.",
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
