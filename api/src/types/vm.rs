// SPDX-License-Identifier: Apache-2.0

//! Virtual machines.

use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::{
    Bdf, ByteSize, CloudInitSpec, CpuFeatures, Credentials, DiskSpec, HugePages, Initramfs, Name, NicSpec,
    NicStatus, PlacementSpec, PlacementStatus, RestartPolicy, RestartStatus, Timestamp, Unchecked,
    UnicastMac, VmLease, VmOperation, placement, ranges,
};
use crate::problem::{Problem, ProblemCode};

/// A virtual machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Vm {
    /// Immutable; never used again.
    pub id: Uuid,
    /// Unique among the VMs that exist.
    pub name: Name,
    /// One more for each change of the specification.
    pub revision: u64,
    /// When it was created.
    pub created: Timestamp,
    /// The requested state.
    pub spec: VmSpec,
    /// The actual state.
    pub status: VmStatus,
}

/// A VM's specification.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// Unique among the VMs that exist.
    pub name: Name,
    /// vCPUs.
    #[serde(default = "one_cpu", deserialize_with = "ranges::cpus")]
    #[schema(minimum = 1, maximum = 254, default = 1)]
    pub cpus: u8,
    /// Guest memory: at least 2 MiB, a multiple of 2 MiB.
    pub memory: ByteSize,
    /// Backs guest memory with huge pages: `true` or `"2MiB"` for pages of 2 MiB, `"1GiB"` for pages of 1 GiB, of which `memory`
    /// must then be a multiple. An answer has `true` for pages of 2 MiB.
    #[serde(default)]
    #[schema(value_type = HugePages, default = false)]
    pub hugepages: HugePages,
    /// The files that it boots, and the kernel's command line.
    pub boot: BootSpec,
    /// Network adapters: VFs under policy. At most 16 together with `devices`.
    #[serde(default)]
    #[schema(max_items = 16)]
    pub adapters: Vec<AdapterSpec>,
    /// Other VFIO functions, which get no port: those that the agent's operator lets VMs have (`serve --assignable`).
    #[serde(default)]
    #[schema(max_items = 16, value_type = std::collections::BTreeSet<super::schema::DeviceBdf>)]
    pub devices: Vec<Bdf>,
    /// Disks. At most 31 together with `adapters`, `devices`, `nics`, `entropy` and `cloud_init`: the slots of the guest's
    /// bus.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(max_items = 16)]
    pub disks: Vec<DiskSpec>,
    /// NICs: virtio network devices, for management and for traffic that needs no VF.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(max_items = 8)]
    pub nics: Vec<NicSpec>,
    /// The guest has a source of random numbers (virtio-rng).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub entropy: bool,
    /// The texts that cloud-init reads in the guest. They may be changed while the VM runs: for its next boot by the agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cloud_init: Option<CloudInitSpec>,
    /// Credentials for systemd in the guest, by their names, in the SMBIOS tables: at most 32, and 32 KiB of names and values
    /// together. A value can be any text. An answer has `(hidden)` in place of each value; in a request, `(hidden)` keeps the
    /// stored one. They may be changed while the VM runs: for its next boot by the agent.
    #[serde(default, skip_serializing_if = "Credentials::is_empty")]
    #[schema(value_type = std::collections::BTreeMap<String, String>)]
    pub credentials: Credentials,
    /// The reaction to its end, unless a request ended it. It may be changed while the VM runs.
    #[serde(default, skip_serializing_if = "RestartPolicy::is_default")]
    pub restart: RestartPolicy,
    /// It is booted when the agent starts, unless it runs, or was stopped by a request or by its guest since the host was
    /// started. It may be changed while the VM runs.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub autostart: bool,
    /// The limits of its process on the host. Without them it may use all free processor time, and memory up to a default: the
    /// guest's and a sixteenth of it, 64 MiB, 1 MiB for each CPU, 4 MiB for each function, 16 MiB for each disk, with that of `cloud_init`, and 128 MiB for `boot.disk`.
    #[serde(default, deserialize_with = "limits_if_any", skip_serializing_if = "Option::is_none")]
    pub limits: Option<VmLimits>,
    /// Its place on the host: the CPUs of its threads, and the NUMA node of its memory. Without it the host's kernel chooses.
    #[serde(default, deserialize_with = "placement::if_any", skip_serializing_if = "Option::is_none")]
    pub placement: Option<PlacementSpec>,
    /// Features of its CPUs that are off by default.
    #[serde(default, skip_serializing_if = "CpuFeatures::is_default")]
    pub cpu_features: CpuFeatures,
}

/// Limits of a VM's process on its host (control groups, version 2).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmLimits {
    /// Most processor time, in percent of one CPU (`cpu.max`).
    #[serde(default, deserialize_with = "ranges::cpu_percent", skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 100_000, example = 150)]
    pub cpu_percent: Option<u32>,
    /// Its share of the processor time when that does not suffice for all: others have 100 (`cpu.weight`).
    #[serde(default, deserialize_with = "ranges::cpu_weight", skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 10_000, example = 50)]
    pub cpu_weight: Option<u16>,
    /// Most memory, with the guest's (`memory.max`): at least the guest's and 32 MiB. A process that needs more is killed.
    /// Without it there is a default, that of a VM without limits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "1088MiB")]
    pub memory: Option<ByteSize>,
}

/// Limits that limit nothing are none: no control group is needed for them.
fn limits_if_any<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<VmLimits>, D::Error> {
    let limits = Option::<VmLimits>::deserialize(deserializer)?;
    Ok(limits.filter(|limits| *limits != VmLimits::default()))
}

/// The bytes that [`VmLimits::memory`] must leave beside the guest's memory, for the process and for the kernel's data about
/// it.
const BESIDE_MEMORY: u64 = 32 << 20;

fn one_cpu() -> u8 {
    1
}

/// The kernel that a VM boots, from a file of the host (`kernel`) or from one of its disks (`disk`), and its command line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BootSpec {
    /// The kernel's file: bzImage, or ELF for x86-64, which starts at its PVH entry, or at its 64-bit entry without one. A relative
    /// path is looked up in the agent's image directories. Required without `disk`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "vmlinuz")]
    pub kernel: Option<String>,
    /// The id of one of the VM's disks, in place of `kernel`: the VM boots the kernel and the initramfs that its guest has installed
    /// there. Each boot and each reboot looks for them again, so that a kernel upgrade in the guest takes effect.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<Name>,
    /// The initramfs file, or a list of at most 16: the kernel unpacks one after the other. Not with `disk`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "initrd.img")]
    pub initramfs: Option<Initramfs>,
    /// The kernel's command line, at most 2047 bytes: Linux has no room for more. With `disk` it comes behind the command line of
    /// the disk's boot entry.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schema(example = "console=ttyS0")]
    pub cmdline: String,
}

/// A network adapter of a VM: a VF under the policy of a port group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AdapterSpec {
    /// Unique within the VM.
    #[schema(example = "eth0")]
    pub id: Name,
    /// The port group of its policy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port_group: Option<Name>,
    /// The initial address; the agent makes a stable locally administered one if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<UnicastMac>,
    /// The VF; the agent picks a free one if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vf: Option<Bdf>,
}

/// The most adapters and devices that a VM has together.
pub const MAX_FUNCTIONS: usize = 16;

/// The slots of the guest's bus beside that of the host bridge.
const MAX_SLOTS: usize = 31;

/// The longest kernel command line in bytes: COMMAND_LINE_SIZE of x86 Linux, less its end.
pub const MAX_CMDLINE: usize = 2047;

/// The longest path of a file in bytes: PATH_MAX of Linux, less its end.
const MAX_PATH: usize = 4095;

const MEMORY_STEP: u64 = 2 << 20;

impl VmSpec {
    /// The rules that types cannot hold.
    ///
    /// # Errors
    /// `invalid_request` with the field of the first rule that is broken.
    pub fn check(&self) -> Result<(), Problem> {
        if !(1..=254).contains(&self.cpus) {
            return Err(Problem::invalid(
                "cpus",
                format!("{} is not a number of vCPUs from 1 to 254.", self.cpus),
            ));
        }
        if self.memory.bytes() == 0 || !self.memory.bytes().is_multiple_of(MEMORY_STEP) {
            let detail = format!("{} is not a multiple of 2MiB above 0.", self.memory);
            return Err(Problem::invalid("memory", detail));
        }
        placement::check_pages(self.hugepages, self.memory)?;
        if let Some(placement) = &self.placement {
            placement::check(placement, self.cpus)?;
        }
        self.check_kernel()?;
        if let Some(initramfs) = &self.boot.initramfs {
            super::initramfs::check(initramfs)?;
        }
        if self.boot.cmdline.len() > MAX_CMDLINE {
            let size = self.boot.cmdline.len();
            let detail = format!("The command line has {size} bytes, and Linux takes at most {MAX_CMDLINE}.");
            return Err(Problem::invalid("boot.cmdline", detail));
        }
        if self.boot.cmdline.bytes().any(|byte| byte.is_ascii_control()) {
            let detail = "A command line is one line, without newlines, tabs and other control characters. (A text block of \
                          YAML ends in a newline: write `>-` in place of `>`.)";
            return Err(Problem::invalid("boot.cmdline", detail));
        }
        self.check_limits()?;
        self.check_functions()?;
        super::disk::check(&self.disks)?;
        super::nic::check(&self.nics)?;
        if let Some(seed) = &self.cloud_init {
            super::cloud_init::check(seed, &self.disks)?;
        }
        super::credential::check(&self.credentials)?;
        let functions = self.adapters.len().saturating_add(self.devices.len());
        let others = usize::from(self.entropy).saturating_add(self.cloud_init.is_some().into());
        let virtio = self.disks.len().saturating_add(self.nics.len()).saturating_add(others);
        if functions.saturating_add(virtio) > MAX_SLOTS {
            let detail = format!(
                "A VM has at most {MAX_SLOTS} adapters, devices, disks and NICs together with its source of entropy and \
                 the disk of cloud_init."
            );
            return Err(Problem::invalid("disks", detail));
        }
        Ok(())
    }

    fn check_kernel(&self) -> Result<(), Problem> {
        match (&self.boot.kernel, &self.boot.disk) {
            (Some(kernel), None) => check_path("boot.kernel", kernel),
            (None, None) => {
                let detail = "A VM boots a file of the host (`kernel`), or the kernel on one of its disks (`disk`): name one.";
                Err(Problem::invalid("boot.kernel", detail))
            }
            (Some(_), Some(_)) => {
                let detail = "A VM boots either a file of the host (`kernel`) or the kernel on a disk (`disk`): leave one out.";
                Err(Problem::invalid("boot.disk", detail))
            }
            (None, Some(id)) if !self.disks.iter().any(|disk| disk.id == *id) => {
                let detail = format!("The VM has no disk {id}: name one of `disks` by its id.");
                Err(Problem::invalid("boot.disk", detail))
            }
            (None, Some(_)) if self.boot.initramfs.is_some() => {
                let detail = "With `disk` the guest's own initramfs is used: leave `initramfs` out, or name a `kernel`.";
                Err(Problem::invalid("boot.initramfs", detail))
            }
            (None, Some(_)) => Ok(()),
        }
    }

    fn check_limits(&self) -> Result<(), Problem> {
        let Some(limits) = &self.limits else { return Ok(()) };
        if let Some(percent) = limits.cpu_percent.filter(|percent| !(1..=100_000).contains(percent)) {
            let detail = format!("{percent} is not from 1 to 100000 percent of a CPU.");
            return Err(Problem::invalid("limits.cpu_percent", detail));
        }
        if let Some(weight) = limits.cpu_weight.filter(|weight| !(1..=10_000).contains(weight)) {
            return Err(Problem::invalid("limits.cpu_weight", format!("{weight} is not from 1 to 10000.")));
        }
        let least = self.memory.bytes().saturating_add(BESIDE_MEMORY);
        if let Some(memory) = limits.memory.filter(|memory| memory.bytes() < least) {
            let detail = format!("{memory} is less than the guest's memory plus 32MiB.");
            return Err(Problem::invalid("limits.memory", detail));
        }
        Ok(())
    }

    fn check_functions(&self) -> Result<(), Problem> {
        if self.functions() > MAX_FUNCTIONS {
            let detail = format!(
                "A VM has at most {MAX_FUNCTIONS} adapters, devices and NICs of port groups together."
            );
            return Err(Problem::invalid("adapters", detail));
        }
        self.check_ports()?;
        // At most 16: comparing each with those before it is fine, and finds the second one's place.
        for (n, adapter) in self.adapters.iter().enumerate() {
            if let Some(vf) =
                adapter.vf.filter(|vf| self.adapters.iter().take(n).any(|other| other.vf == Some(*vf)))
            {
                let detail = format!("The VF {vf} is used by two adapters.");
                return Err(Problem::invalid(format!("adapters[{n}].vf"), detail));
            }
        }
        for (n, device) in self.devices.iter().enumerate() {
            let twice = self.devices.iter().take(n).any(|other| other == device);
            if twice || self.adapters.iter().any(|adapter| adapter.vf == Some(*device)) {
                let detail = format!("The device {device} is named twice.");
                return Err(Problem::invalid(format!("devices[{n}]"), detail));
            }
        }
        Ok(())
    }
}

pub(super) fn check_path(field: &str, path: &str) -> Result<(), Problem> {
    if path.is_empty() || path.len() > MAX_PATH || path.contains('\0') {
        let detail = format!("A path has 1 to {MAX_PATH} bytes and no NUL.");
        return Err(Problem::invalid(field, detail));
    }
    Ok(())
}

/// The states of a VM's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// Created, never booted; it holds nothing of the host.
    Defined,
    /// Devices are being claimed and the machine is being built.
    Starting,
    /// vCPUs run.
    Running,
    /// vCPUs are stopped and can go on.
    Paused,
    /// Devices are being reset before the next boot.
    Rebooting,
    /// The machine ends and its devices are being given back.
    Stopping,
    /// It has ended as it should; it can be booted again.
    Stopped,
    /// It has ended as it should not, or could not be booted; it can be booted again.
    Failed,
}

impl VmState {
    /// The name on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            VmState::Defined => "defined",
            VmState::Starting => "starting",
            VmState::Running => "running",
            VmState::Paused => "paused",
            VmState::Rebooting => "rebooting",
            VmState::Stopping => "stopping",
            VmState::Stopped => "stopped",
            VmState::Failed => "failed",
        }
    }

    /// Whether the VM has no process and holds nothing of the host.
    pub fn is_at_rest(self) -> bool {
        matches!(self, VmState::Defined | VmState::Stopped | VmState::Failed)
    }
}

impl std::fmt::Display for VmState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

/// The actual state of a VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VmStatus {
    /// The state in its life.
    pub state: VmState,
    /// The time at which it entered this state.
    pub since: Timestamp,
    /// The reason for its end, for the refusal of its last boot, or for a pause that no request has caused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<Cause>,
    /// The operation that is under way, if it takes time. No event reports its progress: read it again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation: Option<VmOperation>,
    /// Its process, while there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// Boots and reboots of the process that is running, or ran last.
    pub boots: u64,
    /// The agent's restarts of it, past and planned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restart: Option<RestartStatus>,
    /// The lease that it lives by; absent for a VM without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<VmLease>,
    /// Adapters, in the specification's order.
    pub adapters: Vec<AdapterStatus>,
    /// Devices, in the specification's order.
    pub devices: Vec<DeviceStatus>,
    /// NICs, in the specification's order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nics: Vec<NicStatus>,
    /// The console log.
    pub console: ConsoleStatus,
    /// The protections of the host from its process.
    #[serde(default)]
    pub sandbox: SandboxStatus,
    /// Its place on the host, while a VM with `placement` or `hugepages` has a process. Only the response of
    /// `GET /v1/vms/{name}` has it: lists and the responses of other calls do not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub placement: Option<PlacementStatus>,
}

/// The protections of the host from a VM's process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SandboxStatus {
    /// Protections that are off: since the agent is not root and cannot set them up, or since an option turned them off
    /// (`serve --sandbox-off`). With functions of the host none are off.
    pub off: Vec<Protection>,
}

/// A protection of the host from a VM's process, which its guest may take over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Protection {
    /// A user of its own, without capabilities. Without it the process has the rights of the agent's user: over the agent's
    /// files, and over the processes of other VMs.
    OwnUser,
    /// Network, IPC and host name namespaces of its own. Without them the process can use the host's network.
    Namespaces,
    /// An empty root directory, in a mount namespace of its own. Without it the process sees the host's files.
    EmptyRoot,
    /// Limits on files, threads and lockable memory. Without them the process has those of the agent.
    Limits,
    /// Filters for the system calls of each thread. Without them the process can make every system call of its user.
    Seccomp,
    /// Landlock: no file that is not open, no TCP, no abstract socket and no signal to others, whatever the user's rights.
    Landlock,
}

impl Protection {
    /// Every protection.
    pub const ALL: [Protection; 6] = [
        Protection::OwnUser,
        Protection::Namespaces,
        Protection::EmptyRoot,
        Protection::Limits,
        Protection::Seccomp,
        Protection::Landlock,
    ];

    /// Those that only an agent that is root can set up.
    pub const OF_ROOT: [Protection; 3] = [Protection::OwnUser, Protection::Namespaces, Protection::EmptyRoot];

    /// The name on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Protection::OwnUser => "own_user",
            Protection::Namespaces => "namespaces",
            Protection::EmptyRoot => "empty_root",
            Protection::Limits => "limits",
            Protection::Seccomp => "seccomp",
            Protection::Landlock => "landlock",
        }
    }
}

/// The cause of a VM's end or of a device's loss.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Cause {
    /// Stable code.
    pub code: CauseCode,
    /// The problem, if a problem's code says more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<ProblemCode>,
    /// The thing, the cause and the cure.
    pub detail: String,
}

/// Stable codes of causes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum CauseCode {
    /// The guest powered off.
    PoweredOff,
    /// A request stopped it.
    Stopped,
    /// It could not be booted; `problem` has the cause.
    BootFailed,
    /// The machine could not go on (for instance: an instruction that KVM cannot run).
    MachineFailed,
    /// The VM's process ended without a report.
    VmmCrashed,
    /// The VM's process violated its protocol with the agent, as only a process does that its guest has taken over, and was
    /// killed for it.
    VmmMisbehaved,
    /// The host took a device back.
    VfRemoved,
    /// A device reported an error that it cannot recover from.
    DeviceFailed,
    /// The host was restarted.
    HostRestarted,
    /// The file system of a disk is full. The VM is paused, and goes on when there is room.
    DiskFull,
}

/// The actual state of an adapter. Fields of the VF are present while the VM holds one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AdapterStatus {
    /// The adapter's id.
    pub id: Name,
    /// The initial address: that of the specification, or one that the agent chose. The status of the adapter's port has the
    /// effective address.
    pub mac: UnicastMac,
    /// The PF's interface.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pf: Option<String>,
    /// The VF's PCI address on the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vf: Option<Bdf>,
    /// The VF's number on its PF, from 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vf_index: Option<u32>,
    /// The VF's IOMMU group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iommu_group: Option<u32>,
    /// The cause, if the running guest has lost it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lost: Option<Cause>,
    /// The time since which the adapter's port cannot be compared with its PF, and the reason: foreign changes are not repaired
    /// meanwhile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unchecked: Option<Unchecked>,
}

/// The actual state of a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DeviceStatus {
    /// The host's PCI address.
    pub bdf: Bdf,
    /// Its IOMMU group, while the VM holds it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iommu_group: Option<u32>,
    /// The cause, if the running guest has lost it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lost: Option<Cause>,
}

/// The serial console's log: a bounded window on all that the guest wrote.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ConsoleStatus {
    /// Offset of the oldest byte that is kept.
    pub start: u64,
    /// Count of bytes ever written: the offset of the next one.
    pub end: u64,
}

/// The number of bytes that the guest's serial port took.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ConsoleTaken {
    /// Bytes, from the front of those that were sent.
    pub taken: usize,
}

/// The actions on a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum VmAction {
    /// Claims devices, builds the machine, runs it.
    Boot,
    /// Stops the vCPUs; the guest can go on.
    Pause,
    /// Lets a paused guest go on.
    Resume,
    /// Resets the machine and boots it again.
    Reboot,
    /// Presses the ACPI power button; done when the guest has powered off.
    Shutdown,
    /// Ends the machine at once.
    Stop,
}

impl VmAction {
    /// Every action.
    pub const ALL: [VmAction; 6] = [
        VmAction::Boot,
        VmAction::Pause,
        VmAction::Resume,
        VmAction::Reboot,
        VmAction::Shutdown,
        VmAction::Stop,
    ];

    /// The last segment of its path.
    pub fn as_str(self) -> &'static str {
        match self {
            VmAction::Boot => "boot",
            VmAction::Pause => "pause",
            VmAction::Resume => "resume",
            VmAction::Reboot => "reboot",
            VmAction::Shutdown => "shutdown",
            VmAction::Stop => "stop",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_boots_a_file_or_a_disk_of_its_own() {
        let check = |boot: serde_json::Value| {
            let disk = serde_json::json!({ "id": "root", "path": "root.raw", "format": "raw" });
            let spec = serde_json::json!({ "name": "web1", "memory": "2MiB", "boot": boot, "disks": [disk] });
            let spec: VmSpec = serde_json::from_value(spec).unwrap();
            assert_eq!(serde_json::to_value(&spec.boot).unwrap(), boot, "no member is added");
            spec.check().err().map(|problem| problem.field.unwrap().into_string())
        };
        for (boot, wrong) in [
            (serde_json::json!({ "kernel": "k" }), None),
            (serde_json::json!({ "kernel": "k", "initramfs": "i", "cmdline": "quiet" }), None),
            (serde_json::json!({ "disk": "root" }), None),
            (serde_json::json!({ "disk": "root", "cmdline": "console=ttyS0" }), None),
            (serde_json::json!({}), Some("boot.kernel")),
            (serde_json::json!({ "disk": "root", "kernel": "k" }), Some("boot.disk")),
            (serde_json::json!({ "disk": "data" }), Some("boot.disk")),
            (serde_json::json!({ "disk": "root", "initramfs": "i" }), Some("boot.initramfs")),
        ] {
            assert_eq!(check(boot.clone()).as_deref(), wrong, "{boot}");
        }
    }

    #[test]
    fn limits_without_a_value_are_none() {
        let spec = |limits: serde_json::Value| -> VmSpec {
            let boot = serde_json::json!({ "kernel": "k" });
            let spec =
                serde_json::json!({ "name": "web1", "memory": "2MiB", "boot": boot, "limits": limits });
            serde_json::from_value(spec).unwrap()
        };
        assert_eq!(spec(serde_json::json!({})).limits, None);
        assert_eq!(spec(serde_json::Value::Null).limits, None);
        let weight = Some(VmLimits { cpu_weight: Some(50), ..VmLimits::default() });
        assert_eq!(spec(serde_json::json!({ "cpu_weight": 50 })).limits, weight);
    }
}
