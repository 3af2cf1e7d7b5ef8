// SPDX-License-Identifier: Apache-2.0

//! Commands to a disk that runs: only its own thread may touch its file and its state.

use std::{
    io,
    sync::mpsc::{Receiver, SyncSender, sync_channel},
};

use devices::io_thread::IoEvent;

use crate::limit::Limits;

/// The most commands that wait for a thread that is busy.
const WAITING: usize = 16;

/// A command to a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Replaces the limits.
    Limit(Limits),
}

/// The machine's end: sends commands to the disk's thread.
#[derive(Clone, Debug)]
pub struct Remote {
    commands: SyncSender<Command>,
    event: IoEvent,
}

impl Remote {
    /// Sends a command. Returns false if the thread is busy with others, or has ended.
    #[must_use]
    pub fn send(&self, command: Command) -> bool {
        let sent = self.commands.try_send(command).is_ok();
        self.event.signal();
        sent
    }
}

/// The disk's end.
#[derive(Debug)]
pub(super) struct Inbox {
    pub(super) commands: Receiver<Command>,
    pub(super) event: IoEvent,
}

/// Makes both ends.
pub(super) fn pair() -> io::Result<(Remote, Inbox)> {
    let event = IoEvent::new()?;
    let (sender, commands) = sync_channel(WAITING);
    Ok((Remote { commands: sender, event: event.clone() }, Inbox { commands, event }))
}
