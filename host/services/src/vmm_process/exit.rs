// SPDX-License-Identifier: Apache-2.0

//! The identity of a process, and its end.

use std::{
    fs, io,
    os::{fd::OwnedFd, unix::process::ExitStatusExt},
    process::Child,
};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use tokio::io::{Interest, unix::AsyncFd};
use uuid::Uuid;

use super::{async_fd::polled, spawn::CONTROL_FD};

/// Identifies one process for ever: a process id alone is reused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Process id.
    pub pid: i32,
    /// Start time in clock ticks since the host's boot (`/proc/PID/stat`, field 22).
    pub start_time: u64,
    /// The host's boot (`/proc/sys/kernel/random/boot_id`).
    pub boot_id: String,
}

impl Identity {
    /// The identity of the process that has this id now.
    ///
    /// # Errors
    /// `NotFound` if there is no such process.
    pub fn of(pid: i32) -> io::Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned();
        // The second field is the command's name in parentheses, which may hold any character.
        let start_time = stat
            .rsplit_once(')')
            .and_then(|(_, rest)| rest.split_ascii_whitespace().nth(19))
            .and_then(|field| field.parse().ok())
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "/proc/PID/stat has no start time"))?;
        Ok(Self { pid, start_time, boot_id })
    }
}

/// The way in which a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// With an exit code.
    Code(i32),
    /// By a signal.
    Signal(i32),
    /// Unknown, because a former agent started the process.
    Unknown,
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exited with status {code}"),
            Self::Signal(libc::SIGSYS) => f.write_str(
                "was killed by SIGSYS, since it made a system call that its seccomp filter does not allow (the host's kernel \
                 log has its number),",
            ),
            Self::Signal(signal) => write!(f, "was killed by signal {signal}"),
            Self::Unknown => write!(f, "ended"),
        }
    }
}

/// A process that is watched through a pidfd. Dropping it leaves the process alone.
#[derive(Debug)]
pub struct Process {
    identity: Identity,
    pidfd: AsyncFd<OwnedFd>,
    child: Option<Child>,
}

impl Process {
    /// Watches a child that was just started.
    ///
    /// # Errors
    /// Those of `pidfd_open`; the child is killed then.
    pub fn of_child(mut child: Child) -> io::Result<Self> {
        // Until it is waited for, no other process can get the child's process id.
        let watched = i32::try_from(child.id())
            .map_err(io::Error::other)
            .and_then(|pid| Ok((Identity::of(pid)?, open(pid)?)));
        match watched {
            Ok((identity, pidfd)) => Ok(Self { identity, pidfd, child: Some(child) }),
            Err(error) => {
                // Without a pidfd the agent could neither watch nor end the child.
                drop(child.kill());
                drop(child.wait());
                Err(error)
            }
        }
    }

    /// Watches a process that a former agent started; None if it has ended.
    ///
    /// # Errors
    /// Those of `pidfd_open`, other than that there is no such process.
    pub fn find(identity: &Identity) -> io::Result<Option<Self>> {
        let pidfd = match open(identity.pid) {
            Ok(pidfd) => pidfd,
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
            Err(error) => return Err(error),
        };
        // Compare after the descriptor is open: if the identity is still the same, the descriptor
        // belongs to this process.
        match Identity::of(identity.pid) {
            Ok(now) if now == *identity => Ok(Some(Self { identity: identity.clone(), pidfd, child: None })),
            _ => Ok(None),
        }
    }

    /// Finds the vmm of an agent that died between starting it for `vm` and storing its identity;
    /// None if there is none.
    ///
    /// The vmm is known by its arguments, those of [`spawn`](super::spawn()), and by its user. Any
    /// user can give a process any arguments, but not the agent's user, which a vmm has until it
    /// gets its configuration.
    ///
    /// # Errors
    /// Those of reading `/proc` and of `pidfd_open`.
    pub fn of_vm(vm: Uuid) -> io::Result<Option<Self>> {
        let own = rustix::process::geteuid().as_raw();
        let is_it = |pid: i32| {
            let Ok(status) = fs::read_to_string(format!("/proc/{pid}/status")) else { return false };
            let users = status.lines().find_map(|line| line.strip_prefix("Uid:")).unwrap_or_default();
            // Check the user first: another user's arguments may lie in memory (FUSE) that delays a
            // read for as long as that user likes.
            if !users.split_ascii_whitespace().all(|user| user.parse() == Ok(own)) {
                return false;
            }
            let Ok(arguments) = fs::read(format!("/proc/{pid}/cmdline")) else { return false };
            let arguments = arguments.strip_suffix(&[0]).unwrap_or(&arguments);
            let mut last = arguments.rsplit(|byte| *byte == 0);
            (last.next(), last.next())
                == (Some(vm.to_string().as_bytes()), Some(CONTROL_FD.to_string().as_bytes()))
        };
        for entry in fs::read_dir("/proc")? {
            let name = entry?.file_name();
            let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
            // A process that ends meanwhile is skipped.
            if is_it(pid)
                && let Ok(identity) = Identity::of(pid)
                && let Some(process) = Self::find(&identity)?
                && is_it(pid)
            {
                return Ok(Some(process));
            }
        }
        Ok(None)
    }

    /// The identity of the process.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Waits for its end. Cancel-safe.
    pub async fn ended(&mut self) -> Exit {
        // An error here means that the descriptor cannot be polled. Waiting for the child is all
        // that remains.
        drop(self.pidfd.readable().await);
        let status = self.child.as_mut().and_then(|child| child.wait().ok());
        match status {
            Some(status) => match (status.code(), status.signal()) {
                (Some(code), _) => Exit::Code(code),
                (None, Some(signal)) => Exit::Signal(signal),
                (None, None) => Exit::Unknown,
            },
            None => Exit::Unknown,
        }
    }

    /// Kills the process. It is no error if it has already ended.
    pub fn kill(&self) {
        let _ = pidfd_send_signal(self.pidfd.get_ref(), Signal::KILL);
    }
}

fn open(pid: i32) -> io::Result<AsyncFd<OwnedFd>> {
    let pid = Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidInput)?;
    polled(pidfd_open(pid, PidfdFlags::empty())?, Interest::READABLE)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[tokio::test]
    async fn a_child_s_end_is_seen_with_its_status() {
        let mut process = Process::of_child(Command::new("false").spawn().unwrap()).unwrap();
        assert_eq!(process.ended().await, Exit::Code(1));
        assert!(Process::find(process.identity()).unwrap().is_none());
        let mut process = Process::of_child(Command::new("sleep").arg("60").spawn().unwrap()).unwrap();
        process.kill();
        assert_eq!(process.ended().await, Exit::Signal(9));
    }

    #[tokio::test]
    async fn a_reused_process_id_is_not_mistaken() {
        let mine = Identity::of(i32::try_from(std::process::id()).unwrap()).unwrap();
        assert!(Process::find(&mine).unwrap().is_some());
        let other = Identity { start_time: mine.start_time + 1, ..mine.clone() };
        assert!(Process::find(&other).unwrap().is_none());
        let before = Identity { boot_id: "another boot".into(), ..mine };
        assert!(Process::find(&before).unwrap().is_none());
    }
}
