// SPDX-License-Identifier: Apache-2.0

//! The commands that wait for a VM's task, and which of them overtake the others.

use std::collections::VecDeque;

use api::types::VmAction;
use tokio::sync::mpsc;
use tracing::Span;

use super::Command;

/// Commands that wait for a VM's task before their senders have to.
const QUEUE: usize = 32;

/// A command, and whose it is.
pub(super) type Sent = (Span, Command);

/// A VM's inbox, and how commands get there.
pub(super) fn new() -> (mpsc::Sender<Sent>, Inbox) {
    let (sender, commands) = mpsc::channel(QUEUE);
    (sender, Inbox { commands, passed: VecDeque::new() })
}

/// Commands in the order in which they came, but for those that end what cannot wait for its end.
pub(super) struct Inbox {
    commands: mpsc::Receiver<Sent>,
    /// Came before one that ends the VM was looked for. No more than [`QUEUE`].
    passed: VecDeque<Sent>,
}

impl Inbox {
    /// The next command; None when nobody can send one any more. Nothing is lost if it is not awaited to its end.
    pub(super) async fn next(&mut self) -> Option<Sent> {
        match self.passed.pop_front() {
            Some(sent) => Some(sent),
            None => self.commands.recv().await,
        }
    }

    /// The next command that ends the VM at `revision`, for which a boot does not go on: `stop` or a deletion. Those before it stay
    /// in their order. Nothing is lost if it is not awaited to its end.
    pub(super) async fn next_end(&mut self, revision: u64) -> Sent {
        while self.passed.len() < QUEUE {
            match self.commands.recv().await {
                Some(sent) if ends(&sent.1, revision) => return sent,
                Some(sent) => self.passed.push_back(sent),
                None => break,
            }
        }
        std::future::pending().await
    }
}

fn ends(command: &Command, revision: u64) -> bool {
    match command {
        Command::Act { action, .. } => *action == VmAction::Stop,
        // One of another revision is refused in its turn.
        Command::Delete { expect, .. } => expect.is_none_or(|expected| expected == revision),
        Command::Edit { .. } | Command::Lease { .. } | Command::EndLease { .. } | Command::Leave { .. } => {
            false
        }
    }
}
