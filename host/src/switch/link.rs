// SPDX-License-Identifier: Apache-2.0

//! The switch's end of the way to a VM's process.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use netpolicy::StandingRefusal;
use tokio::sync::mpsc;
use vmm::control::{Answer, Order, Outcome};

use crate::vmm_process::{Connection, OrderError};

/// A vmm process as the switch needs it.
#[async_trait]
pub trait Vmm: Send + Sync + 'static {
    /// Orders something and waits for its outcome.
    ///
    /// # Errors
    /// See [`OrderError`].
    async fn order(&self, order: Order, patience: Duration) -> Result<Outcome, OrderError>;

    /// Answers a question, at once. What a vmm does not take is lost.
    fn answer(&self, id: u64, answer: Answer);

    /// Has the relay of an adapter refuse without a question what is refused in any case; None: it asks. At once.
    fn set_standing_refusal(&self, adapter: &str, refusal: Option<StandingRefusal>);

    /// The connection is over: it is not used, nor kept open, any more.
    fn close(&self);

    /// Has the VM stopped: its process does not do what it must. Does not wait.
    fn stop(&self, why: &str);
}

/// A vmm process behind its control connection.
#[derive(Debug)]
pub struct VmLink {
    /// A lock that is held to copy the handle only.
    connection: Mutex<Option<Connection>>,
    stop: mpsc::Sender<String>,
}

impl VmLink {
    /// The way to the process at the other end of `connection`. Who listens to `stop` kills it and cleans up.
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
    async fn order(&self, order: Order, patience: Duration) -> Result<Outcome, OrderError> {
        match self.connection() {
            Some(connection) => connection.order(order, Vec::new(), patience).await,
            None => Err(OrderError::Lost),
        }
    }

    fn answer(&self, id: u64, answer: Answer) {
        if let Some(connection) = self.connection() {
            connection.answer(id, answer);
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
        // A full channel means that it has been told.
        drop(self.stop.try_send(why.to_owned()));
    }
}
