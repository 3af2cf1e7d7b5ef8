// SPDX-License-Identifier: Apache-2.0

//! The way of a vmm's requests, events and reboots to the switch.
//!
//! They come straight from the task of the control connection. Each connection has a number, and the switch drops what
//! comes by a former one: its vmm denies such a request by itself, and repeats such an event.

use async_trait::async_trait;
use netpolicy::VmId;
use tokio::sync::mpsc;
use tracing::Span;
use vmm::control::Ask;

use super::command::Command;
use crate::vmm_process::{RelayEvent, RelayEvents};

/// The number of a connection to a vmm: one of a switch's whole life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LinkId(pub(super) u64);

/// The receiver of one connection's messages.
#[derive(Clone, Debug)]
pub struct Intake {
    pub(super) vm: VmId,
    pub(super) link: LinkId,
    pub(super) commands: mpsc::Sender<(Span, Command)>,
}

#[async_trait]
impl RelayEvents for Intake {
    async fn take(&mut self, event: RelayEvent) {
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
        // If the switch has ended, the agent ends.
        drop(self.commands.send((Span::none(), command)).await);
    }
}

/// Calls of tests, which play a vmm.
#[cfg(test)]
impl Intake {
    pub(crate) async fn ask(&mut self, adapter: String, id: u64, question: passthrough::relay::Question) {
        self.take(RelayEvent::Ask { id, ask: Ask::Mailbox { adapter, question } }).await;
    }

    /// Returns when the vmm may forget the event.
    pub(crate) async fn notice(&mut self, adapter: String, notice: passthrough::relay::Notice) {
        let (done, recorded) = tokio::sync::oneshot::channel();
        self.take(RelayEvent::Notice { adapter, notice, done }).await;
        drop(recorded.await);
    }

    /// Returns when the vmm may forget the reboot.
    pub(crate) async fn rebooted(&mut self) {
        let (done, noted) = tokio::sync::oneshot::channel();
        self.take(RelayEvent::Rebooted { done }).await;
        drop(noted.await);
    }
}
