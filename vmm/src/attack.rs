// SPDX-License-Identifier: Apache-2.0

//! Attacks from a vmm that its guest has taken over: for tests, in a build of their own (feature `attacks`).
//!
//! A kernel command line `attack=NAME@THREAD` makes a machine try the attack NAME on the thread whose filter is
//! called THREAD. The attack takes the place of the code that faces the guest: it runs after the thread's filter is
//! installed and before anything else, on a vCPU at its first run. The process of a simulated PF takes the same word
//! from its environment, [`VARIABLE`]. The result is a line in the process's log, `ATTACK NAME@THREAD: succeeded` or
//! `… failed: CAUSE`, unless the kernel has ended the process.
//!
//! An attack succeeds if it reaches something outside of the process. Something that the sandbox leaves harmless (a
//! socket in an empty network) is no success. The targets are prepared before the process gives up its privileges, so
//! that without a sandbox each attack succeeds.

use std::{
    ffi::{CStr, CString},
    fs,
    io::{self, Write},
    net::TcpListener,
    os::{
        fd::RawFd,
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener},
    },
    path::PathBuf,
    process,
    sync::OnceLock,
    thread,
    time::Duration,
};

use libc::{c_long, sockaddr_in, sockaddr_nl, sockaddr_un};
use netpolicy::Request;
use passthrough::relay::{GuestRequest, RelayEvent};
use protocol::{AgentRequest, DeviceLoss, ToAgent, VmmEvent};

/// The targets of attacks.
struct Targets {
    what: String,
    thread: String,
    /// The agent: a process of another user.
    agent: usize,
    /// An address that is mapped in the agent.
    address: usize,
    /// A TCP port of the host.
    port: u16,
    /// A name in the host's abstract sockets.
    name: Vec<u8>,
    /// The path where this process listens, as other processes of the host see it.
    control: Vec<u8>,
    /// A piece of System V shared memory.
    shared: usize,
    host_name: Vec<u8>,
    /// A VFIO group that no process has opened, if there is one.
    group: Option<CString>,
    /// A file that does not exist, in a directory that any user may write to.
    file: CString,
}

/// The environment variable with the attack's word, for a process that has no guest's command line.
pub const VARIABLE: &str = "PORTCULLIS_ATTACK_FOR_TESTS";

static TARGETS: OnceLock<Targets> = OnceLock::new();

const KEY: &CStr = c"portcullis-attack";
const KEY_TYPE: &CStr = c"user";
/// `KEY_SPEC_SESSION_KEYRING`.
const SESSION: usize = -3_isize as usize;
/// The exit status of an attack's child.
const CHILD: usize = 0;

/// More descriptors than the process has.
const MOST_FILES: usize = 128;

type Attempt = fn(&Targets) -> io::Result<()>;

/// All attacks.
const ATTEMPTS: &[(&str, Attempt)] = &[
    ("open_file", |_| open(c"/etc/passwd", libc::O_RDONLY)),
    ("create_file", |targets| {
        open(&targets.file, libc::O_WRONLY | libc::O_CREAT)?;
        call(libc::SYS_unlink, [pointer(&targets.file), 0, 0, 0, 0, 0]).map(drop)
    }),
    ("list_processes", |_| open(c"/proc", libc::O_RDONLY | libc::O_DIRECTORY)),
    ("open_vfio", |_| open(c"/dev/vfio/vfio", libc::O_RDWR)),
    ("open_vfio_group", |targets| match &targets.group {
        Some(group) => open(group, libc::O_RDWR),
        None => Err(io::ErrorKind::NotFound.into()),
    }),
    ("connect_tcp", connect_tcp),
    ("connect_unix", |targets| connect_unix(libc::SOCK_SEQPACKET, &targets.control)),
    ("connect_abstract", |targets| connect_unix(libc::SOCK_STREAM, &targets.name)),
    ("netlink", netlink),
    ("packet_socket", |_| socket(libc::AF_PACKET, libc::SOCK_RAW, 0x0300).map(drop)),
    ("signal_agent", |targets| {
        call(libc::SYS_kill, [targets.agent, number(libc::SIGCONT), 0, 0, 0, 0]).map(drop)
    }),
    ("ptrace_agent", |targets| call(libc::SYS_ptrace, [number(0x4206), targets.agent, 0, 0, 0, 0]).map(drop)),
    ("read_agent_memory", read_agent_memory),
    ("take_agent_descriptor", |targets| {
        let pidfd = call(libc::SYS_pidfd_open, [targets.agent, 0, 0, 0, 0, 0])?;
        call(libc::SYS_pidfd_getfd, [pidfd, 0, 0, 0, 0, 0]).map(drop)
    }),
    ("agent_limits", |targets| {
        let mut limit = [0_u64; 2];
        let arguments = [targets.agent, 7, 0, limit.as_mut_ptr() as usize, 0, 0];
        call(libc::SYS_prlimit64, arguments).map(drop)
    }),
    ("shared_memory", |targets| {
        call(libc::SYS_shmat, [targets.shared, 0, number(libc::SHM_RDONLY), 0, 0, 0]).map(drop)
    }),
    ("mount", |_| call(libc::SYS_fsopen, [pointer(c"tmpfs"), 0, 0, 0, 0, 0]).map(drop)),
    ("change_root", |_| call(libc::SYS_chroot, [pointer(c"/"), 0, 0, 0, 0, 0]).map(drop)),
    ("become_root", |_| call(libc::SYS_setresuid, [0; 6]).map(drop)),
    ("host_name", |targets| {
        let arguments = [targets.host_name.as_ptr() as usize, targets.host_name.len(), 0, 0, 0, 0];
        call(libc::SYS_sethostname, arguments).map(drop)
    }),
    ("fork", |_| fork(0)),
    ("user_namespace", |_| fork(libc::CLONE_NEWUSER)),
    ("exec", |_| exec()),
    ("bpf", |_| bpf()),
    ("perf", |_| perf()),
    ("keyring", |_| {
        const SEARCH: usize = 10;
        call(libc::SYS_keyctl, [SEARCH, SESSION, pointer(KEY_TYPE), pointer(KEY), 0, 0]).map(drop)
    }),
    // Only the filters stop these. They reach nothing outside of the process, but help an attacker.
    ("map_code", |_| {
        let (protection, flags) =
            (libc::PROT_READ | libc::PROT_EXEC, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        call(libc::SYS_mmap, [0, 4096, number(protection), number(flags), usize::MAX, 0]).map(drop)
    }),
    ("memory_file", |_| call(libc::SYS_memfd_create, [pointer(KEY), 0, 0, 0, 0, 0]).map(drop)),
    ("io_uring", |_| {
        let mut parameters = [0_u8; 120];
        call(libc::SYS_io_uring_setup, [1, parameters.as_mut_ptr() as usize, 0, 0, 0, 0]).map(drop)
    }),
    ("socket_pair", |_| {
        let mut pair = [0_i32; 2];
        let arguments =
            [number(libc::AF_UNIX), number(libc::SOCK_STREAM), 0, pair.as_mut_ptr() as usize, 0, 0];
        call(libc::SYS_socketpair, arguments).map(drop)
    }),
    // They misuse the files of disks and NICs, which the process has.
    ("unlock_disk", |_| {
        // Another VM could write the disk, too.
        let unlock = libc::flock {
            l_type: i16::try_from(libc::F_UNLCK).unwrap_or_default(),
            l_whence: 0,
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        let unlock = (&raw const unlock) as usize;
        with_any_file(libc::SYS_fcntl, [0, number(libc::F_OFD_SETLK), unlock, 0, 0, 0])
    }),
    // More than the disk has.
    ("take_room", |_| with_any_file(libc::SYS_fallocate, [0, 0, 0, 2 << 20, 0, 0])),
    ("keep_tap", |_| {
        // It would stay on its bridge without the process.
        let request = usize::try_from(libc::TUNSETPERSIST).unwrap_or_default();
        let keep = |keep| with_any_file(libc::SYS_ioctl, [0, request, keep, 0, 0, 0]);
        keep(1)?;
        keep(0)
    }),
    // The process may do these, and the agent must ignore them.
    ("forge_messages", |_| forge()),
    ("pass_descriptor", |_| pass_descriptor()),
    // The same on a machine that has run for long: an error before that is a failed boot.
    ("forge_messages_later", |_| later(forge)),
    ("pass_descriptor_later", |_| later(pass_descriptor)),
];

/// Prepares the targets of the attack that the command line names, if it names one. The process still has its
/// privileges, and listens at the descriptor `listener`.
///
/// # Errors
/// A target that cannot be prepared.
pub fn arm(cmdline: &str, listener: RawFd) -> io::Result<()> {
    let Some(word) = cmdline.split_ascii_whitespace().find_map(|word| word.strip_prefix("attack=")) else {
        return Ok(());
    };
    let (what, thread) = word.split_once('@').ok_or(io::ErrorKind::InvalidInput)?;
    let agent = call(libc::SYS_getppid, [0; 6])?;
    let maps = fs::read_to_string(format!("/proc/{agent}/maps"))?;
    let address = maps.split('-').next().and_then(|first| usize::from_str_radix(first, 16).ok());
    let tcp = TcpListener::bind("127.0.0.1:0")?;
    let port = tcp.local_addr()?.port();
    std::mem::forget(tcp);
    let name = format!("portcullis-attack-{}", process::id());
    let file = CString::new(format!("/tmp/{name}"))?;
    let name = name.into_bytes();
    let unix = UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name)?)?;
    std::mem::forget(unix);
    let payload = b"secret";
    let key = [pointer(KEY_TYPE), pointer(KEY), payload.as_ptr() as usize, payload.len(), SESSION, 0];
    call(libc::SYS_add_key, key)?;
    let shared = call(libc::SYS_shmget, [number(libc::IPC_PRIVATE), 4096, 0o1600, 0, 0, 0])?;
    // Keep the segment attached and marked for removal: it goes with the process.
    call(libc::SYS_shmat, [shared, 0, 0, 0, 0, 0])?;
    call(libc::SYS_shmctl, [shared, number(libc::IPC_RMID), 0, 0, 0, 0])?;
    let targets = Targets {
        what: what.to_owned(),
        thread: thread.to_owned(),
        agent,
        address: address.ok_or(io::ErrorKind::InvalidData)?,
        port,
        name: [&[0], &name[..]].concat(),
        control: path_of(listener)?,
        shared,
        host_name: fs::read_to_string("/proc/sys/kernel/hostname")?.trim().into(),
        group: free_group(),
        file,
    };
    // A machine is built once.
    drop(TARGETS.set(targets));
    Ok(())
}

fn free_group() -> Option<CString> {
    let groups = fs::read_dir("/dev/vfio").ok()?.flatten().map(|entry| entry.path());
    let numbered = |path: &PathBuf| {
        path.file_name().is_some_and(|name| name.as_encoded_bytes().iter().all(u8::is_ascii_digit))
    };
    // A group in use is busy.
    let free = |path: &PathBuf| fs::File::options().read(true).write(true).open(path).is_ok();
    let group = groups.filter(numbered).find(free)?;
    CString::new(group.into_os_string().into_encoded_bytes()).ok()
}

fn path_of(listener: RawFd) -> io::Result<Vec<u8>> {
    let mut address = [0_u8; size_of::<sockaddr_un>()];
    let mut len = u32::try_from(address.len()).unwrap_or(0);
    let (buffer, len) = (address.as_mut_ptr() as usize, (&raw mut len) as usize);
    call(libc::SYS_getsockname, [number(listener), buffer, len, 0, 0, 0])?;
    let path = address.get(2..).unwrap_or_default();
    Ok(path.iter().copied().take_while(|byte| *byte != 0).collect())
}

/// Tries the attack if it is for this thread, and logs the result.
pub fn strike(thread: &str) {
    let Some(targets) = TARGETS.get().filter(|targets| targets.thread == thread) else { return };
    let attempt = ATTEMPTS.iter().find(|(name, _)| *name == targets.what);
    let outcome = match attempt.map(|(_, attempt)| undisturbed(|| attempt(targets))) {
        None => "is unknown".to_owned(),
        Some(Ok(())) => "succeeded".to_owned(),
        Some(Err(error)) => format!("failed: {error}"),
    };
    // The test misses a line that cannot be written.
    let _ = writeln!(io::stderr(), "ATTACK {}@{thread}: {outcome}", targets.what);
}

/// Runs an attack with signals blocked. The event loop, which waits for the vCPU, kicks it by a signal now and then:
/// that would interrupt a blocking call, and end a program that has taken the vCPU's place without a handler for it.
fn undisturbed(attempt: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    let mask = |how: i32, new: &u64, old: &mut u64| {
        let (new, old) = (std::ptr::from_ref(new) as usize, std::ptr::from_mut(old) as usize);
        call(libc::SYS_rt_sigprocmask, [number(how), new, old, size_of::<u64>(), 0, 0])
    };
    let mut before = 0;
    mask(libc::SIG_SETMASK, &u64::MAX, &mut before)?;
    let outcome = attempt();
    mask(libc::SIG_SETMASK, &before, &mut 0)?;
    outcome
}

fn number(value: i32) -> usize {
    // As the C library does: sign-extended.
    value as isize as usize
}

fn pointer(text: &CStr) -> usize {
    text.as_ptr() as usize
}

/// Makes one system call. A library might make others in its place.
fn call(what: c_long, a: [usize; 6]) -> io::Result<usize> {
    // SAFETY: none that the kernel would not give: addresses are of live objects of the right size, and the effects
    // of successful calls on this process are undone by its end. It is for tests, which attack their own process.
    let result = unsafe { libc::syscall(what, a[0], a[1], a[2], a[3], a[4], a[5]) };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Makes a system call with each descriptor as its first argument, until it succeeds.
fn with_any_file(what: c_long, arguments: [usize; 6]) -> io::Result<()> {
    let [_, rest @ ..] = arguments;
    let [a, b, c, d, e] = rest;
    let mut outcome = Err(io::ErrorKind::NotFound.into());
    for file in 3..MOST_FILES {
        outcome = call(what, [file, a, b, c, d, e]).map(drop);
        if outcome.is_ok() {
            break;
        }
    }
    outcome
}

fn open(path: &CStr, flags: i32) -> io::Result<()> {
    call(libc::SYS_openat, [number(libc::AT_FDCWD), pointer(path), number(flags), 0o600, 0, 0]).map(drop)
}

fn socket(family: i32, kind: i32, protocol: usize) -> io::Result<usize> {
    call(libc::SYS_socket, [number(family), number(kind), protocol, 0, 0, 0])
}

fn connect_tcp(targets: &Targets) -> io::Result<()> {
    let socket = socket(libc::AF_INET, libc::SOCK_STREAM, 0)?;
    let address = sockaddr_in {
        sin_family: 2,
        sin_port: targets.port.to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes([127, 0, 0, 1]) },
        sin_zero: [0; 8],
    };
    let len = size_of::<sockaddr_in>();
    call(libc::SYS_connect, [socket, (&raw const address) as usize, len, 0, 0, 0]).map(drop)
}

fn connect_unix(kind: i32, name: &[u8]) -> io::Result<()> {
    let socket = socket(libc::AF_UNIX, kind, 0)?;
    let mut address = [&1_u16.to_ne_bytes()[..], name].concat();
    if name.first() != Some(&0) {
        address.push(0);
    }
    call(libc::SYS_connect, [socket, address.as_ptr() as usize, address.len(), 0, 0, 0]).map(drop)
}

/// Sets the queue length of the loopback interface to its present value: harmless, and still a change.
fn netlink(_: &Targets) -> io::Result<()> {
    let socket = socket(libc::AF_NETLINK, libc::SOCK_RAW, 0)?;
    // RTM_NEWLINK with an acknowledgement, for interface 1; IFLA_TXQLEN (13) of 1000.
    let mut message = Vec::new();
    for word in [40_u32, 16 | (5 << 16), 1, 0, 0, 1, 0, 0] {
        message.extend(word.to_ne_bytes());
    }
    for half in [8_u16, 13] {
        message.extend(half.to_ne_bytes());
    }
    message.extend(1000_u32.to_ne_bytes());
    let mut address = [0_u8; size_of::<sockaddr_nl>()];
    address[..2].copy_from_slice(&16_u16.to_ne_bytes());
    let to = [socket, message.as_ptr() as usize, message.len(), 0, address.as_ptr() as usize, address.len()];
    call(libc::SYS_sendto, to)?;
    let mut answer = [0_u8; 256];
    let len = call(libc::SYS_recvfrom, [socket, answer.as_mut_ptr() as usize, answer.len(), 0, 0, 0])?;
    let error = answer.get(16..20).filter(|_| len >= 20).and_then(|bytes| bytes.try_into().ok());
    match error.map(i32::from_ne_bytes) {
        Some(0) => Ok(()),
        Some(error) => Err(io::Error::from_raw_os_error(error.saturating_neg())),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

fn read_agent_memory(targets: &Targets) -> io::Result<()> {
    let mut byte = [0_u8; 1];
    let (ours, theirs) = ([byte.as_mut_ptr() as usize, 1], [targets.address, 1]);
    let arguments = [targets.agent, ours.as_ptr() as usize, 1, theirs.as_ptr() as usize, 1, 0];
    call(libc::SYS_process_vm_readv, arguments).map(drop)
}

/// Starts a child, which ends at once.
fn fork(flags: i32) -> io::Result<()> {
    let child = call(libc::SYS_clone, [number(flags | libc::SIGCHLD), 0, 0, 0, 0, 0])?;
    if child == 0 {
        drop(call(libc::SYS_exit_group, [CHILD, 0, 0, 0, 0, 0]));
    }
    Ok(())
}

/// Runs another program, which prints that it runs.
fn exec() -> io::Result<()> {
    let targets = TARGETS.get().map(|targets| targets.thread.as_str()).unwrap_or_default();
    let script = format!("echo 'ATTACK exec@{targets}: succeeded' >&2\0");
    let arguments = [pointer(c"sh"), pointer(c"-c"), script.as_ptr() as usize, 0];
    let environment = [0_usize];
    let all = [pointer(c"/bin/sh"), arguments.as_ptr() as usize, environment.as_ptr() as usize, 0, 0, 0];
    call(libc::SYS_execve, all).map(drop)
}

/// Loads a program for a network interface: `r0 = 0; exit`.
fn bpf() -> io::Result<()> {
    const PROG_LOAD: usize = 5;
    const SCHED_CLS: u32 = 3;
    let program: [u64; 2] = [0xb7, 0x95];
    let license = c"GPL";
    let mut attributes = [0_u8; 128];
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(place) = attributes.get_mut(at..at.saturating_add(bytes.len())) {
            place.copy_from_slice(bytes);
        }
    };
    put(0, &SCHED_CLS.to_ne_bytes());
    put(4, &2_u32.to_ne_bytes());
    put(8, &(program.as_ptr() as u64).to_ne_bytes());
    put(16, &(license.as_ptr() as u64).to_ne_bytes());
    call(libc::SYS_bpf, [PROG_LOAD, attributes.as_ptr() as usize, attributes.len(), 0, 0, 0]).map(drop)
}

/// Counts events of all processes on a CPU.
fn perf() -> io::Result<()> {
    let mut attributes = [0_u32; 32];
    // PERF_TYPE_SOFTWARE, the structure's size; PERF_COUNT_SW_CPU_CLOCK is 0.
    attributes[0] = 1;
    attributes[1] = 128;
    call(libc::SYS_perf_event_open, [attributes.as_ptr() as usize, usize::MAX, 0, usize::MAX, 0, 0]).map(drop)
}

/// Claims over this VM's own connection that another VM's adapter, `victim`, asks and has been granted.
fn forge() -> io::Result<()> {
    let adapter = || "victim".to_owned();
    let address = "02:00:00:00:00:99".parse().map_err(io::Error::other)?;
    let guest_request = GuestRequest { seq: 1, request: Request::SetMac(address) };
    let messages = [
        ToAgent::Request { id: 1, request: AgentRequest::Mailbox { adapter: adapter(), guest_request } },
        ToAgent::Event { seq: 1, event: VmmEvent::Relay { adapter: adapter(), event: RelayEvent::PfReset } },
    ];
    let mut sent = 0;
    for fd in 4..64 {
        for message in &messages {
            let message = serde_json::to_vec(message)?;
            let flags = number(libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT);
            let done = call(libc::SYS_sendto, [fd, message.as_ptr() as usize, message.len(), flags, 0, 0]);
            sent += usize::from(done.is_ok());
        }
    }
    if sent > 0 { Ok(()) } else { Err(io::ErrorKind::NotConnected.into()) }
}

/// Tries an attack in two seconds.
fn later(attempt: fn() -> io::Result<()>) -> io::Result<()> {
    thread::Builder::new().spawn(move || {
        thread::sleep(Duration::from_secs(2));
        attempt()
    })?;
    Ok(())
}

/// Passes a descriptor to the agent, beside a message that the protocol allows.
fn pass_descriptor() -> io::Result<()> {
    let event = VmmEvent::DeviceLost { bdf: "0000:00:00.0".to_owned(), why: DeviceLoss::Failed };
    let message = serde_json::to_vec(&ToAgent::Event { seq: u64::MAX, event })?;
    let vector = [message.as_ptr() as usize, message.len()];
    // struct cmsghdr: its length, SOL_SOCKET and SCM_RIGHTS, then a descriptor: stdin.
    let rights = [20_usize, 1 | 1 << 32, 0];
    let control = [rights.as_ptr() as usize, size_of_val(&rights)];
    let header = [0, 0, vector.as_ptr() as usize, 1, control[0], control[1], 0_usize];
    let flags = number(libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT);
    let sent = (4..64)
        .filter(|fd| call(libc::SYS_sendmsg, [*fd, header.as_ptr() as usize, flags, 0, 0, 0]).is_ok())
        .count();
    if sent > 0 { Ok(()) } else { Err(io::ErrorKind::NotConnected.into()) }
}
