// SPDX-License-Identifier: Apache-2.0

//! What the agent and a vmm say to each other.

use std::{collections::BTreeMap, ops::RangeInclusive};

use netpolicy::{Change, MacAddress, StandingRefusal};
use passthrough::relay::{Notice, Question, RelayStats, Verdict};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// The protocol version of this build.
///
/// | version | brought |
/// |---|---|
/// | 1 | everything else |
/// | 2 | [`DeviceBackend::Simulated`] |
/// | 3 | [`ToVmm::Standing`], and with it [`Notice::Declined`] |
pub const VERSION: u32 = 3;

/// The oldest version with [`ToVmm::Standing`].
pub const STANDING_SINCE: u32 = 3;

/// The versions that this build still speaks.
pub const SPOKEN: RangeInclusive<u32> = 1..=VERSION;

/// From the agent to the vmm.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToVmm {
    /// First message on a connection.
    Hello {
        /// Oldest version that the agent speaks.
        oldest: u32,
        /// Newest version that the agent speaks.
        newest: u32,
        /// The VM that the agent believes to be behind this socket.
        vm: Uuid,
    },
    /// Something to do; answered by [`ToAgent::Done`] with the same id.
    Order {
        /// Chosen by the agent, unique on this connection.
        id: u64,
        /// What to do.
        order: Order,
    },
    /// Reply to a [`ToAgent::Ask`].
    Answer {
        /// The id of the question.
        id: u64,
        /// The answer.
        answer: Answer,
    },
    /// What the relay of an adapter refuses without a question, from now to the next such message, or the end of the
    /// connection. May come before the machine is configured.
    Standing {
        /// The adapter's name in the machine's specification.
        adapter: String,
        /// None: nothing.
        refusal: Option<StandingRefusal>,
    },
    /// Reports up to this sequence number are stored; the vmm may forget them.
    Noted {
        /// Sequence number of the last stored report.
        upto: u64,
    },
}

/// From the vmm to the agent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToAgent {
    /// Answer to the agent's hello.
    Hello {
        /// The version both speak from now on: the newest common one.
        version: u32,
        /// The state at this moment; reports tell of later changes.
        state: State,
        /// The boot counter: 0 before the first boot, then one more for each boot and reboot.
        boots: u64,
    },
    /// The agent's hello cannot be served; the connection ends.
    Refused {
        /// Why: no common version, or another VM.
        reason: String,
    },
    /// An order was carried out, or not.
    Done {
        /// The order's id.
        id: u64,
        /// Its outcome.
        result: Result<Outcome, Failure>,
    },
    /// A question that the vmm cannot decide itself (the relay's requests come this way).
    Ask {
        /// Chosen by the vmm, unique for the process's life.
        id: u64,
        /// The question.
        ask: Ask,
    },
    /// Something happened. Kept and sent again after a reconnection until [`ToVmm::Noted`].
    Report {
        /// One more for each report of this process.
        seq: u64,
        /// What happened.
        report: Report,
    },
}

/// What the agent can order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "snake_case")]
pub enum Order {
    /// Builds the machine: opens the devices, drops every privilege, loads the kernel. File descriptors
    /// beside it, in this order: `/dev/kvm`, the console file, the kernel, the initramfs if
    /// [`MachineSpec::initramfs`], the connection of each simulated function. Once per process. → [`Outcome::Done`]
    Configure {
        /// The machine.
        spec: Box<MachineSpec>,
    },
    /// Lets the vCPUs run for the first time, or again after a pause. → [`Outcome::Done`]
    Run,
    /// Stops all vCPUs at an instruction boundary. Devices keep their state. → [`Outcome::Done`]
    Pause,
    /// Presses the ACPI power button. → [`Outcome::Done`] (the guest decides what follows)
    PowerButton,
    /// Resets devices and machine and boots the kernel again. → [`Outcome::Done`] once the new boot runs
    Reboot,
    /// Stops the vCPUs, resets and closes the devices and ends the process. → [`Outcome::Done`], then the
    /// process exits with status 0
    Stop,
    /// Counters. → [`Outcome::Stats`]
    Stats,
    /// Bytes for the guest's serial port. → [`Outcome::ConsoleTaken`]
    ConsoleInput {
        /// At most 1024 bytes, as text; what does not fit the receive FIFO is not taken.
        bytes: Vec<u8>,
    },
    /// → [`Outcome::Done`] as soon as the console file has grown beyond this offset (or the connection ends).
    ConsoleWait {
        /// Count of bytes ever written that the asker has seen.
        offset: u64,
    },
    /// Makes changes on a VF that only mailbox messages can make: taking back what was granted.
    /// → [`Outcome::TakenBack`]
    TakeBack {
        /// The adapter's name in the machine's specification.
        adapter: String,
        /// Changes whose route is the mailbox.
        changes: Vec<Change>,
    },
    /// The agent has changed a VF's effective address without having been asked. → [`Outcome::Done`]
    EffectiveMac {
        /// The adapter's name in the machine's specification.
        adapter: String,
        /// The address that the PF has now.
        mac: MacAddress,
    },
    /// Makes the guest's driver reset its VF, so that it learns the effective address. → [`Outcome::Done`] (it
    /// happens within about two seconds)
    MakeGuestReset {
        /// The adapter's name in the machine's specification.
        adapter: String,
    },
}

/// What an order yields.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    /// Nothing more to say.
    Done,
    /// How many bytes the serial port took.
    ConsoleTaken {
        /// Bytes.
        taken: usize,
    },
    /// Counters.
    Stats(Box<Stats>),
    /// What became of changes by mailbox messages.
    TakenBack {
        /// What the PF did not confirm; empty if all was done.
        failed: Vec<Change>,
        /// The PF does not listen to the VF now; the changes are made right after the guest's next reset message, and
        /// a report follows then.
        deferred: bool,
    },
}

/// Why an order failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{detail}")]
pub struct Failure {
    /// Stable code.
    pub code: FailureCode,
    /// The thing, the cause and the cure, in one sentence or two.
    pub detail: String,
}

/// Stable reasons for failures of a vmm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureCode {
    /// The order does not fit the state (for instance: pause before run).
    WrongState,
    /// `/dev/kvm` cannot be used, or lacks a capability.
    Kvm,
    /// Guest memory cannot be had.
    Memory,
    /// The kernel or the initramfs is not one, or does not fit.
    Kernel,
    /// Memory for DMA cannot be locked: RLIMIT_MEMLOCK.
    Memlock,
    /// A VFIO group is not viable.
    GroupNotViable,
    /// A VFIO device cannot be opened or used.
    Device,
    /// The sandbox cannot be built on this host.
    Sandbox,
    /// The order itself makes no sense (sizes, names).
    Invalid,
    /// Something that should not happen; `detail` is for a bug report.
    Internal,
}

/// A machine to build.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MachineSpec {
    /// The VM's immutable id.
    pub vm: Uuid,
    /// Its name, for log lines.
    pub name: String,
    /// vCPUs, 1 to 254.
    pub cpus: u8,
    /// Guest memory in bytes, a multiple of 2 MiB.
    pub memory: u64,
    /// Backs guest memory with 2 MiB huge pages; fails if there are too few.
    pub hugepages: bool,
    /// The kernel command line as the user gave it.
    pub cmdline: String,
    /// Whether an initramfs comes beside the order.
    pub initramfs: bool,
    /// Functions, in the order of their slots on the guest's bus.
    pub devices: Vec<DeviceSpec>,
    /// What the process becomes after it has opened its devices.
    pub sandbox: SandboxSpec,
}

/// One function of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceSpec {
    /// The host's PCI address, `dddd:bb:dd.f`.
    pub bdf: String,
    /// What is behind it.
    pub backend: DeviceBackend,
    /// The adapter that this is, if it is a network VF under policy: its mailbox is then in the relay's hands. None
    /// for plain devices.
    pub adapter: Option<String>,
}

/// What is behind a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceBackend {
    /// Hardware, through VFIO.
    Vfio {
        /// The IOMMU group's number (`/dev/vfio/N`).
        group: u32,
    },
    /// A simulated VF, whose connection to its PF comes beside the order.
    Simulated,
}

/// How the process gives up its privileges.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxSpec {
    /// User id to become; None to stay (an agent without root).
    pub uid: Option<u32>,
    /// Group id to become.
    pub gid: Option<u32>,
    /// Limits on what it may use: open files, threads, sizes of files.
    pub limits: bool,
    /// Namespaces of its own: network, IPC, host name.
    pub namespaces: bool,
    /// An empty root, in a mount namespace of its own.
    pub empty_root: bool,
    /// A seccomp filter for each thread.
    pub seccomp: bool,
    /// No file, no TCP port, no abstract socket, no signal to others, by Landlock.
    pub landlock: bool,
}

impl SandboxSpec {
    /// What needs no privilege and holds for threads: a process that stays the user it is and sees what it saw, with
    /// its seccomp filters and Landlock.
    #[must_use]
    pub fn of_threads() -> Self {
        Self {
            uid: None,
            gid: None,
            limits: false,
            namespaces: false,
            empty_root: false,
            seccomp: true,
            landlock: true,
        }
    }
}

/// Where a vmm is in its life.
///
/// ```text
///  Empty ──Configure──▶ Ready ──Run──▶ Running ◀──Run/Pause──▶ Paused
///                                        │  ▲                     │
///                              Reboot or guest reset              │
///                                        ▼  │                     │
///                                      Rebooting      Stop, guest power-off, fatal error
///                                        └──────────▶ Ended ◀─────┘
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// No machine yet.
    Empty,
    /// The machine is built, no vCPU has run.
    Ready,
    /// vCPUs run.
    Running,
    /// vCPUs are stopped and can go on.
    Paused,
    /// Devices are being reset before the next boot.
    Rebooting,
    /// vCPUs will never run again; the process is about to exit.
    Ended,
}

impl State {
    /// The state as a word for people.
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

/// Something that happened in a vmm.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "report", rename_all = "snake_case")]
pub enum Report {
    /// The state changed.
    State {
        /// The new state.
        state: State,
        /// The boot counter.
        boots: u64,
    },
    /// The machine ended.
    Ended {
        /// How.
        end: End,
    },
    /// An adapter or device was lost while the guest ran.
    DeviceLost {
        /// The host's PCI address.
        bdf: String,
        /// Whether the host asked for it (VFIO's request eventfd) or it failed (error eventfd; a simulated PF that is gone).
        why: DeviceLoss,
    },
    /// A relay has something to say.
    Relay {
        /// The adapter's name in the machine's specification.
        adapter: String,
        /// What.
        notice: Notice,
    },
}

/// Why a device went away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceLoss {
    /// The host wants it back: its driver is being unbound or the VF removed.
    Requested,
    /// It reported an unrecoverable error.
    Failed,
}

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "end", rename_all = "snake_case")]
pub enum End {
    /// The guest powered off (ACPI S5).
    PoweredOff,
    /// The agent ordered it.
    Stopped,
    /// The machine cannot go on.
    Failed {
        /// What happened, for the user.
        detail: String,
    },
}

/// Counters of one VM since its process began.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// KVM exits to user space by reason (`io_in`, `io_out`, `mmio_read`, `mmio_write`, …), all vCPUs.
    pub exits: BTreeMap<String, u64>,
    /// Counters of each assigned function, by its host PCI address.
    pub devices: BTreeMap<String, DeviceStats>,
    /// Guest memory in bytes.
    pub memory: u64,
    /// Boots so far.
    pub boots: u64,
    /// Nanoseconds from the process's start to the first entry of a vCPU.
    pub first_entry_ns: Option<u64>,
}

/// Counters of one assigned function.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStats {
    /// Exits by BAR and 4 KiB page: `"0:1"` is page 1 of BAR 0. Pages without an exit are absent.
    pub bar_exits: BTreeMap<String, u64>,
    /// Configuration space accesses.
    pub config_exits: u64,
    /// Counters of the mailbox relay, if there is one.
    #[serde(default)]
    pub relay: Option<RelayStats>,
}

/// A question of the vmm.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "snake_case")]
pub enum Ask {
    /// A guest's VF driver wants something of the PF.
    Mailbox {
        /// The adapter's name in the machine's specification.
        adapter: String,
        /// What it wants.
        question: Question,
    },
}

/// The agent's answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum Answer {
    /// To [`Ask::Mailbox`].
    Mailbox {
        /// The adapter's name in the machine's specification.
        adapter: String,
        /// The decision.
        verdict: Verdict,
    },
}
