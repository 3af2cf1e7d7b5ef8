//! How the process gives up what it does not need before guest code is loaded.
//!
//! ```text
//!   root of the host ──private_root──▶ only /dev/vfio/vfio, /dev/vfio/N, device links
//!        (started by the agent)           │ the VFIO devices are opened
//!                                         ▼
//!                                     empty, read-only root ──drop_privileges──▶ own uid, no capability
//! ```
//!
//! Called while the process has one thread; threads that are started later inherit the result.

use std::{
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use rustix::{
    mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change, unmount},
    process::{Resource, Rlimit, chdir, pivot_root, setrlimit},
    thread::{self, UnshareFlags},
};

use crate::control::{DeviceBackend, DeviceSpec, SandboxSpec};

/// Where the new root is mounted: any directory that every host has. Only this process sees the mount.
const STAGE: &str = "/tmp";
/// Where `vfio-ioctls` finds a device's group, inside of the private root.
const DEVICES: &str = "/devices";

/// Why the sandbox cannot be built.
#[derive(Debug, thiserror::Error)]
#[error("Cannot {what}; the vmm needs a kernel with namespaces and an agent with CAP_SYS_ADMIN")]
pub struct SandboxError {
    what: String,
    source: io::Error,
}

fn failed<T>(result: Result<T, impl Into<io::Error>>, what: impl Into<String>) -> Result<T, SandboxError> {
    result.map_err(|e| SandboxError { what: what.into(), source: e.into() })
}

/// Where a device's sysfs-like directory lies in the private root.
#[must_use]
pub fn device_path(bdf: &str) -> PathBuf {
    Path::new(DEVICES).join(bdf)
}

/// Moves into namespaces of its own and a root that holds the VFIO nodes of `devices` and nothing else.
///
/// # Errors
/// [`SandboxError`] naming the step.
pub fn private_root(devices: &[DeviceSpec]) -> Result<(), SandboxError> {
    let namespaces = UnshareFlags::NEWNS | UnshareFlags::NEWNET | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    // SAFETY: the flags do not contain CLONE_FILES or any other that changes which file descriptors are valid.
    failed(unsafe { thread::unshare_unsafe(namespaces) }, "enter namespaces of its own")?;
    let private = MountPropagationFlags::REC | MountPropagationFlags::PRIVATE;
    failed(mount_change("/", private), "make its mounts private")?;
    failed(
        mount(
            "portcullis",
            STAGE,
            "tmpfs",
            MountFlags::NOSUID | MountFlags::NOEXEC,
            Some(c"size=256k,mode=0755"),
        ),
        "mount a private root",
    )?;
    let stage = Path::new(STAGE);
    let groups: Vec<(&DeviceSpec, u32)> = devices
        .iter()
        .filter_map(|device| match device.backend {
            DeviceBackend::Vfio { group } => Some((device, group)),
            DeviceBackend::Simulated => None,
        })
        .collect();
    if !groups.is_empty() {
        let vfio = stage.join("dev/vfio");
        failed(fs::create_dir_all(&vfio), "make /dev/vfio in the private root")?;
        bind_node("vfio", &vfio)?;
        for (device, group) in groups {
            let group = group.to_string();
            if !vfio.join(&group).exists() {
                bind_node(&group, &vfio)?;
            }
            let directory = stage.join(DEVICES.trim_start_matches('/')).join(&device.bdf);
            failed(fs::create_dir_all(&directory), "make a device's directory in the private root")?;
            failed(
                symlink(Path::new("/groups").join(&group), directory.join("iommu_group")),
                "link a device to its group in the private root",
            )?;
        }
    }
    pivot(stage)
}

fn bind_node(name: &str, into: &Path) -> Result<(), SandboxError> {
    let target = into.join(name);
    let source = Path::new("/dev/vfio").join(name);
    failed(fs::File::create(&target), "make a node's place in the private root")?;
    failed(mount_bind(&source, &target), format!("bind {}", source.display()))
}

/// Makes `new_root` (a mount point) the root and lets go of the old one.
fn pivot(new_root: &Path) -> Result<(), SandboxError> {
    failed(chdir(new_root), "enter its new root")?;
    // Stacks the old root on the new one; the unmount then takes the old one away (pivot_root(2), NOTES).
    failed(pivot_root(".", "."), "pivot into its new root")?;
    failed(unmount(".", UnmountFlags::DETACH), "let go of its old root")?;
    failed(chdir("/"), "enter its new root")
}

/// Moves on from the private root to an empty, read-only one.
///
/// # Errors
/// [`SandboxError`] naming the step.
pub fn empty_root() -> Result<(), SandboxError> {
    failed(fs::create_dir("/empty"), "make an empty directory")?;
    let flags = MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NODEV | MountFlags::RDONLY;
    failed(mount("portcullis", "/empty", "tmpfs", flags, Some(c"size=4k,mode=0555")), "mount an empty root")?;
    pivot(Path::new("/empty"))
}

/// Becomes the unprivileged user of `spec`, without any capability and without a way to get one.
///
/// # Errors
/// [`SandboxError`] naming the step.
pub fn drop_privileges(spec: &SandboxSpec) -> Result<(), SandboxError> {
    // A core file would hold what the guest may not leak: devices' registers, this process's secrets.
    failed(setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) }), "forbid core files")?;
    if let (Some(uid), Some(gid)) = (spec.uid, spec.gid) {
        drop_bounding_set()?;
        let (uid, gid) = (thread::Uid::from_raw(uid), thread::Gid::from_raw(gid));
        failed(thread::set_thread_groups(&[]), "leave its groups")?;
        failed(thread::set_thread_res_gid(gid, gid, gid), "change its group id")?;
        // Leaving uid 0 clears the permitted, effective and ambient sets (capabilities(7)).
        failed(thread::set_thread_res_uid(uid, uid, uid), "change its user id")?;
    }
    // Also those that an agent without root was given.
    let none = thread::CapabilitySets {
        effective: thread::CapabilitySet::empty(),
        permitted: thread::CapabilitySet::empty(),
        inheritable: thread::CapabilitySet::empty(),
    };
    failed(thread::set_capabilities(None, none), "drop its capabilities")?;
    failed(thread::set_no_new_privs(true), "forbid new privileges")
}

fn drop_bounding_set() -> Result<(), SandboxError> {
    for capability in thread::CapabilitySet::all().iter() {
        if thread::capability_is_in_bounding_set(capability).unwrap_or(false) {
            failed(
                thread::remove_capability_from_bounding_set(capability),
                "shrink its capability bounding set",
            )?;
        }
    }
    Ok(())
}
