// SPDX-License-Identifier: Apache-2.0

//! The process gives up its privileges here, before it loads guest code.
//!
//! ```text
//!   root of the host ──private_root──▶ only /dev/vfio/vfio, /dev/vfio/N, device links
//!        (started by the agent)           │ the VFIO devices are opened (without any: the host's root until then)
//!                                         ▼
//!    a thread makes it in advance ──▶ empty, read-only root ──drop_privileges──▶ own uid, no capability, Landlock
//! ```
//!
//! All of it runs while the process has one thread; later threads inherit the result. Once all threads are there,
//! [`limit_files`] and [`forbid_threads`] remove rights that none of them needs, and [`crate::seccomp`] confines each
//! to its system calls.
//!
//! There is no PID namespace. A process cannot enter one, only its children do, so the agent would have to start each
//! vmm by its own `clone3` in place of the standard library's fork and exec. It would hide only the ids of other
//! processes, which are of no use without a right over those processes.

use std::{
    fs, io,
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::symlink,
    },
    path::{Path, PathBuf},
    thread::JoinHandle,
};

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetCreated,
    RulesetError, Scope,
};
use rustix::{
    mount::{
        MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change, mount_remount,
        unmount,
    },
    process::{Resource, Rlimit, chdir, chroot, geteuid, getrlimit, pivot_root, setrlimit},
    thread::{self, LinkNameSpaceType, UnshareFlags},
};

use libc::SIGXFSZ;
use protocol::{DeviceBackend, DeviceSpec, SandboxSpec};
use vmm_sys_util::signal::register_signal_handler;

/// The mount point of the new root: any directory that every host has. Only this process sees the mount.
const STAGE: &str = "/tmp";
/// The directory that is the final root, in the root of its mount namespace.
const EMPTY: &str = "root";
/// The directory in which `vfio-ioctls` finds a device's group, inside of the private root.
const DEVICES: &str = "/devices";

/// Room for files that are opened later: connections of agents, and three eventfds for each simulated function with
/// interrupts that the guest turns on.
const MORE_FILES: u64 = 128;
/// The longest file in bytes that the process may write, if no disk is longer. The console's ring is shorter, and the agent cuts the log.
const FILE_MAX: u64 = 16 << 20;
/// The newest Landlock interface to use. An older kernel on the host applies the restrictions that it knows.
const LANDLOCK: ABI = ABI::V10;

/// Errors of building the sandbox.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// A step that needs privileges or a feature of the kernel.
    #[error("Cannot {what}; the vmm needs a kernel with namespaces and an agent with CAP_SYS_ADMIN")]
    Step {
        /// The step.
        what: String,
        /// The cause.
        source: io::Error,
    },
    /// Landlock refused.
    #[error(
        "Cannot confine itself by Landlock: the host needs a kernel of version 5.13 or newer with CONFIG_SECURITY_LANDLOCK, \
         and `landlock` in its list of security modules (the boot parameter lsm=)"
    )]
    Landlock(#[source] RulesetError),
}

fn failed<T>(result: Result<T, impl Into<io::Error>>, what: impl Into<String>) -> Result<T, SandboxError> {
    result.map_err(|e| SandboxError::Step { what: what.into(), source: e.into() })
}

/// The path of a device's sysfs-like directory in the private root.
#[must_use]
pub fn device_path(bdf: &str) -> PathBuf {
    Path::new(DEVICES).join(bdf)
}

const NAMESPACES: UnshareFlags = UnshareFlags::NEWNET.union(UnshareFlags::NEWIPC).union(UnshareFlags::NEWUTS);

/// The files of a thread's [`NAMESPACES`] (proc(5)).
const NAMESPACE_FILES: [(&str, LinkNameSpaceType); 3] = [
    ("net", LinkNameSpaceType::Network),
    ("ipc", LinkNameSpaceType::InterProcessCommunication),
    ("uts", LinkNameSpaceType::HostNameAndNISDomainName),
];

/// Namespaces and the empty root, in the making. The kernel takes longer for them than for all the rest of the
/// sandbox (0.4 to 0.7 ms for a network namespace alone). So a thread makes them while the process waits for the
/// agent's specification and sets up KVM.
#[derive(Debug)]
pub struct NewNamespaces(JoinHandle<NewParts>);

#[derive(Debug)]
struct NewParts {
    namespaces: io::Result<Vec<(fs::File, LinkNameSpaceType)>>,
    root: Result<fs::File, SandboxError>,
}

/// A mount namespace with an empty, read-only root, for [`empty_root`].
#[derive(Debug)]
pub struct EmptyRoot(Result<fs::File, SandboxError>);

impl NewNamespaces {
    /// Begins. [`private_root`] and [`empty_root`] return errors of the making, if the sandbox includes the part.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn begin() -> io::Result<Self> {
        let make = || NewParts { namespaces: new_namespaces(), root: new_root() };
        Ok(Self(std::thread::Builder::new().name("namespaces".into()).spawn(make)?))
    }
}

fn new_namespaces() -> io::Result<Vec<(fs::File, LinkNameSpaceType)>> {
    // SAFETY: the flags do not contain CLONE_FILES or any other that changes which file descriptors are valid.
    unsafe { thread::unshare_unsafe(NAMESPACES) }?;
    let open = |(name, kind)| Ok((fs::File::open(format!("/proc/thread-self/ns/{name}"))?, kind));
    NAMESPACE_FILES.into_iter().map(open).collect()
}

/// Makes a mount namespace with an empty, read-only root, except for an empty directory in it.
fn new_root() -> Result<fs::File, SandboxError> {
    own_mounts()?;
    let namespace = failed(fs::File::open("/proc/thread-self/ns/mnt"), "open a mount namespace of its own")?;
    let flags = MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NODEV;
    failed(mount("portcullis", STAGE, "tmpfs", flags, Some(c"size=4k,mode=0555")), "mount an empty root")?;
    let stage = Path::new(STAGE);
    failed(fs::create_dir(stage.join(EMPTY)), "make an empty root")?;
    pivot(stage)?;
    failed(
        mount_remount("/", flags | MountFlags::RDONLY, c"size=4k,mode=0555"),
        "make its empty root read-only",
    )?;
    Ok(namespace)
}

/// Enters a new mount namespace. Its mounts are invisible to other processes.
fn own_mounts() -> Result<(), SandboxError> {
    // SAFETY: as in `new_namespaces`.
    failed(unsafe { thread::unshare_unsafe(UnshareFlags::NEWNS) }, "enter a mount namespace of its own")?;
    let private = MountPropagationFlags::REC | MountPropagationFlags::PRIVATE;
    failed(mount_change("/", private), "make its mounts private")
}

/// Moves into the new `namespaces` and, if there are VFIO devices, a root that holds their nodes and nothing else, as
/// far as `spec` includes these parts. Returns the final root.
///
/// # Errors
/// [`SandboxError`] naming the step.
pub fn private_root(
    spec: &SandboxSpec,
    devices: &[DeviceSpec],
    namespaces: NewNamespaces,
) -> Result<EmptyRoot, SandboxError> {
    // Wait for the thread's end in any case: no thread without a filter may be left.
    let joined = namespaces.0.join().map_err(|_| io::Error::other("the thread that makes them panicked"));
    let made = failed(joined, "make namespaces of its own")?;
    if spec.namespaces {
        let enter = "enter namespaces of its own";
        for (namespace, kind) in failed(made.namespaces, enter)? {
            failed(thread::move_into_link_name_space(namespace.as_fd(), Some(kind)), enter)?;
        }
    }
    let root = EmptyRoot(made.root);
    let groups: Vec<(&DeviceSpec, u32)> = devices
        .iter()
        .filter_map(|device| match device.backend {
            DeviceBackend::Vfio { group } => Some((device, group)),
            DeviceBackend::Simulated | DeviceBackend::SimulatedPort => None,
        })
        .collect();
    if spec.empty_root && !groups.is_empty() {
        own_mounts()?;
        let flags = MountFlags::NOSUID | MountFlags::NOEXEC;
        failed(
            mount("portcullis", STAGE, "tmpfs", flags, Some(c"size=256k,mode=0755")),
            "mount a private root",
        )?;
        let stage = Path::new(STAGE);
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
        pivot(stage)?;
    }
    Ok(root)
}

fn bind_node(name: &str, into: &Path) -> Result<(), SandboxError> {
    let target = into.join(name);
    let source = Path::new("/dev/vfio").join(name);
    failed(fs::File::create(&target), "make a node's place in the private root")?;
    failed(mount_bind(&source, &target), format!("bind {}", source.display()))
}

/// Makes `new_root` (a mount point) the root and detaches the old one.
fn pivot(new_root: &Path) -> Result<(), SandboxError> {
    failed(chdir(new_root), "enter its new root")?;
    // Stacks the old root on the new one; the unmount then removes the old one (pivot_root(2), NOTES).
    failed(pivot_root(".", "."), "pivot into its new root")?;
    failed(unmount(".", UnmountFlags::DETACH), "release its old root")?;
    failed(chdir("/"), "enter its new root")
}

/// Moves on to the empty, read-only root.
///
/// It is a directory of its mount namespace's root, not that root itself, which is as empty: for a process with a
/// changed root the kernel refuses to make a user namespace (`current_chrooted`), in which the process would have
/// capabilities again.
///
/// # Errors
/// [`SandboxError`] naming the step.
pub fn empty_root(spec: &SandboxSpec, root: EmptyRoot) -> Result<(), SandboxError> {
    if !spec.empty_root {
        return Ok(());
    }
    let enter = "enter its empty root";
    failed(thread::move_into_link_name_space(root.0?.as_fd(), Some(LinkNameSpaceType::Mount)), enter)?;
    failed(chroot(Path::new("/").join(EMPTY)), enter)?;
    failed(chdir("/"), enter)
}

/// Becomes the unprivileged user of `spec`, without any capability and without a way to get one, and applies
/// Landlock.
///
/// # Errors
/// [`SandboxError`] naming the step.
pub fn drop_privileges(spec: &SandboxSpec) -> Result<(), SandboxError> {
    // A core file would hold data that must not leak: devices' registers, this process's secrets.
    failed(setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) }), "forbid core files")?;
    if let (Some(uid), Some(gid)) = (spec.uid, spec.gid) {
        drop_bounding_set()?;
        let (uid, gid) = (thread::Uid::from_raw(uid), thread::Gid::from_raw(gid));
        failed(thread::set_thread_groups(&[]), "leave its groups")?;
        failed(thread::set_thread_res_gid(gid, gid, gid), "change its group id")?;
        // Leaving uid 0 clears the permitted, effective and ambient sets (capabilities(7)).
        failed(thread::set_thread_res_uid(uid, uid, uid), "change its user id")?;
    }
    if spec.uid.is_some() || !geteuid().is_root() {
        leave_session_keyring()?;
        drop_capabilities()?;
    }
    failed(thread::set_no_new_privs(true), "forbid new privileges")?;
    if spec.landlock { landlock().map_err(SandboxError::Landlock) } else { Ok(()) }
}

/// Drops also the capabilities of an agent that runs without root.
fn drop_capabilities() -> Result<(), SandboxError> {
    let none = thread::CapabilitySets {
        effective: thread::CapabilitySet::empty(),
        permitted: thread::CapabilitySet::empty(),
        inheritable: thread::CapabilitySet::empty(),
    };
    failed(thread::set_capabilities(None, none), "drop its capabilities")
}

/// Leaves the agent's session keyring for an empty one: all members of a session keyring possess its keys, whatever
/// their user.
fn leave_session_keyring() -> Result<(), SandboxError> {
    let anonymous: *const libc::c_char = std::ptr::null();
    // SAFETY: the operation takes a name or null, and changes only the keyring of this thread.
    let joined = unsafe { libc::syscall(libc::SYS_keyctl, libc::KEYCTL_JOIN_SESSION_KEYRING, anonymous) };
    if joined >= 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    // A kernel without keys has none to leave.
    if error.raw_os_error() == Some(libc::ENOSYS) {
        Ok(())
    } else {
        failed(Err(error), "leave the agent's keyring")
    }
}

fn ruleset() -> Result<RulesetCreated, RulesetError> {
    Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(ABI::V1))?
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(LANDLOCK))?
        .handle_access(AccessNet::from_all(LANDLOCK))?
        .scope(Scope::from_all(LANDLOCK))?
        .create()
}

/// Denies the calling thread, and the threads that it starts, all new files, TCP ports, abstract sockets and signals
/// to other processes, as far as the kernel can.
fn landlock() -> Result<(), RulesetError> {
    // A ruleset without rules allows nothing.
    ruleset()?.restrict_self().map(drop)
}

/// Checks that this host's kernel has Landlock.
///
/// # Errors
/// [`SandboxError::Landlock`], with the cure, if it has not.
pub fn landlock_available() -> Result<(), SandboxError> {
    ruleset().map(drop).map_err(SandboxError::Landlock)
}

/// Gives malloc one heap for all threads. Call it before the first thread starts.
///
/// When glibc shrinks the heap of another thread, at some time in the life of the process, it reads
/// `/proc/sys/vm/overcommit_memory`, and no thread may open files then. (One heap also saves memory: there are few
/// threads, and each has a cache before the heap.)
pub fn one_heap() {
    // SAFETY: sets a number in the allocator, under its own lock.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    // In a test the process's threads already have their own heaps: do not shrink these.
    #[cfg(test)]
    // SAFETY: as above.
    unsafe {
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX)
    };
}

/// Lowers the limits of a process that has all its threads: few new files, and files of 16 MiB, or of `longest` bytes
/// for a disk that is longer.
///
/// # Errors
/// [`SandboxError`] naming the step.
pub fn limit_files(spec: &SandboxSpec, longest: u64) -> Result<(), SandboxError> {
    if !spec.limits {
        return Ok(());
    }
    // A write beyond the limit fails then, and does not end the process.
    failed(
        register_signal_handler(SIGXFSZ, no_more).map_err(|e| io::Error::from_raw_os_error(e.errno())),
        "ignore a file that is too long",
    )?;
    let lowest = failed(io::stderr().as_fd().try_clone_to_owned(), "count its files")?;
    let files = u64::try_from(lowest.as_raw_fd()).unwrap_or(0).saturating_add(MORE_FILES);
    lower(Resource::Nofile, files, "limit its files")?;
    // A user cannot raise the hard limit of their own process. So an agent without root needs it as it is, or no disk could
    // be enlarged; no filter lets the vmm raise the limit by itself.
    let keep = spec.uid.is_none() && longest > 0;
    let longest = FILE_MAX.max(longest);
    let maximum = getrlimit(Resource::Fsize).maximum;
    let current = Some(maximum.map_or(longest, |maximum| maximum.min(longest)));
    let maximum = if keep { maximum } else { current };
    failed(setrlimit(Resource::Fsize, Rlimit { current, maximum }), "limit the length of files")
}

/// Forbids new threads and processes, also to a process without a seccomp filter. Call it after the vCPUs' first
/// KVM_RUN: there kernels from 6.13 on start a worker of the VM, which counts as a thread of this process.
///
/// # Errors
/// [`SandboxError`] naming the step.
pub fn forbid_threads(spec: &SandboxSpec) -> Result<(), SandboxError> {
    if spec.limits { lower(Resource::Nproc, 0, "forbid new threads") } else { Ok(()) }
}

fn lower(resource: Resource, limit: u64, what: &str) -> Result<(), SandboxError> {
    let limit = getrlimit(resource).maximum.map_or(limit, |maximum| maximum.min(limit));
    failed(setrlimit(resource, Rlimit { current: Some(limit), maximum: Some(limit) }), what)
}

extern "C" fn no_more(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

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
