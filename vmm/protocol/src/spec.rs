// SPDX-License-Identifier: Apache-2.0

//! The specification of a machine, which [`VmmCommand::Configure`](crate::VmmCommand::Configure) carries.

use netpolicy::MacAddress;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

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
    /// The number of initramfs files.
    pub initramfs: usize,
    /// The disk whose installed kernel the machine boots, by its name. Then no file of a kernel comes beside the command.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_disk: Option<String>,
    /// Functions, in the order of their slots on the guest's bus.
    pub devices: Vec<DeviceSpec>,
    /// Disks, in the order of their slots, behind those of the NICs.
    pub disks: Vec<DiskSpec>,
    /// NICs, in the order of their slots, behind those of the functions.
    pub nics: Vec<NicSpec>,
    /// Whether the guest has a source of random numbers.
    pub entropy: bool,
    /// The sandbox that the process enters after it has opened its devices.
    pub sandbox: SandboxSpec,
    /// The CPUs of its threads, and the node and pages of guest memory.
    #[serde(default, skip_serializing_if = "PlacementSpec::is_empty")]
    pub placement: PlacementSpec,
    /// Features of the guest's CPUs beyond the usual ones.
    #[serde(default, skip_serializing_if = "CpuFeatures::is_empty")]
    pub features: CpuFeatures,
}

/// CPUs of the host with numbers in a row: the first and the last one, 0 to 8191.
pub type CpuRange = (u16, u16);

/// The place of a machine on its host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlacementSpec {
    /// The CPUs of vCPUs' threads, by the vCPU's number. Other vCPUs run where the agent has started the process.
    #[serde(default)]
    pub cpus: Vec<(u8, Vec<CpuRange>)>,
    /// The CPUs of all other threads. Empty: they run where the agent has started the process.
    #[serde(default)]
    pub io_cpus: Vec<CpuRange>,
    /// The NUMA node of guest memory, 0 to 1023.
    #[serde(default)]
    pub node: Option<u16>,
    /// The huge pages of [`MachineSpec::hugepages`] have 1 GiB, not 2 MiB.
    #[serde(default)]
    pub giant_pages: bool,
}

impl PlacementSpec {
    /// Whether it says nothing: the machine is built without a system call for its place.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Features of the guest's CPUs that are off by default: both are large parts of KVM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuFeatures {
    /// Nested virtualization: VMX or SVM.
    #[serde(default)]
    pub nested: bool,
    /// Performance counters.
    #[serde(default)]
    pub pmu: bool,
}

impl CpuFeatures {
    /// Whether it has none of them.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// The most bytes of the tables of a qcow2 image with `size` bytes, whose clusters have 4 KiB or more. Agent and vmm raise the
/// limit on the length of the image's file by it.
#[must_use]
pub const fn qcow2_tables(size: u64) -> u64 {
    size / 32
}

/// One disk of a machine. Its file comes beside the command ([`files::disk`](super::files::disk)).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSpec {
    /// The disk's name.
    pub id: String,
    /// The format of the file. The vmm never guesses it.
    pub format: DiskFormat,
    /// The formats of its backing files, the next one first. Their files come beside the command
    /// ([`files::backing`](super::files::backing)).
    pub backing: Vec<DiskFormat>,
    /// The guest cannot write.
    pub read_only: bool,
    /// The file and its backing files are only read. The guest's writes go to an overlay in an empty file, which comes
    /// beside the command ([`files::overlay`](super::files::overlay)) and ends with the process.
    pub ephemeral: bool,
    /// The serial number in the guest: 20 bytes at most.
    pub serial: String,
    /// The guest may give the host's room back.
    pub discard: bool,
    /// Its limits at first.
    pub limits: DiskLimits,
    /// If the host's file system is full, the machine is paused, and the guest's requests wait for room. Else they fail.
    pub wait_for_room: bool,
}

/// The limits of a disk's requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskLimits {
    /// Bytes that move.
    #[serde(default)]
    pub bytes: Option<DiskRate>,
    /// Requests.
    #[serde(default)]
    pub operations: Option<DiskRate>,
}

/// A rate of a disk: `burst` at once, then `per_second`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRate {
    /// Tokens per second: 1 or more.
    pub per_second: u64,
    /// Tokens at once.
    pub burst: u64,
}

/// One NIC of a machine. The files of its interface come beside the command ([`files::nic`](super::files::nic)), unless a
/// [port](DeviceBackend::SimulatedPort) has its name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicSpec {
    /// The NIC's name.
    pub id: String,
    /// Its address.
    pub mac: MacAddress,
    /// The MTU that the guest uses.
    pub mtu: u16,
    /// Pairs of queues, 1 to 4: as many files. 0 for the NIC of a port.
    pub queues: u8,
}

/// The formats of disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskFormat {
    /// A file or a block device, byte for byte.
    Raw,
    /// QEMU's format.
    Qcow2,
}

/// One function of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceSpec {
    /// The host's PCI address, `dddd:bb:dd.f`.
    pub bdf: String,
    /// Hardware or a simulated VF.
    pub backend: DeviceBackend,
    /// The name of the adapter, if the function is a network VF under policy: then a relay stands in for its mailbox.
    /// None for plain devices.
    pub adapter: Option<String>,
}

/// The other side of a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceBackend {
    /// Hardware, by VFIO.
    Vfio {
        /// The IOMMU group's number (`/dev/vfio/N`).
        group: u32,
    },
    /// A simulated VF. Its connection to its PF comes beside the command.
    Simulated,
    /// A simulated VF behind the NIC that has the name of the adapter. The guest sees a virtio network device. The
    /// connection to its PF comes beside the command.
    SimulatedPort,
}

/// The steps by which the process gives up its privileges.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxSpec {
    /// The user id to become. None keeps the present one (an agent without root).
    pub uid: Option<u32>,
    /// The group id to become.
    pub gid: Option<u32>,
    /// Limits on the process: open files, threads, sizes of files.
    pub limits: bool,
    /// The process has its own namespaces: network, IPC, host name.
    pub namespaces: bool,
    /// An empty root, in a mount namespace of the process's own.
    pub empty_root: bool,
    /// A seccomp filter for each thread.
    pub seccomp: bool,
    /// Landlock: no file, no TCP port, no abstract socket, no signal to other processes.
    pub landlock: bool,
}

impl SandboxSpec {
    /// The parts that need no privilege and act on single threads: seccomp filters and Landlock. The process keeps
    /// its user, namespaces and root.
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
