// SPDX-License-Identifier: Apache-2.0

//! Starting a vmm process.

use std::{
    ffi::OsString,
    fs::File,
    io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::{Command, Stdio},
};

use protocol::Listener;
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use uuid::Uuid;

use super::{Process, VmDirectory};

/// The descriptor at which the vmm finds its listening socket.
pub(super) const CONTROL_FD: i32 = 3;

/// `linux/close_range.h`: marks descriptors as close-on-exec instead of closing them.
const CLOSE_RANGE_CLOEXEC: u32 = 4;

/// Bytes that a vmm may lock beyond guest memory: device windows, rings of the kernel.
pub const MEMLOCK_SLACK: u64 = 64 * 1024 * 1024;

/// The program that is started as a vmm.
#[derive(Clone, Debug)]
pub struct Program {
    /// The executable.
    pub path: OsString,
    /// Arguments before those that every vmm gets (`3 VM`).
    pub arguments: Vec<OsString>,
}

impl Default for Program {
    /// This very binary, even if the file has been replaced by an upgrade.
    fn default() -> Self {
        Self { path: "/proc/self/exe".into(), arguments: vec!["vmm".into()] }
    }
}

/// Why a vmm process could not be started.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The VM's directory, socket or log cannot be prepared.
    #[error("The VM's directory under the run directory cannot be prepared")]
    Directory(#[source] io::Error),
    /// `fork`, `exec` or `pidfd_open` failed.
    #[error("The vmm process cannot be started")]
    Process(#[source] io::Error),
    /// The limit of lockable memory is too low.
    #[error(
        "The VM needs {need} bytes of lockable memory for device DMA, and the limit is {limit} bytes: set \
         LimitMEMLOCK=infinity in the agent's service, or `ulimit -l unlimited` before it starts"
    )]
    Memlock {
        /// Guest memory and slack, in bytes.
        need: u64,
        /// The hard limit, in bytes.
        limit: u64,
    },
}

/// Starts a vmm in `directory`, which exists, with a listening control socket. The vmm inherits
/// that socket and nothing else, has a session of its own, and outlives the agent.
///
/// # Errors
/// Nothing is left running after an error.
pub fn spawn(program: &Program, directory: &VmDirectory, vm: Uuid) -> Result<Process, SpawnError> {
    let listener = directory.bind().map_err(SpawnError::Directory)?;
    let log = directory.create_log().map_err(SpawnError::Directory)?;
    let errors = log.try_clone().map_err(SpawnError::Directory)?;
    // Occupy number 3, if it is free. Otherwise the child's end of the pipe that reports a failed
    // exec could get it, and the socket would replace that end.
    let _taken = File::open("/dev/null").map_err(SpawnError::Process)?;
    let mut command = Command::new(&program.path);
    command
        .args(&program.arguments)
        .arg(CONTROL_FD.to_string())
        .arg(vm.to_string())
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(errors);
    if let Some(level) = std::env::var_os("PORTCULLIS_LOG") {
        command.env("PORTCULLIS_LOG", level);
    }
    #[cfg(feature = "test-support")]
    for name in [failpoints::VARIABLE, failpoints::HOLD] {
        command.envs(std::env::var_os(name).map(|at| (name, at)));
    }
    pass(&mut command, &listener);
    let child = command.spawn().map_err(SpawnError::Process)?;
    Process::of_child(child).map_err(SpawnError::Process)
}

/// Gives the child a session of its own, and no descriptors but 0, 1 and 2.
pub fn isolate(command: &mut Command) {
    let prepare = || {
        rustix::process::setsid()?;
        // The agent's own descriptors are close-on-exec. Those that it inherited from its parent
        // need not be.
        // SAFETY: plain system call on numbers; it marks descriptors of this child and closes none.
        let marked =
            unsafe { libc::syscall(libc::SYS_close_range, CONTROL_FD, u32::MAX, CLOSE_RANGE_CLOEXEC) };
        if marked < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    };
    // SAFETY: between fork and exec the closure makes system calls only; it allocates nothing and takes no lock.
    unsafe { command.pre_exec(prepare) };
}

/// Gives the child `listener` as descriptor 3, and isolates it otherwise.
fn pass(command: &mut Command, listener: &Listener) {
    // Isolate first: that marks all descriptors from 3 on as close-on-exec, and the next step
    // clears the mark of 3.
    isolate(command);
    let socket = listener.as_raw_fd();
    let prepare = move || {
        if socket == CONTROL_FD {
            // SAFETY: the descriptor is open (the listener outlives `spawn`), and it is this child's own copy.
            let own = std::mem::ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(CONTROL_FD) });
            rustix::io::fcntl_setfd(&*own, rustix::io::FdFlags::empty())?;
        } else {
            // SAFETY: plain system call on two numbers. Number 3 of this child is not used by anything that outlives
            // this call: it is about to execute another program, and its other descriptors are close-on-exec.
            if unsafe { libc::dup2(socket, CONTROL_FD) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes system calls only; it allocates nothing and takes no lock.
    unsafe { command.pre_exec(prepare) };
}

/// Lets `process` lock `need` bytes of memory and no more: the vmm has no CAP_IPC_LOCK when it maps
/// them for DMA.
///
/// # Errors
/// [`SpawnError::Memlock`] if the hard limit is lower and this process may not raise it.
pub fn limit_memlock(process: &Process, need: u64) -> Result<(), SpawnError> {
    let limit = getrlimit(Resource::Memlock);
    let exact = Rlimit { current: Some(need), maximum: Some(need) };
    let Some(pid) = Pid::from_raw(process.identity().pid) else {
        return Err(SpawnError::Process(io::ErrorKind::InvalidInput.into()));
    };
    match prlimit(Some(pid), Resource::Memlock, exact) {
        Ok(_) => Ok(()),
        Err(rustix::io::Errno::PERM) => {
            Err(SpawnError::Memlock { need, limit: limit.maximum.unwrap_or(u64::MAX) })
        }
        Err(error) => Err(SpawnError::Process(error.into())),
    }
}

/// Lets `process` write files of the length that `longest` makes of the present limit, if that is more. A process without a
/// limit keeps none.
///
/// # Errors
/// Those of `prlimit(2)`: this process may not raise the limit of another user's process, or a hard limit.
pub fn allow_longer_files(process: &Process, longest: impl Fn(u64) -> u64) -> io::Result<()> {
    let pid = process.identity().pid;
    // Every process may read it, and a limit that suffices needs no privilege here (proc(5)).
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits"))?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max file size")).unwrap_or_default();
    let mut words = line.split_ascii_whitespace().map(|word| word.parse::<u64>().ok());
    let (Some(Some(now)), maximum) = (words.next(), words.next().flatten()) else { return Ok(()) };
    let longest = longest(now);
    if longest <= now {
        return Ok(());
    }
    let limit = Rlimit { current: Some(longest), maximum: maximum.map(|maximum| maximum.max(longest)) };
    Ok(prlimit(Pid::from_raw(pid), Resource::Fsize, limit).map(drop)?)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use protocol::Channel;

    use super::*;
    use crate::vmm_process::Exit;

    fn shell(script: &str) -> Program {
        Program { path: "/bin/sh".into(), arguments: vec!["-c".into(), script.into(), "vmm".into()] }
    }

    fn directory() -> (tempfile::TempDir, VmDirectory, Uuid) {
        let run = tempfile::tempdir().unwrap();
        let vm = Uuid::new_v4();
        let directory = VmDirectory::new(run.path(), vm);
        directory.create().unwrap();
        (run, directory, vm)
    }

    #[tokio::test]
    async fn the_child_has_its_socket_as_3_its_arguments_and_nothing_else() {
        let (_run, directory, vm) = directory();
        let script =
            "echo $1 $2; readlink /proc/$$/fd/3; cut -d' ' -f6 /proc/$$/stat; echo $$; exec ls /proc/self/fd";
        // A descriptor that the agent's own parent left open must not reach the vmm either.
        let leak = rustix::io::fcntl_dupfd_cloexec(File::open("/dev/null").unwrap(), 200).unwrap();
        rustix::io::fcntl_setfd(&leak, rustix::io::FdFlags::empty()).unwrap();
        let mut process = spawn(&shell(script), &directory, vm).unwrap();
        assert_eq!(process.ended().await, Exit::Code(0));
        let log = directory.log_tail();
        let lines: Vec<&str> = log.lines().collect();
        assert_eq!(lines[0], format!("3 {vm}"));
        assert!(lines[1].starts_with("socket:["), "{log}");
        assert_eq!(lines[2], lines[3], "the session is its own");
        // 4 is the directory that `ls` reads.
        assert_eq!(lines[4..], ["0", "1", "2", "3", "4"]);
    }

    #[tokio::test]
    async fn the_socket_is_refused_once_the_child_is_gone() {
        let (_run, directory, vm) = directory();
        let mut process = spawn(&shell("exec sleep 60"), &directory, vm).unwrap();
        let _connection = Channel::connect(&directory.control()).unwrap();
        process.kill();
        process.ended().await;
        let deadline = Instant::now() + Duration::from_secs(5);
        // Another test's fork may hold a copy of the listener until its exec.
        while Channel::connect(&directory.control()).is_ok() {
            assert!(Instant::now() < deadline);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    #[tokio::test]
    async fn a_child_that_nobody_noted_is_found_by_its_vm() {
        let (_run, directory, vm) = directory();
        assert!(Process::of_vm(vm).unwrap().is_none());
        let mut process = spawn(&shell("kill -STOP $$"), &directory, vm).unwrap();
        // Until its exec the child is a copy of this test.
        let deadline = Instant::now() + Duration::from_secs(5);
        let mut found = loop {
            match Process::of_vm(vm).unwrap() {
                Some(found) => break found,
                None => assert!(Instant::now() < deadline),
            }
        };
        assert_eq!(found.identity(), process.identity());
        assert!(Process::of_vm(Uuid::new_v4()).unwrap().is_none(), "another VM's");
        found.kill();
        found.ended().await;
        assert_eq!(process.ended().await, Exit::Signal(9));
        assert!(Process::of_vm(vm).unwrap().is_none());
    }

    #[tokio::test]
    async fn a_program_that_does_not_exist_is_an_error() {
        let (_run, directory, vm) = directory();
        let program = Program { path: "/nonexistent".into(), arguments: Vec::new() };
        assert!(matches!(spawn(&program, &directory, vm), Err(SpawnError::Process(_))));
    }

    #[tokio::test]
    async fn files_may_get_longer_only_where_they_had_a_limit() {
        let (_run, first, vm) = directory();
        let longest = |process: &Process| {
            let limits = std::fs::read_to_string(format!("/proc/{}/limits", process.identity().pid)).unwrap();
            let line = limits.lines().find(|line| line.starts_with("Max file size")).unwrap();
            line.split_ascii_whitespace().nth(3).unwrap().to_owned()
        };
        let mut free = spawn(&shell("exec sleep 60"), &first, vm).unwrap();
        allow_longer_files(&free, |now| now + 4096).unwrap();
        assert_eq!(longest(&free), "unlimited");
        let (_other, directory, vm) = directory();
        let mut limited = spawn(&shell("ulimit -S -f 64; exec sleep 60"), &directory, vm).unwrap();
        let deadline = Instant::now() + Duration::from_secs(5);
        while longest(&limited) != "32768" {
            assert!(Instant::now() < deadline);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        allow_longer_files(&limited, |now| now + 4096).unwrap();
        assert_eq!(longest(&limited), "36864");
        allow_longer_files(&limited, |_| 4096).unwrap();
        assert_eq!(longest(&limited), "36864", "never lower");
        for process in [&mut free, &mut limited] {
            process.kill();
            process.ended().await;
        }
    }

    #[tokio::test]
    async fn lockable_memory_is_what_is_needed_or_refused_with_numbers_and_cure() {
        let (_run, directory, vm) = directory();
        let mut process = spawn(&shell("read x < /dev/zero; exec sleep 60"), &directory, vm).unwrap();
        let need = (1 << 30) + MEMLOCK_SLACK;
        match limit_memlock(&process, need) {
            Ok(()) => {
                let limits =
                    std::fs::read_to_string(format!("/proc/{}/limits", process.identity().pid)).unwrap();
                let line = limits.lines().find(|line| line.starts_with("Max locked memory")).unwrap();
                let soft = line.split_ascii_whitespace().nth(3).unwrap();
                assert_eq!(soft.parse::<u64>().unwrap(), need, "{line}");
            }
            Err(error) => {
                let hard = getrlimit(Resource::Memlock).maximum.expect("no limit can be too small");
                assert!(hard < need);
                let text = error.to_string();
                assert!(text.contains(&need.to_string()) && text.contains(&hard.to_string()), "{text}");
                assert!(text.contains("LimitMEMLOCK"), "{text}");
            }
        }
        process.kill();
        process.ended().await;
    }
}
