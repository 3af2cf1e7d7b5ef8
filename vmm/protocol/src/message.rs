// SPDX-License-Identifier: Apache-2.0

//! The messages between the agent and a vmm.
//!
//! The agent refuses unknown members in messages of a vmm, as far as serde can: to skip them would cost it time, and a vmm of an
//! earlier version has none. So a new member of such a message needs a new version of the protocol, or a configuration that only the
//! new agent makes, and is left out otherwise. A vmm skips unknown members: the agent is trusted.

use std::{collections::BTreeMap, ops::RangeInclusive};

use netpolicy::{Change, MacAddress, StandingRefusal};
use passthrough::relay::{GuestRequest, RelayEvent, RelayStats, Verdict};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::spec::{DiskLimits, MachineSpec};

/// The protocol version of this build.
///
/// | version | added |
/// |---|---|
/// | 1 | all other messages |
/// | 2 | [`DeviceBackend::Simulated`](super::DeviceBackend::Simulated) |
/// | 3 | [`ToVmm::Standing`], and with it [`RelayEvent::Declined`] |
/// | 4 | [`VmmCommand::LimitDisk`], [`VmmEvent::DiskFull`] |
/// | 5 | [`VmmCommand::GrowDisk`] |
pub const VERSION: u32 = 5;

/// The oldest version with [`ToVmm::Standing`].
pub const STANDING_SINCE: u32 = 3;

/// The oldest version with commands to disks, and with events of them.
pub const DISK_COMMANDS_SINCE: u32 = 4;

/// The oldest version with [`VmmCommand::GrowDisk`].
pub const GROWTH_SINCE: u32 = 5;

/// The versions that this build speaks.
pub const SPOKEN: RangeInclusive<u32> = 1..=VERSION;

/// Messages from the agent to the vmm.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToVmm {
    /// The first message on a connection.
    Hello {
        /// The oldest version that the agent speaks.
        oldest: u32,
        /// The newest version that the agent speaks.
        newest: u32,
        /// The VM that the agent expects behind this socket.
        vm: Uuid,
    },
    /// A command. The vmm completes it by [`ToAgent::Done`] with the same id.
    #[serde(rename = "order")]
    Command {
        /// Chosen by the agent, unique on this connection.
        id: u64,
        /// The command.
        #[serde(rename = "order")]
        command: VmmCommand,
    },
    /// The response to a [`ToAgent::Request`].
    #[serde(rename = "answer")]
    Response {
        /// The id of the request.
        id: u64,
        /// The response.
        #[serde(rename = "answer")]
        response: AgentResponse,
    },
    /// Requests that the relay of an adapter denies without a request to the agent. Holds until the next such message
    /// for the adapter, or the end of the connection. May come before the machine is configured.
    Standing {
        /// The adapter's name in the machine's specification.
        adapter: String,
        /// None: the relay forwards every request to the agent.
        refusal: Option<StandingRefusal>,
    },
    /// The agent has stored the events up to this sequence number; the vmm may forget them.
    Noted {
        /// The sequence number of the last stored event.
        upto: u64,
    },
}

/// Messages from the vmm to the agent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum ToAgent {
    /// The response to the agent's hello.
    Hello {
        /// The version that both sides speak from now on: the newest common one.
        version: u32,
        /// The state at this moment; events carry later changes.
        state: State,
        /// The boot counter: 0 before the first boot, then one more for each boot and reboot.
        boots: u64,
    },
    /// The vmm cannot serve the agent's hello; the connection ends.
    Refused {
        /// The cause: no common version, or another VM.
        reason: String,
    },
    /// A command is complete, or has failed.
    Done {
        /// The command's id.
        id: u64,
        /// The result, or the failure.
        result: Result<Outcome, Failure>,
    },
    /// A request that only the agent can decide: one of a guest's VF driver.
    #[serde(rename = "ask")]
    Request {
        /// Chosen by the vmm, unique for the life of its process.
        id: u64,
        /// The request.
        #[serde(rename = "ask")]
        request: AgentRequest,
    },
    /// An event. The vmm keeps it, and sends it again after a reconnection, until [`ToVmm::Noted`].
    #[serde(rename = "report")]
    Event {
        /// A sequence number: one more for each event of this process.
        seq: u64,
        /// The event.
        #[serde(rename = "report")]
        event: VmmEvent,
    },
}

/// Commands of the agent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "snake_case")]
pub enum VmmCommand {
    /// Builds the machine: opens the devices, drops every privilege, loads the kernel. The machine's files come beside
    /// it. Once per process. → [`Outcome::Done`]
    ///
    /// Only the agent that has started a vmm configures it, and it starts vmms from its own program. So this command
    /// may change without a new protocol version.
    Configure {
        /// The machine.
        spec: Box<MachineSpec>,
        /// The names of the file descriptors beside the command ([`files`](super::files)), in the descriptors' order.
        files: Vec<String>,
    },
    /// Lets the vCPUs run for the first time, or again after a pause. → [`Outcome::Done`]
    Run,
    /// Stops all vCPUs at an instruction boundary. Devices keep their state. → [`Outcome::Done`]
    Pause,
    /// Presses the ACPI power button. → [`Outcome::Done`] (the reaction is the guest's)
    PowerButton,
    /// Resets devices and machine and boots the kernel again. → [`Outcome::Done`] once the new boot runs
    Reboot,
    /// Stops the vCPUs, resets and closes the devices and ends the process. → [`Outcome::Done`], then the process
    /// exits with status 0
    Stop,
    /// Reads the counters. → [`Outcome::Stats`]
    Stats,
    /// Types bytes into the guest's serial port. → [`Outcome::ConsoleTaken`]
    ConsoleInput {
        /// At most 1024 bytes. The port takes only as many as fit its receive FIFO.
        bytes: Vec<u8>,
    },
    /// Waits until the console file has grown beyond this offset. → [`Outcome::Done`] then, or at once if too many
    /// commands wait. The end of the connection ends the wait.
    ConsoleWait {
        /// The count of bytes ever written that the agent has read.
        offset: u64,
    },
    /// Makes changes on a VF that only mailbox messages can make, to revoke granted requests. →
    /// [`Outcome::Revoked`]
    #[serde(rename = "take_back")]
    Revoke {
        /// The adapter's name in the machine's specification.
        adapter: String,
        /// Changes whose route is the mailbox.
        changes: Vec<Change>,
    },
    /// The agent has changed a VF's effective address without a request of the guest. → [`Outcome::Done`]
    EffectiveMac {
        /// The adapter's name in the machine's specification.
        adapter: String,
        /// The address that the PF has now.
        mac: MacAddress,
    },
    /// Makes the guest's driver reset its VF, so that the driver learns the effective address. → [`Outcome::Done`]
    /// (the reset happens within about two seconds)
    MakeGuestReset {
        /// The adapter's name in the machine's specification.
        adapter: String,
    },
    /// Replaces the limits of a disk. They hold for the next request. → [`Outcome::Done`]
    LimitDisk {
        /// The disk's name in the machine's specification.
        disk: String,
        /// The new limits.
        limits: DiskLimits,
    },
    /// Enlarges a disk of a running machine, and tells its guest. A size that the disk has already is a success, too. The
    /// agent has raised the process's limit on the length of files before. → [`Outcome::Done`] when the new size is
    /// on stable storage
    GrowDisk {
        /// The disk's name in the machine's specification.
        disk: String,
        /// The new size in bytes, whole sectors of 512.
        size: u64,
    },
}

impl VmmCommand {
    /// The oldest version with this command.
    #[must_use]
    pub fn since(&self) -> u32 {
        match self {
            Self::LimitDisk { .. } => DISK_COMMANDS_SINCE,
            Self::GrowDisk { .. } => GROWTH_SINCE,
            _ => *SPOKEN.start(),
        }
    }
}

/// The result of a command that has succeeded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case", deny_unknown_fields)]
pub enum Outcome {
    /// The command has no further result.
    Done,
    /// The serial port took these bytes of the input.
    ConsoleTaken {
        /// The count of bytes.
        taken: usize,
    },
    /// Counters.
    Stats(Box<Stats>),
    /// The result of changes by mailbox messages.
    #[serde(rename = "taken_back")]
    Revoked {
        /// Changes that the PF did not confirm; empty if it confirmed all.
        failed: Vec<Change>,
        /// The PF does not read the VF's messages at present. The relay makes the changes right after the guest's
        /// next reset message, and an event follows.
        deferred: bool,
    },
}

/// The failure of a command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{detail}")]
#[serde(deny_unknown_fields)]
pub struct Failure {
    /// A stable code.
    pub code: FailureCode,
    /// The thing, the cause and the cure, in one or two sentences.
    pub detail: String,
}

/// Stable causes of a vmm's failures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureCode {
    /// The state does not allow the command (for instance: pause before run).
    WrongState,
    /// `/dev/kvm` cannot be used, or lacks a capability.
    Kvm,
    /// The host cannot provide the guest's memory.
    Memory,
    /// The threads or the guest's memory cannot be where the specification places them.
    Placement,
    /// KVM on this host lacks a feature of the guest's CPUs.
    CpuFeature,
    /// The kernel or the initramfs is malformed, or does not fit.
    Kernel,
    /// Memory for DMA cannot be locked: RLIMIT_MEMLOCK.
    Memlock,
    /// A VFIO group is not viable.
    GroupNotViable,
    /// The disk to boot from has no kernel that can be booted.
    NoKernelOnDisk,
    /// A disk's file is not an image of its format, or is damaged.
    Disk,
    /// The vmm cannot open or use a VFIO device, or a file or network of a device hangs.
    Device,
    /// The vmm cannot build the sandbox on this host.
    Sandbox,
    /// The command is malformed (sizes, names).
    Invalid,
    /// A bug of Portcullis; `detail` is for a bug report.
    Internal,
}

/// The states of a vmm.
///
/// ```text
///  Empty ──Configure──▶ Ready ──Run──▶ Running ◀──Run/Pause──▶ Paused
///                                        │  ▲                     │
///                              Reboot or guest reset              │
///                                        ▼  │                     │
///                                      Rebooting      Stop, guest power-off, fatal error
///                                        └──────────▶ Ended ◀─────┘
/// ```
///
/// A paused machine can reboot, too. [`VmmCommand::Stop`], and a failed [`VmmCommand::Configure`], end a vmm that has not run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// No machine yet.
    Empty,
    /// The machine is built. No vCPU has run yet.
    Ready,
    /// The vCPUs run.
    Running,
    /// The vCPUs are stopped and can go on.
    Paused,
    /// Devices are being reset before the next boot.
    Rebooting,
    /// The vCPUs will never run again; the process is about to exit.
    Ended,
}

impl State {
    /// The state in words, for messages to users.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Empty => "not configured",
            Self::Ready => "ready",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Rebooting => "rebooting",
            Self::Ended => "ended",
        }
    }
}

/// An event of a vmm.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "report", rename_all = "snake_case", deny_unknown_fields)]
pub enum VmmEvent {
    /// The state has changed.
    State {
        /// The new state.
        state: State,
        /// The boot counter.
        boots: u64,
    },
    /// The machine has ended.
    Ended {
        /// The cause of the end.
        end: End,
    },
    /// The guest has lost an adapter or device while it ran.
    DeviceLost {
        /// The host's PCI address.
        bdf: String,
        /// Whether the host requested the function (VFIO's request eventfd) or it failed (error eventfd; the end of a
        /// simulated PF).
        why: DeviceLoss,
    },
    /// The host's file system has no room for a guest's request. The machine is paused: an event with its state follows.
    /// [`VmmCommand::Run`] repeats the request.
    DiskFull {
        /// The disk's name in the machine's specification.
        disk: String,
    },
    /// A relay's event.
    Relay {
        /// The adapter's name in the machine's specification.
        adapter: String,
        /// The event.
        #[serde(rename = "notice")]
        event: RelayEvent,
    },
}

impl VmmEvent {
    /// The oldest version with this event.
    #[must_use]
    pub fn since(&self) -> u32 {
        match self {
            Self::DiskFull { .. } => DISK_COMMANDS_SINCE,
            _ => *SPOKEN.start(),
        }
    }
}

/// The cause of a device's loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceLoss {
    /// The host requests it: an administrator unbinds its driver or removes the VF.
    Requested,
    /// The device reported an unrecoverable error.
    Failed,
}

/// The cause of a machine's end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "end", rename_all = "snake_case", deny_unknown_fields)]
pub enum End {
    /// The guest powered off (ACPI S5).
    PoweredOff,
    /// The agent commanded it to stop.
    Stopped,
    /// The machine cannot go on.
    Failed {
        /// The failure, in words for the user.
        detail: String,
    },
}

/// Counters of one VM since its process began.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stats {
    /// KVM exits to user space by reason (`io_in`, `io_out`, `mmio_read`, `mmio_write`, …), all vCPUs.
    pub exits: BTreeMap<String, u64>,
    /// Counters of each assigned function, by its host PCI address.
    pub devices: BTreeMap<String, DeviceStats>,
    /// Counters of each disk, by its name. Agents that do not know disks have VMs without.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub disks: BTreeMap<String, DiskStats>,
    /// Counters of each NIC, by its name. Agents that do not know NICs have VMs without.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub nics: BTreeMap<String, NicStats>,
    /// Guest memory in bytes.
    pub memory: u64,
    /// Boots so far.
    pub boots: u64,
    /// Nanoseconds from the process's start to the first entry of a vCPU.
    pub first_entry_ns: Option<u64>,
}

/// Counters of one disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskStats {
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
    /// Requests that the host's file failed.
    pub errors: u64,
    /// Nanoseconds in which the host's file was busy.
    pub busy_ns: u64,
}

/// Counters of one NIC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicStats {
    /// Frames that the guest has received.
    pub received: u64,
    /// Their bytes.
    pub received_bytes: u64,
    /// Frames that the guest has sent.
    pub sent: u64,
    /// Their bytes.
    pub sent_bytes: u64,
    /// Frames that were lost.
    pub dropped: u64,
    /// Requests of the driver that were refused.
    pub refused: u64,
}

/// Counters of one assigned function.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceStats {
    /// Exits by BAR and 4 KiB page: `"0:1"` is page 1 of BAR 0. Pages without an exit are absent.
    pub bar_exits: BTreeMap<String, u64>,
    /// Configuration space accesses.
    pub config_exits: u64,
    /// Counters of the mailbox relay, if there is one.
    #[serde(default)]
    pub relay: Option<RelayStats>,
}

/// A request to the agent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "snake_case", deny_unknown_fields)]
pub enum AgentRequest {
    /// A guest's VF driver requests a change or a reset of the PF.
    Mailbox {
        /// The adapter's name in the machine's specification.
        adapter: String,
        /// The request.
        #[serde(rename = "question")]
        guest_request: GuestRequest,
    },
}

/// The agent's response to a request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum AgentResponse {
    /// The response to [`AgentRequest::Mailbox`].
    Mailbox {
        /// The adapter's name in the machine's specification.
        adapter: String,
        /// The verdict.
        verdict: Verdict,
    },
}
