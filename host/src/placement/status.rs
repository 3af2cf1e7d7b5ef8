// SPDX-License-Identifier: Apache-2.0

//! The actual place of a VM. CPUs and the size of pages come from the kernel, not from the VM's process, which its guest may
//! have taken over. The node is that of the boot: the agent chose it, and the process bound guest memory to it. The filters of
//! the process allow neither other CPUs, nor another node, nor other names of threads.

use std::{collections::BTreeMap, fs, path::Path};

use api::types::{CpuList, PlacementStatus, VcpuNumber, VmSpec};

use super::{MemoryPlace, ORDINARY, text};

/// The most threads of a process that are looked at: 254 vCPUs, and those of 16 adapters, 16 disks and 8 NICs, are fewer.
const THREADS: usize = 512;

/// The place of the VM whose process has this id. None for a VM whose specification says nothing about its place.
///
/// `proc` is `/proc`. It blocks for a few microseconds for each thread.
#[must_use]
pub fn status(proc: &Path, pid: i32, spec: &VmSpec, memory: Option<&MemoryPlace>) -> Option<PlacementStatus> {
    let huge = spec.hugepages.size();
    if spec.placement.is_none() && huge.is_none() {
        return None;
    }
    let process = proc.join(pid.to_string());
    let (mut cpus, mut io_cpus) = (BTreeMap::new(), None::<CpuList>);
    for task in fs::read_dir(process.join("task")).into_iter().flatten().flatten().take(THREADS) {
        let Some(status) = text(&task.path().join("status")) else { continue };
        let list = member(&status, "Cpus_allowed_list:").and_then(CpuList::of_kernel);
        let (Some(name), Some(list)) = (member(&status, "Name:"), list) else { continue };
        match name.strip_prefix("vcpu").and_then(|number| number.parse::<VcpuNumber>().ok()) {
            Some(number) => drop(cpus.insert(number, list)),
            // A worker of the kernel (`kvm-nx-lpage-recovery`), which is on the CPUs of the vCPU that ran first.
            None if name.starts_with("kvm-") => {}
            None => io_cpus = Some(io_cpus.map_or(list.clone(), |others| others.union(&list))),
        }
    }
    let in_huge_pages = text(&process.join("status"))
        .as_deref()
        .and_then(|status| member(status, "HugetlbPages:"))
        .and_then(|size| size.strip_suffix("kB")?.trim().parse::<u64>().ok())
        .is_some_and(|kib| kib.saturating_mul(1024) >= spec.memory.bytes());
    let MemoryPlace { node, not_placed } = memory.cloned().unwrap_or_default();
    let page_size = huge.filter(|_| in_huge_pages).unwrap_or(ORDINARY);
    Some(PlacementStatus { cpus, io_cpus, numa: node, not_placed, page_size })
}

/// A member of a `status` file (proc(5)).
fn member<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim)
}
