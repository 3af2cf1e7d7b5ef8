// SPDX-License-Identifier: Apache-2.0

//! The metrics of each VM, built anew at each scrape from the VMs that exist.

use std::{collections::BTreeMap, sync::atomic::AtomicU64, time::Duration};

use api::types::{VmState, VmStats};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::{Registry, Unit},
};

use super::{PREFIX, Word};

/// The most exit reasons, or kinds of messages, that a VM's process may name. Ours names fewer; a
/// process that its guest has taken over may name anything.
const KINDS: usize = 64;

/// The name under which counts beyond that, or with odd names, are summed.
const OTHER: &str = "other";

/// A VM as metrics show it.
#[derive(Clone, Debug)]
pub struct Vm {
    /// Its name.
    pub name: String,
    /// Its state.
    pub state: VmState,
    /// Resident memory of its process in bytes, guest memory included; None without a process.
    pub resident: Option<u64>,
    /// The counters of its process; None if it does not answer.
    pub stats: Option<VmStats>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfState {
    state: Word,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfVm {
    vm: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfExit {
    vm: String,
    reason: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfMessage {
    vm: String,
    opcode: String,
    verdict: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfAccess {
    vm: String,
    access: Word,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfDisk {
    vm: String,
    disk: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfDiskRequest {
    vm: String,
    disk: String,
    operation: Word,
}

/// The series of disks.
#[derive(Default)]
struct Disks {
    requests: Family<OfDiskRequest, Counter>,
    bytes: Family<OfDiskRequest, Counter>,
    errors: Family<OfDisk, Counter>,
    busy: Family<OfDisk, Counter<f64, AtomicU64>>,
}

impl Disks {
    fn add(&self, vm: &str, stats: &VmStats) {
        for (disk, counters) in &stats.disks {
            let of = || OfDisk { vm: vm.to_owned(), disk: disk.clone() };
            let request = |operation| OfDiskRequest {
                vm: vm.to_owned(),
                disk: disk.clone(),
                operation: Word(operation),
            };
            for (operation, count) in [
                ("read", counters.reads),
                ("write", counters.writes),
                ("flush", counters.flushes),
                ("discard", counters.discards),
            ] {
                self.requests.get_or_create(&request(operation)).inc_by(count);
            }
            for (operation, count) in [("read", counters.read_bytes), ("write", counters.written_bytes)] {
                self.bytes.get_or_create(&request(operation)).inc_by(count);
            }
            self.errors.get_or_create(&of()).inc_by(counters.errors);
            let busy = Duration::from_nanos(counters.busy_ns).as_secs_f64();
            self.busy.get_or_create(&of()).inc_by(busy);
        }
    }

    fn register(self, registry: &mut Registry) {
        registry.register("vm_disk_requests", "Requests of guests to their disks", self.requests);
        registry.register_with_unit("vm_disk_transferred", "Data of these requests", Unit::Bytes, self.bytes);
        registry.register("vm_disk_errors", "Requests that the host's file failed", self.errors);
        let help = "Time in which the host's file was busy with requests";
        registry.register_with_unit("vm_disk_busy", help, Unit::Seconds, self.busy);
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfNic {
    vm: String,
    nic: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfNicDirection {
    vm: String,
    nic: String,
    direction: Word,
}

/// The series of NICs.
#[derive(Default)]
struct Nics {
    frames: Family<OfNicDirection, Counter>,
    bytes: Family<OfNicDirection, Counter>,
    dropped: Family<OfNic, Counter>,
    refused: Family<OfNic, Counter>,
}

impl Nics {
    fn add(&self, vm: &str, stats: &VmStats) {
        for (nic, counters) in &stats.nics {
            let of = || OfNic { vm: vm.to_owned(), nic: nic.clone() };
            for (direction, frames, bytes) in [
                ("received", counters.received, counters.received_bytes),
                ("sent", counters.sent, counters.sent_bytes),
            ] {
                let direction = Word(direction);
                let of = OfNicDirection { vm: vm.to_owned(), nic: nic.clone(), direction };
                self.frames.get_or_create(&of).inc_by(frames);
                self.bytes.get_or_create(&of).inc_by(bytes);
            }
            self.dropped.get_or_create(&of()).inc_by(counters.dropped);
            self.refused.get_or_create(&of()).inc_by(counters.refused);
        }
    }

    fn register(self, registry: &mut Registry) {
        registry.register("vm_nic_frames", "Frames of guests' NICs", self.frames);
        registry.register_with_unit("vm_nic_transferred", "Data of these frames", Unit::Bytes, self.bytes);
        registry.register("vm_nic_dropped_frames", "Frames that host or guest did not take", self.dropped);
        registry.register("vm_nic_refused_requests", "Refused requests of NICs' drivers", self.refused);
    }
}

/// Every state, so that each has a series while no VM is in it, too.
const STATES: [VmState; 8] = [
    VmState::Defined,
    VmState::Starting,
    VmState::Running,
    VmState::Paused,
    VmState::Rebooting,
    VmState::Stopping,
    VmState::Stopped,
    VmState::Failed,
];

pub(super) fn registry(vms: &[Vm]) -> Registry {
    let mut registry = Registry::with_prefix(PREFIX);
    let states = Family::<OfState, Gauge>::default();
    let memory = Family::<OfVm, Gauge>::default();
    let resident = Family::<OfVm, Gauge>::default();
    let exits = Family::<OfExit, Counter>::default();
    let boots = Family::<OfVm, Counter>::default();
    let messages = Family::<OfMessage, Counter>::default();
    let passed = Family::<OfAccess, Counter>::default();
    let (disks, nics) = (Disks::default(), Nics::default());
    for state in STATES {
        drop(states.get_or_create(&OfState { state: Word(state.as_str()) }));
    }
    for vm in vms {
        states.get_or_create(&OfState { state: Word(vm.state.as_str()) }).inc();
        let of_vm = OfVm { vm: vm.name.clone() };
        if let Some(bytes) = vm.resident {
            resident.get_or_create(&of_vm).set(signed(bytes));
        }
        let Some(stats) = &vm.stats else { continue };
        memory.get_or_create(&of_vm).set(signed(stats.memory));
        boots.get_or_create(&of_vm).inc_by(stats.boots);
        for (reason, count) in bounded(&stats.exits) {
            exits.get_or_create(&OfExit { vm: vm.name.clone(), reason }).inc_by(count);
        }
        disks.add(&vm.name, stats);
        nics.add(&vm.name, stats);
        for device in stats.devices.values() {
            for (access, count) in [("read", device.passed_reads), ("write", device.passed_writes)] {
                let of = OfAccess { vm: vm.name.clone(), access: Word(access) };
                passed.get_or_create(&of).inc_by(count);
            }
        }
        let mut all = BTreeMap::new();
        for (kind, count) in stats.devices.values().flat_map(|device| &device.mailbox) {
            let sum: &mut u64 = all.entry(kind.clone()).or_default();
            *sum = sum.saturating_add(*count);
        }
        for (kind, count) in bounded(&all) {
            let (opcode, verdict) = kind.split_once(':').unwrap_or((&kind, OTHER));
            let (opcode, verdict) = (opcode.to_owned(), verdict.to_owned());
            messages.get_or_create(&OfMessage { vm: vm.name.clone(), opcode, verdict }).inc_by(count);
        }
    }
    registry.register("vms", "VMs by state", states);
    registry.register_with_unit("vm_memory", "Guest memory of running VMs", Unit::Bytes, memory);
    registry.register_with_unit(
        "vm_process_resident_memory",
        "Resident memory of VMs' processes, guest memory included",
        Unit::Bytes,
        resident,
    );
    registry.register("vm_boots", "Boots and reboots of a VM's process", boots);
    registry.register("vm_exits", "KVM exits to user space of all vCPUs", exits);
    disks.register(&mut registry);
    nics.register(&mut registry);
    registry.register(
        "vm_passed_accesses",
        "Accesses to registers that share the page of an adapter's mailbox",
        passed,
    );
    registry.register("vm_mailbox_messages", "Mailbox messages of a VM's adapters", messages);
    registry
}

/// The counts of a process, under names that could be from a closed set of ours.
fn bounded(counts: &BTreeMap<String, u64>) -> BTreeMap<String, u64> {
    let plain = |name: &str| {
        (1..=48).contains(&name.len())
            && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'_' | b':'))
    };
    let mut bounded = BTreeMap::new();
    for (name, count) in counts {
        let kept = plain(name) && bounded.len() < KINDS;
        let sum: &mut u64 = bounded.entry(if kept { name.clone() } else { OTHER.to_owned() }).or_default();
        *sum = sum.saturating_add(*count);
    }
    bounded
}

fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}
