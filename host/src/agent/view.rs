// SPDX-License-Identifier: Apache-2.0

//! The agent's objects as the API shows them.

use std::path::Path;

use api::types::{
    AdapterStatus, ConsoleStatus, DeviceStatus, NicStatus, Owner, PlacementStatus, Protection, RestartStatus,
    SandboxStatus, Unchecked, UnicastMac, Vm, VmDeviceStats, VmDiskStats, VmNicStats, VmStats, VmStatus,
    WantedPort,
};
use services::{console, vmm_process::VmDirectory};

use crate::vm::{
    VmHandle,
    record::{Claim, ports},
};
use crate::{nics, placement};

/// A VM without its place. `off` are the protections that new processes of this agent lack; `unchecked` looks up an adapter's port.
pub(super) fn vm(
    handle: &VmHandle,
    directory: &VmDirectory,
    off: &[Protection],
    unchecked: impl Fn(&str) -> Option<Unchecked>,
) -> Vm {
    let status = handle.status();
    let record = handle.record();
    let spec = &record.value.spec;
    let lost = |bdf: &str| status.run.lost.get(bdf).cloned();
    let port = |(wanted, mac): (WantedPort<'_>, UnicastMac)| {
        let id = wanted.id;
        let held = status.held.iter().find_map(|claim| {
            claim.value.adapter.as_ref().filter(|vf| vf.id == *id).map(|vf| (&claim.value, vf))
        });
        let named = wanted.vf.and_then(|vf| lost(&vf.to_string()));
        AdapterStatus {
            id: id.clone(),
            mac,
            pf: held.map(|(_, vf)| vf.pf_name.clone()),
            vf: held.and_then(|(claim, _)| claim.bdf.to_string().parse().ok()),
            vf_index: held.map(|(_, vf)| u32::from(vf.index)),
            iommu_group: held.and_then(|(claim, _)| claim.group),
            lost: held.and_then(|(claim, _)| lost(&claim.bdf.to_string())).or(named),
            unchecked: unchecked(id.as_str()),
        }
    };
    let (of_nics, of_adapters): (Vec<_>, Vec<_>) = ports(record.id, spec).partition(|(port, _)| port.is_nic);
    let (adapters, mut of_nics) = (of_adapters.into_iter().map(&port), of_nics.into_iter().map(&port));
    let devices = spec.devices.iter().map(|bdf| {
        let held = status.held.iter().find(|claim| claim.name == bdf.to_string());
        DeviceStatus {
            bdf: *bdf,
            iommu_group: held.and_then(|claim| claim.value.group),
            lost: lost(&bdf.to_string()),
        }
    });
    // A process that runs may be one of an agent that could do more, or less.
    let off = match (&status.run.process, &status.run.off) {
        (None, _) => off.to_vec(),
        (Some(_), Some(off)) => off.clone(),
        // Of a release that had users of their own with all that comes with them, and no more.
        (Some(_), None) => {
            let mut off = vec![Protection::Limits, Protection::Seccomp, Protection::Landlock];
            if status.run.user.is_none() {
                off.extend(Protection::OF_ROOT);
            }
            off
        }
    };
    let sandbox = SandboxStatus { off };
    let runs = status.run.process.is_some();
    let nics = spec.nics.iter().enumerate().map(|(number, nic)| NicStatus {
        id: nic.id.clone(),
        mac: nics::address(record.id, nic),
        interface: nics::interface(record.id, number, nic).filter(|_| runs),
        port: nic.port_group.as_ref().and_then(|_| of_nics.next()),
    });
    let console = console::Reader::open(&directory.console()).and_then(|ring| ring.count());
    Vm {
        id: record.id,
        name: spec.name.clone(),
        revision: record.revision,
        created: record.value.created,
        // No answer has a secret: this is the only place that makes one.
        spec: spec.masked(),
        status: VmStatus {
            state: status.run.state,
            since: status.run.since,
            cause: status.run.cause.clone(),
            operation: status.operation,
            pid: status.run.process.as_ref().and_then(|process| u32::try_from(process.pid).ok()),
            boots: status.run.boots,
            restart: Some(status.run.restart).filter(|restart| *restart != RestartStatus::default()),
            lease: status.lease,
            adapters: adapters.collect(),
            devices: devices.collect(),
            nics: nics.collect(),
            console: console.map_or_else(
                |_| ConsoleStatus::default(),
                |end| ConsoleStatus { start: end.saturating_sub(console::CAPACITY), end },
            ),
            sandbox,
            placement: None,
        },
    }
}

/// The actual place of a VM. It blocks: it reads files of `/proc` for each thread of the VM's process.
pub(super) fn placement(handle: &VmHandle) -> Option<PlacementStatus> {
    let (status, record) = (handle.status(), handle.record());
    let process = status.run.process.as_ref()?;
    let memory = status.run.memory_place.as_ref();
    placement::status(Path::new("/proc"), process.pid, &record.value.spec, memory)
}

/// Counters.
pub(super) fn stats(handle: &VmHandle, stats: protocol::Stats) -> VmStats {
    let held = handle.status().held;
    let adapter = |bdf: &str| {
        let claim = held.iter().find(|claim| claim.name == bdf)?;
        claim.value.adapter.as_ref().map(|vf| vf.id.to_string())
    };
    let devices = stats.devices.into_iter().map(|(bdf, device)| {
        let relay = device.relay.unwrap_or_default();
        let stats = VmDeviceStats {
            adapter: adapter(&bdf),
            bar_exits: device.bar_exits,
            config_exits: device.config_exits,
            mailbox: relay.messages,
            passed_reads: relay.passed.reads,
            passed_writes: relay.passed.writes,
        };
        (bdf, stats)
    });
    // A process that its guest has taken over may name any disks.
    let record = handle.record();
    let disks = record.value.spec.disks.iter().filter_map(|disk| {
        let counters = stats.disks.get(disk.id.as_str())?;
        Some((disk.id.to_string(), disk_stats(counters)))
    });
    let nics = record.value.spec.nics.iter().filter_map(|nic| {
        let counters = stats.nics.get(nic.id.as_str())?;
        Some((nic.id.to_string(), nic_stats(counters)))
    });
    VmStats {
        devices: devices.collect(),
        disks: disks.collect(),
        nics: nics.collect(),
        exits: stats.exits,
        memory: stats.memory,
        boots: stats.boots,
        first_entry_ns: stats.first_entry_ns,
    }
}

fn disk_stats(disk: &protocol::DiskStats) -> VmDiskStats {
    VmDiskStats {
        reads: disk.reads,
        writes: disk.writes,
        flushes: disk.flushes,
        discards: disk.discards,
        read_bytes: disk.read_bytes,
        written_bytes: disk.written_bytes,
        errors: disk.errors,
        busy_ns: disk.busy_ns,
    }
}

fn nic_stats(nic: &protocol::NicStats) -> VmNicStats {
    VmNicStats {
        received: nic.received,
        received_bytes: nic.received_bytes,
        sent: nic.sent,
        sent_bytes: nic.sent_bytes,
        dropped: nic.dropped,
        refused: nic.refused,
    }
}

/// Who holds a function.
pub(super) fn owner(claim: &Claim) -> Owner {
    Owner {
        vm: claim.vm,
        name: claim.vm_name.clone(),
        adapter: claim.adapter.as_ref().map(|vf| vf.id.to_string()),
    }
}
