// SPDX-License-Identifier: Apache-2.0

//! Passes a vmm's requests, events and reboots to the switch.
//!
//! The task of the control connection delivers them directly. Each connection has a number, and the switch drops
//! the messages of a former connection. The vmm denies such a request by itself, and repeats such an event on the
//! next connection.

use async_trait::async_trait;
use netpolicy::VmId;
use protocol::AgentRequest;
use services::vmm_process::{RelayMessage, RelayMessages};
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
impl RelayMessages for Intake {
    async fn ready(&mut self) {
        if self.room.is_none() {
            // This fails only if the switch has ended; then the agent ends, too.
            self.room = self.commands.clone().reserve_owned().await.ok();
        }
    }

    fn take(&mut self, message: RelayMessage) {
        let (vm, link) = (self.vm, self.link);
        let command = match message {
            RelayMessage::Request { id, request: AgentRequest::Mailbox { adapter, guest_request } } => {
                Command::Request { vm, link, adapter, id, guest_request }
            }
            RelayMessage::Event { adapter, event, done } => {
                Command::RelayEvent { vm, link, adapter, event, done }
            }
            RelayMessage::Rebooted { done } => Command::Rebooted { vm, link, done },
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
    pub async fn request(
        &mut self,
        adapter: String,
        id: u64,
        guest_request: passthrough::relay::GuestRequest,
    ) {
        self.ready().await;
        self.take(RelayMessage::Request { id, request: AgentRequest::Mailbox { adapter, guest_request } });
    }

    /// Returns whether the vmm may forget the event.
    pub async fn event(&mut self, adapter: String, event: passthrough::relay::RelayEvent) -> bool {
        let (done, recorded) = tokio::sync::oneshot::channel();
        self.ready().await;
        self.take(RelayMessage::Event { adapter, event, done });
        recorded.await.is_ok()
    }

    /// Returns whether the vmm may forget the reboot.
    pub async fn rebooted(&mut self) -> bool {
        let (done, noted) = tokio::sync::oneshot::channel();
        self.ready().await;
        self.take(RelayMessage::Rebooted { done });
        noted.await.is_ok()
    }
}
