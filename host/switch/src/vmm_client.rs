// SPDX-License-Identifier: Apache-2.0

//! The switch's interface to a VM's process.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use netpolicy::StandingRefusal;
use protocol::{AgentResponse, Outcome, VmmCommand};
use services::vmm_process::{CommandError, Connection};
use tokio::sync::mpsc;

/// A vmm process as the switch needs it.
#[async_trait]
pub trait Vmm: Send + Sync + 'static {
    /// Sends a command and waits for its completion.
    ///
    /// # Errors
    /// See [`CommandError`].
    async fn command(&self, command: VmmCommand, patience: Duration) -> Result<Outcome, CommandError>;

    /// Sends the response to a request without waiting. If the vmm does not receive it, it is lost.
    fn respond(&self, id: u64, response: AgentResponse);

    /// Sets the standing denial of an adapter's relay, without waiting. The relay denies the
    /// covered requests without the agent. After None it sends all requests to the agent.
    fn set_standing_refusal(&self, adapter: &str, refusal: Option<StandingRefusal>);

    /// Closes the connection: the switch neither uses it nor keeps it open.
    fn close(&self);

    /// Requests that the VM be stopped, because its process did not carry out a command. Does not
    /// wait.
    fn stop(&self, why: &str);
}

/// A vmm process behind its control connection.
#[derive(Debug)]
pub struct VmLink {
    /// The lock is held only to copy the handle.
    connection: Mutex<Option<Connection>>,
    stop: mpsc::Sender<String>,
}

impl VmLink {
    /// Wraps `connection` to a process. The receiver of `stop` must kill the process and clean up.
    #[must_use]
    pub fn new(connection: Connection, stop: mpsc::Sender<String>) -> Self {
        Self { connection: Mutex::new(Some(connection)), stop }
    }

    fn connection(&self) -> Option<Connection> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[async_trait]
impl Vmm for VmLink {
    async fn command(&self, command: VmmCommand, patience: Duration) -> Result<Outcome, CommandError> {
        match self.connection() {
            Some(connection) => connection.command(command, Vec::new(), patience).await,
            None => Err(CommandError::Lost),
        }
    }

    fn respond(&self, id: u64, response: AgentResponse) {
        if let Some(connection) = self.connection() {
            connection.respond(id, response);
        }
    }

    fn set_standing_refusal(&self, adapter: &str, refusal: Option<StandingRefusal>) {
        if let Some(connection) = self.connection() {
            connection.set_standing_refusal(adapter, refusal);
        }
    }

    fn close(&self) {
        *self.connection.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn stop(&self, why: &str) {
        // A full channel means that a stop is already requested.
        drop(self.stop.try_send(why.to_owned()));
    }
}
