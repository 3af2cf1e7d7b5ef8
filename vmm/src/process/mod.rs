// SPDX-License-Identifier: Apache-2.0

//! The per-VM process: `portcullis vmm FD UUID`.
//!
//! The process starts with a listening control socket and its log, and nothing else. The agent sends it the machine's
//! specification. It serves one event loop (event-manager) until the machine has ended. The loop owns the machine;
//! vCPUs and relays send it messages.

mod commands;
mod event_loop;
mod event_queue;
mod resets;
#[cfg(test)]
mod tests;

use std::{
    os::fd::{FromRawFd, OwnedFd, RawFd},
    process::ExitCode,
    time::Instant,
};

use event_manager::{EventManager, SubscriberOps};
use failpoints::{Point, reach};
use protocol::Listener;
use uuid::Uuid;

use self::event_loop::Process;

/// The subcommand of `portcullis` that runs this process.
pub const SUBCOMMAND: &str = "vmm";

/// The exit status after wrong arguments.
const USAGE: u8 = 2;

/// Runs the process. `arguments` are those after [`SUBCOMMAND`]: the number of the inherited listening socket, and
/// the VM's id.
#[must_use]
pub fn main(arguments: &[String]) -> ExitCode {
    let started = Instant::now();
    crate::sandbox::one_heap();
    let Some((listener, vm)) = parse(arguments) else {
        tracing::error!("Only the agent starts {SUBCOMMAND}, as: {SUBCOMMAND} LISTENER_FD VM_UUID");
        return ExitCode::from(USAGE);
    };
    reach(Point::VmmStarted);
    match serve(Listener::from_fd(listener), vm, started) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%vm, "{}", crate::machine::chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn parse(arguments: &[String]) -> Option<(OwnedFd, Uuid)> {
    let [fd, vm] = arguments else { return None };
    let fd: RawFd = fd.parse().ok().filter(|fd| *fd > 2)?;
    let vm = vm.parse().ok()?;
    // SAFETY: by contract with the agent, this process inherited the descriptor for this purpose and has no other
    // owner of it; if the number is no descriptor, the first system call on it fails, no more.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC).ok()?;
    Some((fd, vm))
}

/// Errors of the process's set-up and of its event loop.
#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error("Cannot make an eventfd")]
    EventFd(#[from] std::io::Error),
    #[error("The event loop failed")]
    Loop(#[from] event_manager::Error),
}

fn serve(listener: Listener, vm: Uuid, started: Instant) -> Result<(), ServeError> {
    let mut events = EventManager::<Process>::new()?;
    let id = events.add_subscriber(Process::new(listener, vm, started)?);
    loop {
        let process = events.subscriber_mut(id)?;
        process.make_due_reset();
        process.make_due_pause();
        if process.finished() {
            process.take_down();
            return Ok(());
        }
        let timeout = process.wake_after_ms();
        events.run_with_timeout(timeout)?;
    }
}
