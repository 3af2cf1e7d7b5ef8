// SPDX-License-Identifier: Apache-2.0

//! The place of a VM on this host: the check before its boot, and its actual place.
//!
//! The agent compares a placement with the host before it touches anything. The vmm makes the same
//! comparison again when it asks the kernel, because the host may have changed meanwhile.

mod status;

use std::{
    collections::BTreeSet,
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use api::{
    problem::{Problem, ProblemCode},
    types::{ByteSize, CpuList, HugePages, NumaPlace, VmSpec},
};
use serde::{Deserialize, Serialize};
use sriov::Bdf;

pub use self::status::status;

/// The most bytes that are read of a file: more than the longest list of CPUs has.
const LONGEST: u64 = 64 << 10;

/// The place of guest memory, as the agent has chosen it for a boot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryPlace {
    /// The NUMA node.
    pub node: Option<u16>,
    /// The reason why there is none, although the specification asks for one.
    pub not_placed: Option<String>,
}

/// The CPUs, NUMA nodes and huge pages of a host.
#[derive(Clone, Debug)]
pub struct Topology {
    sys: PathBuf,
}

impl Default for Topology {
    fn default() -> Self {
        Self::new("/sys")
    }
}

impl Topology {
    /// The host with this directory in the place of `/sys`.
    #[must_use]
    pub fn new(sys: impl Into<PathBuf>) -> Self {
        Self { sys: sys.into() }
    }

    /// Checks everything of a placement that does not depend on the VM's functions. `cgroup_parent` is the parent of the
    /// control groups of VMs' processes.
    ///
    /// # Errors
    /// `placement_unavailable` or `memory_unavailable`, with the field.
    pub fn check(&self, cgroup_parent: &Path, spec: &VmSpec) -> Result<(), Problem> {
        let place = spec.placement.clone().unwrap_or_default();
        for (vcpu, cpus) in &place.cpus {
            self.check_cpus(cgroup_parent, &format!("placement.cpus.{}", vcpu.0), cpus)?;
        }
        if let Some(cpus) = &place.io_cpus {
            self.check_cpus(cgroup_parent, "placement.io_cpus", cpus)?;
        }
        match place.numa {
            Some(NumaPlace::Node(node)) => self.check_node(cgroup_parent, spec, node),
            _ => self.check_pool(spec, None),
        }
    }

    /// Chooses the node of guest memory. `functions` are the VM's, with their nodes.
    ///
    /// # Errors
    /// As [`Self::check`]: the functions are on several nodes, or theirs cannot have the memory.
    pub fn place_memory(
        &self,
        cgroup_parent: &Path,
        spec: &VmSpec,
        functions: &[(Bdf, Option<u16>)],
    ) -> Result<MemoryPlace, Problem> {
        match spec.placement.as_ref().and_then(|place| place.numa) {
            None => Ok(MemoryPlace::default()),
            Some(NumaPlace::Node(node)) => Ok(MemoryPlace { node: Some(node), not_placed: None }),
            Some(NumaPlace::OfAdapters) => {
                let place = of_functions(functions)?;
                if let Some(node) = place.node {
                    self.check_node(cgroup_parent, spec, node)?;
                }
                Ok(place)
            }
        }
    }

    /// Checks that a thread can run on all of these CPUs. The affinity of the agent's own threads does not matter: on a host
    /// with isolated CPUs (`isolcpus`) it lacks them.
    fn check_cpus(&self, cgroup_parent: &Path, field: &str, cpus: &CpuList) -> Result<(), Problem> {
        const ONLINE: &str = "devices/system/cpu/online";
        let path = self.sys.join(ONLINE);
        let online = list(&path).ok_or_else(|| unreadable(field, &path))?;
        if let Some(missing) = cpus.without(&online) {
            let detail = format!(
                "The host's CPUs {missing} are not online: name some of {online} ({}).",
                path.display()
            );
            return Err(unavailable(field, detail));
        }
        let Some((path, allowed)) = of_cpuset(cgroup_parent, "cpuset.cpus.effective") else { return Ok(()) };
        match cpus.without(&allowed) {
            None => Ok(()),
            Some(missing) => Err(unavailable(
                field,
                format!(
                    "The control group of VMs' processes lacks the CPUs {missing}: name some of {allowed} ({}), or give it \
                     more.",
                    path.display()
                ),
            )),
        }
    }

    /// Checks that a node can have the VM's memory.
    fn check_node(&self, cgroup_parent: &Path, spec: &VmSpec, node: u16) -> Result<(), Problem> {
        const FIELD: &str = "placement.numa";
        let nodes = self.sys.join("devices/system/node");
        let path = nodes.join("has_memory");
        let with_memory = list(&path).ok_or_else(|| unreadable(FIELD, &path))?;
        if !with_memory.contains(node) {
            let detail = format!(
                "The host has no NUMA node {node} with memory: name one of {with_memory} ({}).",
                path.display()
            );
            return Err(unavailable(FIELD, detail));
        }
        if let Some((path, allowed)) = of_cpuset(cgroup_parent, "cpuset.mems.effective")
            && !allowed.contains(node)
        {
            let detail = format!(
                "The control group of VMs' processes lacks the NUMA node {node}: name one of {allowed} ({}), or give it \
                 more.",
                path.display()
            );
            return Err(unavailable(FIELD, detail));
        }
        if spec.hugepages != HugePages::Off {
            return self.check_pool(spec, Some(node));
        }
        let path = nodes.join(format!("node{node}/meminfo"));
        let available = text(&path).as_deref().and_then(available);
        match available.filter(|available| *available < spec.memory.bytes()) {
            None => Ok(()),
            Some(available) => Err(no_memory(
                "memory",
                format!(
                    "The VM has {} MiB of memory, and the NUMA node {node} of its host only {} MiB that are free or hold \
                     files ({}): give the VM less memory, end other programs on the node, or do not place the VM.",
                    spec.memory.bytes() >> 20,
                    available >> 20,
                    path.display()
                ),
            )),
        }
    }

    /// Checks that the host, or a node of it, has enough huge pages for a VM that asks for them.
    ///
    /// # Errors
    /// `memory_unavailable`.
    pub fn check_pool(&self, spec: &VmSpec, node: Option<u16>) -> Result<(), Problem> {
        let Some(size) = spec.hugepages.size() else { return Ok(()) };
        let name = format!("hugepages/hugepages-{}kB", size.bytes() >> 10);
        let all = self.sys.join("kernel/mm").join(&name);
        let count =
            |pool: &Path, file: &str| text(&pool.join(file)).and_then(|text| text.parse::<u64>().ok());
        let Some(free) = count(&all, "free_hugepages") else {
            let detail = format!(
                "The host's kernel or processor has no huge pages of {size}: choose another size, or turn hugepages off."
            );
            return Err(no_memory("hugepages", detail));
        };
        let other = |file: &str| count(&all, file).unwrap_or(0);
        let pool = node
            .map_or(all.clone(), |node| self.sys.join(format!("devices/system/node/node{node}")).join(&name));
        // Pages that processes have reserved, and not touched yet, count as free.
        let free = match node {
            None => free.saturating_sub(other("resv_hugepages")),
            Some(_) => count(&pool, "free_hugepages").unwrap_or(0),
        };
        // Pages that the kernel may add when they are needed, on a node of its choice.
        let more = match node {
            None => other("nr_overcommit_hugepages").saturating_sub(other("surplus_hugepages")),
            Some(_) => 0,
        };
        let needed = spec.memory.bytes().div_ceil(size.bytes());
        if needed <= free.saturating_add(more) {
            return Ok(());
        }
        let on = node.map(|node| format!(" on the NUMA node {node}")).unwrap_or_default();
        let detail = format!(
            "The VM needs {needed} huge pages of {size}, and its host has {free} free{on}: raise {} by {}, or turn hugepages \
             off.",
            pool.join("nr_hugepages").display(),
            needed.saturating_sub(free)
        );
        Err(no_memory("hugepages", detail))
    }
}

/// The node of a VM's functions. Functions without a node do not matter beside others.
fn of_functions(functions: &[(Bdf, Option<u16>)]) -> Result<MemoryPlace, Problem> {
    let nodes: BTreeSet<u16> = functions.iter().filter_map(|(_, node)| *node).collect();
    let not_placed = |why: &str| Ok(MemoryPlace { node: None, not_placed: Some(why.to_owned()) });
    match (nodes.first(), nodes.last()) {
        _ if functions.is_empty() => not_placed("The VM has no adapters and no devices."),
        (Some(one), Some(other)) if one != other => {
            let on = functions.iter().filter_map(|(bdf, node)| Some(format!("{bdf} on node {}", (*node)?)));
            let detail = format!(
                "The VM's functions are on several NUMA nodes ({}): choose adapters of one node, or name the node.",
                on.collect::<Vec<_>>().join(", ")
            );
            Err(unavailable("placement.numa", detail))
        }
        (Some(node), _) => Ok(MemoryPlace { node: Some(*node), not_placed: None }),
        _ => {
            not_placed("The host knows no NUMA node of the VM's adapters and devices, or they are simulated.")
        }
    }
}

/// A list of the cpuset in which a process below `parent` would be, with its file. None if no control group of version 2
/// has the controller there.
fn of_cpuset(parent: &Path, file: &str) -> Option<(PathBuf, CpuList)> {
    // A group without the controller has the cpuset of the next one above, which has these files.
    let path = parent.ancestors().map(|group| group.join(file)).find(|path| path.exists())?;
    let list = list(&path)?;
    Some((path, list))
}

/// The text of a file without its line end; None if it cannot be read.
fn text(path: &Path) -> Option<String> {
    let mut text = String::new();
    File::open(path).ok()?.take(LONGEST).read_to_string(&mut text).ok()?;
    Some(text.trim_end().to_owned())
}

fn list(path: &Path) -> Option<CpuList> {
    CpuList::of_kernel(&text(path)?)
}

/// The bytes that a node can give to a guest, in the text of its `meminfo` (Documentation/filesystems/proc.rst): its free
/// memory, and the cache of files, which the kernel takes back when it needs memory.
fn available(meminfo: &str) -> Option<u64> {
    let kib = |name: &str| {
        let (_, rest) = meminfo.split_once(name)?;
        let (kib, _) = rest.split_once("kB")?;
        kib.trim().parse::<u64>().ok()
    };
    let files = [" Active(file):", " Inactive(file):"].map(|name| kib(name).unwrap_or(0));
    kib(" MemFree:")?.checked_add(files[0])?.checked_add(files[1])?.checked_mul(1024)
}

/// The size of ordinary pages.
const ORDINARY: ByteSize = ByteSize::new(4096);

fn unavailable(field: &str, detail: String) -> Problem {
    Problem { field: Some(field.into()), ..Problem::new(ProblemCode::PlacementUnavailable, detail) }
}

fn no_memory(field: &str, detail: String) -> Problem {
    Problem { field: Some(field.into()), ..Problem::new(ProblemCode::MemoryUnavailable, detail) }
}

fn unreadable(field: &str, path: &Path) -> Problem {
    let detail = format!(
        "The host's kernel does not show {}: mount sysfs at /sys, or leave {field} out. A kernel without NUMA (CONFIG_NUMA) \
         has no nodes.",
        path.display()
    );
    unavailable(field, detail)
}

#[cfg(test)]
mod tests;
