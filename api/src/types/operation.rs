// SPDX-License-Identifier: Apache-2.0

//! An operation on a VM that is under way, and its progress.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Timestamp;

/// An operation on a VM that is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmOperation {
    /// The action under way.
    pub action: OperationAction,
    /// The current stage of it, which the agent carries out or waits for.
    pub stage: Stage,
    /// The start of the stage.
    pub since: Timestamp,
    /// The stage's number among all, from 1.
    #[schema(minimum = 1)]
    pub step: u32,
    /// The number of stages, as far as known now: a failed stage is followed by those that give everything back.
    #[schema(minimum = 1)]
    pub steps: u32,
}

macro_rules! named {
    ($($(#[$doc:meta])+ $name:ident { $($(#[$text:meta])+ $variant:ident = $word:literal,)+ })+) => {$(
        $(#[$doc])+
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
        #[serde(rename_all = "snake_case")]
        pub enum $name {
            $($(#[$text])+ $variant,)+
        }

        impl $name {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// The name on the wire.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.as_str())
            }
        }
    )+};
}

named! {
    /// An action on a VM.
    OperationAction {
        /// It is booted: by a request, or by the agent itself.
        Boot = "boot",
        /// Its guest was asked to power off.
        Shutdown = "shutdown",
        /// It is ended.
        Stop = "stop",
        /// It is reset and booted again.
        Reboot = "reboot",
        /// It is ended and forgotten.
        Delete = "delete",
        /// It has ended by itself, and its resources are released.
        Release = "release",
    }

    /// A part of an operation. Stages of functions come once for each function.
    Stage {
        /// The kernel, the initramfs and `/dev/kvm` are opened with the rights of the user that boots.
        OpeningFiles = "opening_files",
        /// Functions that fit the policy are chosen, and claimed.
        ClaimingFunctions = "claiming_functions",
        /// The function's driver and settings are noted, and it is bound to vfio-pci.
        BindingFunction = "binding_function",
        /// The adapter's policy is set on its PF.
        SettingPolicy = "setting_policy",
        /// The VM's process is started and connected to.
        StartingProcess = "starting_process",
        /// The process opens its devices, gives up its privileges, maps the guest's memory and loads the kernel.
        BuildingMachine = "building_machine",
        /// vCPUs are started.
        StartingVcpus = "starting_vcpus",
        /// The guest has been asked to power off, and is waited for. One that does not react stays here.
        AskingGuest = "asking_guest",
        /// Devices are reset, and the kernel is loaded again.
        ResettingMachine = "resetting_machine",
        /// The VM's process resets its devices and ends.
        EndingProcess = "ending_process",
        /// The guest's leftovers on the adapter's VF are removed.
        CleaningFunction = "cleaning_function",
        /// The function is reset, and has its former driver and settings again.
        ReturningFunction = "returning_function",
        /// The VM, its ports and its files are deleted.
        Forgetting = "forgetting",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_on_the_wire() {
        for action in OperationAction::ALL {
            assert_eq!(serde_json::to_value(action).unwrap(), action.as_str());
        }
        for stage in Stage::ALL {
            assert_eq!(serde_json::to_value(stage).unwrap(), stage.as_str());
        }
    }
}
