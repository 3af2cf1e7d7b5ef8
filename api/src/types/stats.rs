// SPDX-License-Identifier: Apache-2.0

//! Counters of virtual machines.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Counters of a VM since its process began.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmStats {
    /// KVM exits to user space by reason (`io_in`, `mmio_write`, …), all vCPUs.
    pub exits: BTreeMap<String, u64>,
    /// Counters of each VFIO function, by its PCI address on the host.
    pub devices: BTreeMap<String, VmDeviceStats>,
    /// Counters of each disk, by its id.
    #[serde(default)]
    pub disks: BTreeMap<String, VmDiskStats>,
    /// Counters of each NIC, by its id.
    #[serde(default)]
    pub nics: BTreeMap<String, VmNicStats>,
    /// Guest memory in bytes.
    pub memory: u64,
    /// Boots and reboots so far.
    pub boots: u64,
    /// Nanoseconds from the process's start to the first entry of a vCPU.
    pub first_entry_ns: Option<u64>,
}

/// Counters of one disk of a VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmDiskStats {
    /// Requests to read.
    pub reads: u64,
    /// Requests to write, also zeroes.
    pub writes: u64,
    /// Requests to flush.
    pub flushes: u64,
    /// Requests to discard.
    pub discards: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Requests that the host's file failed: the guest has got an error.
    pub errors: u64,
    /// Nanoseconds in which the host's file was busy with requests.
    pub busy_ns: u64,
}

/// Counters of one NIC of a VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmNicStats {
    /// Frames that the guest has received.
    pub received: u64,
    /// Their bytes.
    pub received_bytes: u64,
    /// Frames that the guest has sent.
    pub sent: u64,
    /// Their bytes.
    pub sent_bytes: u64,
    /// Frames that were lost: the host's interface or the guest's driver did not take them.
    pub dropped: u64,
    /// Requests of the guest's driver that were refused: another address, for example.
    pub refused: u64,
}

/// Counters of one VFIO function of a VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmDeviceStats {
    /// The adapter's id, if it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<String>,
    /// Exits by BAR and page of 4 KiB: `"0:1"` is page 1 of BAR 0. Pages without an exit are absent.
    pub bar_exits: BTreeMap<String, u64>,
    /// Accesses to configuration space.
    pub config_exits: u64,
    /// Mailbox messages by name and verdict.
    pub mailbox: BTreeMap<String, u64>,
    /// Reads of interrupt and other registers that share the mailbox's page. Each costs an exit. 0 for VFs whose
    /// interrupt registers are on another page.
    #[serde(default)]
    pub passed_reads: u64,
    /// Writes of these registers.
    #[serde(default)]
    pub passed_writes: u64,
}
