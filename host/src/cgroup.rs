// SPDX-License-Identifier: Apache-2.0

//! Limits of a VM's process: control groups, version 2 (Documentation/admin-guide/cgroup-v2.rst).
//!
//! A process gets a group of its own, `PARENT/ID`, before it learns which machine to build. The agent removes the group
//! after the end of the process. The limits of a VM's specification must be set. Without a limit of memory the process
//! gets a default, where the host can set it: a guest that takes over its process does not take the memory of the host.
//! The same holds for huge pages: the process gets the guest's memory if that is in huge pages, and none otherwise.

use std::{
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use api::types::{ByteSize, HugePages, VmLimits, VmSpec};
use rustix::fs::statfs;
use uuid::Uuid;

/// `CGROUP2_SUPER_MAGIC` of `linux/magic.h`.
const CGROUP2: u64 = 0x6367_7270;

/// The period of `cpu.max` in microseconds, the kernel's default.
const PERIOD_US: u64 = 100_000;

/// The number of attempts to remove a group. The kernel counts a process a moment longer than it can be waited for.
const TRIES: u32 = 50;
const TRY_AGAIN_AFTER: Duration = Duration::from_millis(10);

/// The default limit of memory beside the guest's own: for the process with its console and log (1 and 16 MiB, perhaps
/// on a file system in memory), for each vCPU, for each function, and the part of the guest's memory that page tables
/// of the process, of KVM and of the IOMMU take. The unoptimized process of a small guest with 254 vCPUs and 16
/// simulated functions has 54 MiB in all, of which the kernel has 36.
const BASE: u64 = 64 << 20;
const PER_CPU: u64 = 1 << 20;
const PER_FUNCTION: u64 = 4 << 20;
/// For each disk: the host's cache of its file, which the kernel gives back under pressure.
const PER_DISK: u64 = 16 << 20;
/// For `boot.disk`: the longest copy of a kernel, which the process reads from the disk.
const INSTALLED_KERNEL: u64 = 128 << 20;
const PART: u64 = 16;

/// The size of huge pages, as the controller `hugetlb` names it. None for ordinary pages.
fn size_name(pages: HugePages) -> Option<&'static str> {
    match pages {
        HugePages::Off => None,
        HugePages::Mib2 => Some("2MB"),
        HugePages::Gib1 => Some("1GB"),
    }
}

/// The most of `/proc/self/mountinfo` that is read.
const MOUNTS: u64 = 4 << 20;

/// The default of [`VmLimits::memory`] for a VM.
#[must_use]
pub fn default_memory(spec: &VmSpec) -> ByteSize {
    // Huge pages come from the administrator's pool, and count here only if the hierarchy is mounted with that option.
    let counted = spec.hugepages == HugePages::Off || counts_huge_pages();
    memory_of(spec, counted)
}

fn memory_of(spec: &VmSpec, counts_guest: bool) -> ByteSize {
    let guest = spec.memory.bytes();
    let functions = u64::try_from(spec.functions()).unwrap_or(u64::MAX).saturating_mul(PER_FUNCTION);
    let disks = spec.disks.len().saturating_add(spec.cloud_init.is_some().into());
    let disks = u64::try_from(disks).unwrap_or(u64::MAX).saturating_mul(PER_DISK);
    let kernel = if spec.boot.disk.is_some() { INSTALLED_KERNEL } else { 0 };
    let beside = BASE + u64::from(spec.cpus) * PER_CPU + kernel;
    let own = if counts_guest { guest } else { 0 };
    ByteSize::new(
        own.saturating_add(guest / PART)
            .saturating_add(functions)
            .saturating_add(disks)
            .saturating_add(beside),
    )
}

/// Whether the hierarchy has the option `memory_hugetlb_accounting` (Linux 6.7).
fn counts_huge_pages() -> bool {
    let mut mounts = String::new();
    let file = fs::File::open("/proc/self/mountinfo");
    let read = file.and_then(|file| file.take(MOUNTS).read_to_string(&mut mounts));
    // A limit that is too high is better than one that ends VMs.
    read.is_err() || mounts.contains("memory_hugetlb_accounting")
}

/// The reason why a process cannot be limited.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The parent is in no hierarchy of version 2.
    #[error(
        "{0} is not in a cgroup v2 file system: mount one (systemd does with systemd.unified_cgroup_hierarchy=1), or name a \
         directory in one with serve --cgroup-parent"
    )]
    NotVersion2(PathBuf),
    /// A controller that the host does not offer.
    #[error(
        "the cgroup {group} has no controller {controller} (cgroup.controllers): it is not built into the kernel, is used by a \
         hierarchy of version 1, or is not delegated"
    )]
    Controller {
        /// The highest group that lacks it.
        group: PathBuf,
        /// The controller's name.
        controller: &'static str,
    },
    /// A file that cannot be written.
    #[error("{path} cannot be written ({source})")]
    File {
        /// The file's path.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}

/// Puts a process into a group of its own with `limits`.
///
/// # Errors
/// [`CgroupError`]; the process is not limited then.
pub fn limit(parent: &Path, vm: Uuid, limits: &VmLimits, pid: i32) -> Result<(), CgroupError> {
    let settings = settings(limits);
    let mut controllers: Vec<&'static str> = settings.iter().map(|(controller, ..)| *controller).collect();
    controllers.dedup();
    let group = make_for(parent, vm, &controllers)?;
    for (_, file, value) in settings {
        write(&group.join(file), &value)?;
    }
    enter(&group, pid)
}

/// Puts a process into its group with a limit of huge pages: `bytes` of guest memory in its `pages`, and none of another size. The
/// pool is the administrator's, and no limit of memory counts it.
///
/// # Errors
/// [`CgroupError`]; the process can take what is left of the pools.
pub fn limit_huge_pages(
    parent: &Path,
    vm: Uuid,
    pages: HugePages,
    bytes: u64,
    pid: i32,
) -> Result<(), CgroupError> {
    let group = make_for(parent, vm, &["hugetlb"])?;
    let listed = fs::read_dir(&group).map_err(|source| CgroupError::File { path: group.clone(), source })?;
    for name in listed.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
        if let Some(most) = of_huge_pages(&name, pages, bytes) {
            write(&group.join(&name), &most.to_string())?;
        }
    }
    enter(&group, pid)
}

/// The bytes for a file of a group that limits huge pages, or their reservation (`hugetlb.2MB.max`, `hugetlb.1GB.rsvd.max`); None for
/// any other file.
fn of_huge_pages(file: &str, pages: HugePages, bytes: u64) -> Option<u64> {
    let limit = file.strip_prefix("hugetlb.")?.strip_suffix(".max")?;
    let size = limit.strip_suffix(".rsvd").unwrap_or(limit);
    Some(if size_name(pages) == Some(size) { bytes } else { 0 })
}

/// Makes the group of a VM with these controllers.
fn make_for(parent: &Path, vm: Uuid, controllers: &[&'static str]) -> Result<PathBuf, CgroupError> {
    make(parent)?;
    // From the hierarchy's root, or the part that this process sees (cgroup_namespaces(7)), down to the parent.
    let is_group = |path: &&Path| path.join("cgroup.controllers").exists();
    let groups: Vec<&Path> = parent.ancestors().take_while(is_group).collect();
    for group in groups.into_iter().rev() {
        enable(group, controllers)?;
    }
    let group = parent.join(vm.to_string());
    make(&group)?;
    Ok(group)
}

fn enter(group: &Path, pid: i32) -> Result<(), CgroupError> {
    write(&group.join("cgroup.procs"), &pid.to_string())
}

/// Removes the group of a VM after the end of its process, if it has one. Returns whether the kernel killed the process
/// for the group's memory.
///
/// # Errors
/// Those of `rmdir`.
pub fn remove(parent: &Path, vm: Uuid) -> io::Result<bool> {
    let group = parent.join(vm.to_string());
    let events = fs::read_to_string(group.join("memory.events")).unwrap_or_default();
    let killed = events.lines().any(|line| line.strip_prefix("oom_kill ").is_some_and(|kills| kills != "0"));
    for _ in 1..TRIES {
        match fs::remove_dir(&group) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => thread::sleep(TRY_AGAIN_AFTER),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            result => return result.map(|()| killed),
        }
    }
    fs::remove_dir(&group).map(|()| killed)
}

/// Controllers, their files, and the values to write.
fn settings(limits: &VmLimits) -> Vec<(&'static str, &'static str, String)> {
    let mut settings = Vec::new();
    if let Some(percent) = limits.cpu_percent {
        let quota = u64::from(percent) * PERIOD_US / 100;
        settings.push(("cpu", "cpu.max", format!("{quota} {PERIOD_US}")));
    }
    if let Some(weight) = limits.cpu_weight {
        settings.push(("cpu", "cpu.weight", weight.to_string()));
    }
    if let Some(memory) = limits.memory {
        settings.push(("memory", "memory.max", memory.bytes().to_string()));
        // A process that has lost some of its threads is of no use.
        settings.push(("memory", "memory.oom.group", "1".into()));
    }
    settings
}

fn make(group: &Path) -> Result<(), CgroupError> {
    let existing = group.ancestors().find(|path| path.exists()).unwrap_or(group);
    // The field's type differs between architectures.
    let is_cgroup2 = statfs(existing).is_ok_and(|found| u64::try_from(found.f_type) == Ok(CGROUP2));
    if !is_cgroup2 {
        return Err(CgroupError::NotVersion2(group.to_owned()));
    }
    fs::create_dir_all(group).map_err(|source| CgroupError::File { path: group.to_owned(), source })
}

/// Lets the groups below have controllers.
fn enable(group: &Path, controllers: &[&'static str]) -> Result<(), CgroupError> {
    let list = |file: &str| fs::read_to_string(group.join(file)).unwrap_or_default();
    let (available, enabled) = (list("cgroup.controllers"), list("cgroup.subtree_control"));
    for controller in controllers {
        let has = |list: &str| list.split_ascii_whitespace().any(|word| word == *controller);
        if !has(&available) {
            return Err(CgroupError::Controller { group: group.to_owned(), controller });
        }
        if !has(&enabled) {
            write(&group.join("cgroup.subtree_control"), &format!("+{controller}"))?;
        }
    }
    Ok(())
}

fn write(path: &Path, value: &str) -> Result<(), CgroupError> {
    fs::write(path, value).map_err(|source| CgroupError::File { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_become_the_kernels_words() {
        let limits = serde_json::json!({"cpu_percent": 150, "cpu_weight": 50, "memory": "64MiB"});
        let written: Vec<String> = settings(&serde_json::from_value(limits).unwrap())
            .iter()
            .map(|(controller, file, value)| format!("{controller} {file} {value}"))
            .collect();
        let expected = [
            "cpu cpu.max 150000 100000",
            "cpu cpu.weight 50",
            "memory memory.max 67108864",
            "memory memory.oom.group 1",
        ];
        assert_eq!(written, expected);
    }

    #[test]
    fn huge_pages_are_limited_for_each_size() {
        use HugePages::{Gib1, Mib2, Off};
        for (file, most) in [
            ("hugetlb.2MB.max", [0, 512, 0]),
            ("hugetlb.2MB.rsvd.max", [0, 512, 0]),
            ("hugetlb.1GB.max", [0, 0, 512]),
            ("hugetlb.1GB.rsvd.max", [0, 0, 512]),
            ("hugetlb.64KB.max", [0, 0, 0]),
        ] {
            let limits = [Off, Mib2, Gib1].map(|pages| of_huge_pages(file, pages, 512));
            assert_eq!(limits, most.map(Some), "{file}");
        }
        for file in ["hugetlb.2MB.current", "hugetlb.2MB.events", "memory.max"] {
            assert_eq!(of_huge_pages(file, Mib2, 512), None, "{file}");
        }
    }

    #[test]
    fn a_default_leaves_room_for_what_a_process_needs() {
        let spec = |cpus: u8, memory: &str, adapters: usize| -> VmSpec {
            let adapters: Vec<_> =
                (0..adapters).map(|n| serde_json::json!({"id": format!("eth{n}")})).collect();
            let boot = serde_json::json!({"kernel": "k"});
            let spec = serde_json::json!({
                "name": "web1", "cpus": cpus, "memory": memory, "boot": boot, "adapters": adapters
            });
            serde_json::from_value(spec).unwrap()
        };
        let mib = |spec: &VmSpec, counts| memory_of(spec, counts).bytes() >> 20;
        assert_eq!(mib(&spec(1, "512MiB", 1), true), 512 + 32 + 64 + 1 + 4);
        assert_eq!(mib(&spec(254, "64MiB", 16), true), 64 + 4 + 64 + 254 + 64);
        assert_eq!(mib(&spec(2, "1GiB", 0), false), 64 + 64 + 2, "huge pages are not counted");
        let mut from_disk = spec(1, "512MiB", 0);
        (from_disk.boot.kernel, from_disk.boot.disk) = (None, Some("root".parse().unwrap()));
        assert_eq!(mib(&from_disk, true), 512 + 32 + 64 + 1 + 128, "with a kernel of its own");
        assert_eq!(memory_of(&spec(1, "16777215TiB", 1), true).bytes(), u64::MAX);
    }

    #[test]
    fn a_directory_that_is_no_cgroup_is_refused_with_a_cure_and_nothing_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let parent = dir.path().join("portcullis");
        let limits = VmLimits { cpu_percent: Some(50), ..VmLimits::default() };
        let error = limit(&parent, Uuid::new_v4(), &limits, 1).unwrap_err().to_string();
        assert!(error.contains("cgroup v2") && error.contains("--cgroup-parent"), "{error}");
        assert!(limit_huge_pages(&parent, Uuid::new_v4(), HugePages::Off, 0, 1).is_err());
        assert!(!parent.exists());
        assert!(!remove(&parent, Uuid::new_v4()).unwrap(), "that there is none is no error");
    }
}
