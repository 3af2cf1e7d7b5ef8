// SPDX-License-Identifier: Apache-2.0

//! Events of interfaces, as hints to read a PF again.

use std::{io, thread, time::Duration};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use sriov::{Hint, Monitor};
use tokio::sync::mpsc;

/// Hints that may wait. When there are more, all PFs are read again.
const BACKLOG: usize = 64;

/// The longest time until the thread sees that its receiver is gone.
const LOOK: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// The pause after an error of the socket.
const PAUSE: Duration = Duration::from_secs(1);

/// Starts the thread that listens to the kernel. It ends when the receiver is gone.
///
/// # Errors
/// Those of opening the subscription and of starting a thread.
pub fn start() -> io::Result<mpsc::Receiver<Hint>> {
    let monitor = Monitor::open()?;
    let (hints, receiver) = mpsc::channel(BACKLOG);
    thread::Builder::new().name("pf-watch".into()).spawn(move || run(monitor, &hints))?;
    Ok(receiver)
}

fn run(mut monitor: Monitor, out: &mpsc::Sender<Hint>) {
    let mut overflow = false;
    while !out.is_closed() {
        let ready = poll(&mut [PollFd::new(&monitor, PollFlags::IN)], Some(&LOOK));
        let hints = match ready {
            Ok(0) => Vec::new(),
            Ok(_) => monitor.hints().unwrap_or_else(|error| {
                tracing::warn!("Cannot read interface events: {error}; the agent compares PFs instead");
                thread::sleep(PAUSE);
                vec![Hint::All]
            }),
            Err(rustix::io::Errno::INTR) => Vec::new(),
            Err(_) => {
                thread::sleep(PAUSE);
                vec![Hint::All]
            }
        };
        for hint in hints {
            overflow |= out.try_send(hint).is_err();
        }
        if overflow && out.try_send(Hint::All).is_ok() {
            overflow = false;
        }
    }
}
