// SPDX-License-Identifier: Apache-2.0

//! Passes a vmm's requests, events and reboots to the switch.
//!
//! They come straight from the task of the control connection. Each connection has a number, and the switch drops
//! messages of a former one: its vmm denies such a request by itself, and repeats such an event on the next connection.

use async_trait::async_trait;
use netpolicy::VmId;
use protocol::Ask;
use services::vmm_process::{RelayEvent, RelayEvents};
use tokio::sync::mpsc;
use tracing::Span;

use super::command::Command;

/// The number of a connection to a vmm, unique in the life of the switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LinkId(pub(super) u64);

/// The receiver of one connection's messages.
#[derive(Debug)]
pub struct Intake {
    vm: VmId,
    link: LinkId,
    commands: mpsc::Sender<(Span, Command)>,
    /// Room in the queue for the next message.
    room: Option<mpsc::OwnedPermit<(Span, Command)>>,
}

impl Intake {
    pub(super) fn new(vm: VmId, link: LinkId, commands: mpsc::Sender<(Span, Command)>) -> Self {
        Self { vm, link, commands, room: None }
    }
}

#[async_trait]
impl RelayEvents for Intake {
    async fn ready(&mut self) {
        if self.room.is_none() {
            // This fails only if the switch has ended; then the agent ends, too.
            self.room = self.commands.clone().reserve_owned().await.ok();
        }
    }

    fn take(&mut self, event: RelayEvent) {
        let (vm, link) = (self.vm, self.link);
        let command = match event {
            RelayEvent::Ask { id, ask: Ask::Mailbox { adapter, question } } => {
                Command::Ask { vm, link, adapter, id, question }
            }
            RelayEvent::Notice { adapter, notice, done } => {
                Command::Notice { vm, link, adapter, notice, done }
            }
            RelayEvent::Rebooted { done } => Command::Rebooted { vm, link, done },
        };
        if let Some(room) = self.room.take() {
            room.send((Span::none(), command));
        }
    }
}

/// Calls of tests, which play a vmm.
#[cfg(any(test, feature = "test-support"))]
impl Intake {
    /// The receiver of the same connection.
    pub fn again(&self) -> Self {
        Self::new(self.vm, self.link, self.commands.clone())
    }

    /// Sends a request of a guest.
    pub async fn ask(&mut self, adapter: String, id: u64, question: passthrough::relay::Question) {
        self.ready().await;
        self.take(RelayEvent::Ask { id, ask: Ask::Mailbox { adapter, question } });
    }

    /// Returns whether the vmm may forget the event.
    pub async fn notice(&mut self, adapter: String, notice: passthrough::relay::Notice) -> bool {
        let (done, recorded) = tokio::sync::oneshot::channel();
        self.ready().await;
        self.take(RelayEvent::Notice { adapter, notice, done });
        recorded.await.is_ok()
    }

    /// Returns whether the vmm may forget the reboot.
    pub async fn rebooted(&mut self) -> bool {
        let (done, noted) = tokio::sync::oneshot::channel();
        self.ready().await;
        self.take(RelayEvent::Rebooted { done });
        noted.await.is_ok()
    }
}
