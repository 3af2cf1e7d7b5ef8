// SPDX-License-Identifier: Apache-2.0

//! The commands that wait for a VM's task, and the order in which it takes them.

use std::collections::VecDeque;

use api::types::VmAction;
use tokio::sync::mpsc;
use tracing::Span;

use super::Command;

/// The most commands that wait for a VM's task before their senders have to wait.
const QUEUE: usize = 32;

/// A command, and the span of its request.
pub(super) type Sent = (Span, Command);

/// A VM's inbox, and the sender of its commands.
pub(super) fn new() -> (mpsc::Sender<Sent>, Inbox) {
    let (sender, commands) = mpsc::channel(QUEUE);
    (sender, Inbox { commands, passed: VecDeque::new() })
}

/// Commands in the order in which they came, except that a command to end the VM overtakes the others during a boot.
pub(super) struct Inbox {
    commands: mpsc::Receiver<Sent>,
    /// Commands that came before one that ends the VM. No more than [`QUEUE`].
    passed: VecDeque<Sent>,
}

impl Inbox {
    /// The next command; None when all senders are gone. Cancel-safe: a dropped future loses no command.
    pub(super) async fn next(&mut self) -> Option<Sent> {
        match self.passed.pop_front() {
            Some(sent) => Some(sent),
            None => self.commands.recv().await,
        }
    }

    /// The next command that ends the VM at `revision`, for which a boot is abandoned: `stop` or a deletion. The commands
    /// before it stay in their order. Cancel-safe, too.
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
        // A deletion at another revision is refused in its turn.
        Command::Delete { expect, .. } => expect.is_none_or(|expected| expected == revision),
        Command::Edit { .. }
        | Command::ResizeDisk { .. }
        | Command::Lease { .. }
        | Command::EndLease { .. }
        | Command::Leave { .. } => false,
    }
}
