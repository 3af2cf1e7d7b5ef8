// SPDX-License-Identifier: Apache-2.0

//! The place of VMs: huge pages, NUMA nodes, and features of CPUs that VMs have only if they ask for them.

use api::types::CpuList;
use sriov::Pf;

use super::{Finding, Host, Verdict};

pub(super) fn hugepages(host: &Host) -> Finding {
    const FIX: &str = "sysctl -w vm.nr_hugepages=512 && echo vm.nr_hugepages=512 >/etc/sysctl.d/60-hugepages.conf  # 512 are 1 GiB";
    pool(host, "hugepages", 2, "no huge pages of 2 MiB: VMs with `hugepages` cannot be booted", FIX)
}

pub(super) fn giant_pages(host: &Host) -> Finding {
    const CHECK: &str = "hugepages_1gib";
    const FIX: &str = "echo 4 >/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages  # soon after the host's start: later \
                       there may be no whole GiB";
    if !host.has("sys/kernel/mm/hugepages/hugepages-1048576kB") {
        let found = "the processor or the kernel has none: VMs with `hugepages = \"1GiB\"` cannot be booted";
        return Finding::ok(CHECK, found);
    }
    let none = "no huge pages of 1 GiB: VMs with `hugepages = \"1GiB\"` cannot be booted";
    pool(host, CHECK, 1024, none, FIX)
}

/// The host's pool of huge pages of `mib` MiB. `none` is the loss without any, and `fix` makes some.
fn pool(host: &Host, check: &'static str, mib: u64, none: &str, fix: &str) -> Finding {
    let pool = format!("sys/kernel/mm/hugepages/hugepages-{}kB", mib << 10);
    let count = |name: &str| host.number(&format!("{pool}/{name}")).unwrap_or(0);
    match (count("nr_hugepages"), count("free_hugepages")) {
        (0, _) => Finding::wrong(Verdict::Warn, check, none, fix),
        (all, free) => {
            let size = if mib < 1024 { format!("{mib} MiB") } else { format!("{} GiB", mib >> 10) };
            let free_mib = free.saturating_mul(mib);
            Finding::ok(check, format!("{free} of {all} huge pages of {size} are free: {free_mib} MiB"))
        }
    }
}

/// Each NUMA node with its CPUs, its memory and its PFs.
pub(super) fn nodes(host: &Host, pfs: &[Pf]) -> Vec<Finding> {
    const CHECK: &str = "numa";
    let list = |path: &str| host.text(path).as_deref().and_then(CpuList::of_kernel);
    let Some(nodes) = list("sys/devices/system/node/online") else {
        return vec![Finding::ok(CHECK, "the kernel shows no NUMA nodes: `placement.numa` is not possible")];
    };
    let isolated = list("sys/devices/system/cpu/isolated");
    let one = |node: u16| {
        let directory = format!("sys/devices/system/node/node{node}");
        let cpus = list(&format!("{directory}/cpulist"));
        let text = match (&cpus, &isolated) {
            (None, _) => "no CPUs".to_owned(),
            (Some(cpus), None) => format!("CPUs {cpus}"),
            (Some(cpus), Some(isolated)) => match CpuList::of(common(cpus, isolated)) {
                Some(both) => format!("CPUs {cpus} (isolated: {both})"),
                None => format!("CPUs {cpus}"),
            },
        };
        let mut found = vec![text, memory(host, &directory)];
        let on_node = |pf: &&Pf| host.sysfs.numa_node(pf.device.bdf).is_ok_and(|found| found == Some(node));
        found.extend(pfs.iter().filter(on_node).map(Pf::name));
        Finding::ok(CHECK, found.join(", ")).of(&format!("node{node}"))
    };
    nodes.ranges().iter().flat_map(|(first, last)| *first..=*last).map(one).collect()
}

/// The numbers that two lists have in common.
fn common(one: &CpuList, other: &CpuList) -> Vec<(u16, u16)> {
    let numbers = one.ranges().iter().flat_map(|(first, last)| *first..=*last);
    numbers.filter(|number| other.contains(*number)).map(|number| (number, number)).collect()
}

/// The memory of a node.
fn memory(host: &Host, directory: &str) -> String {
    let text = host.text(&format!("{directory}/meminfo")).unwrap_or_default();
    let kib = text.split_once("MemTotal:").and_then(|(_, rest)| rest.split_once("kB"));
    match kib.and_then(|(kib, _)| kib.trim().parse::<u64>().ok()) {
        None | Some(0) => "no memory".to_owned(),
        Some(kib) => format!("{} MiB", kib >> 10),
    }
}

/// Nested virtualization, which is a parameter of KVM's module.
pub(super) fn nested(host: &Host) -> Finding {
    let on = ["kvm_intel", "kvm_amd"].into_iter().find(|module| {
        let nested = host.text(&format!("sys/module/{module}/parameters/nested"));
        nested.is_some_and(|nested| matches!(nested.as_str(), "1" | "Y"))
    });
    Finding::ok(
        "nested",
        match on {
            Some(module) => format!("{module} has it: VMs with `cpu_features.nested` can run VMs"),
            None => "KVM has it off (kvm_intel or kvm_amd, parameter nested): VMs with `cpu_features.nested` cannot be \
                     booted"
                .to_owned(),
        },
    )
}

/// Performance counters: the processor's, and KVM's parameter.
pub(super) fn counters(host: &Host) -> Finding {
    let off = host.text("sys/module/kvm/parameters/enable_pmu").is_some_and(|on| on == "N");
    let has =
        host.has("sys/bus/event_source/devices/cpu") || host.has("sys/bus/event_source/devices/cpu_core");
    Finding::ok(
        "pmu",
        match (has, off) {
            (true, false) => "VMs with `cpu_features.pmu` have performance counters",
            (true, true) => {
                "KVM has counters off (kvm, parameter enable_pmu): VMs with `cpu_features.pmu` cannot be booted"
            }
            (false, _) => "the processor shows no counters: VMs with `cpu_features.pmu` cannot be booted",
        },
    )
}
