// SPDX-License-Identifier: Apache-2.0

//! Writes the state of ports, so that the switch need not wait. States that change while a write is
//! under way share the next one: an edit that reaches a hundred ports costs one durable write.

use std::collections::BTreeMap;

use netpolicy::PortId;
use tokio::sync::{mpsc, oneshot};

use super::record::Attachment;
use crate::{store::Table, vm::problem::chain};

/// A port's newest value; None if the port is deleted.
type Value = Option<Box<Attachment>>;

/// The result of the write: the reason if the value is not durable.
type Done = oneshot::Sender<Result<(), String>>;

/// The handle of the task, which ends with its last handle.
#[derive(Clone, Debug)]
pub(super) struct Writer(mpsc::UnboundedSender<(PortId, Value, Done)>);

impl Writer {
    pub(super) fn start(table: Table<Attachment>) -> Self {
        let (sender, inbox) = mpsc::unbounded_channel();
        tokio::spawn(run(table, inbox));
        Self(sender)
    }

    /// Saves a port; the receiver gets the result of the durable write. Values of one port that
    /// wait together are written once, as the newest.
    pub(super) fn save(&self, port: PortId, value: Attachment) -> oneshot::Receiver<Result<(), String>> {
        self.send(port, Some(Box::new(value)))
    }

    /// Forgets a port.
    pub(super) fn forget(&self, port: PortId) -> oneshot::Receiver<Result<(), String>> {
        self.send(port, None)
    }

    fn send(&self, port: PortId, value: Value) -> oneshot::Receiver<Result<(), String>> {
        let (done, receiver) = oneshot::channel();
        // If the task is gone, so is `done`, which the receiver sees.
        drop(self.0.send((port, value, done)));
        receiver
    }
}

async fn run(table: Table<Attachment>, mut inbox: mpsc::UnboundedReceiver<(PortId, Value, Done)>) {
    while let Some(first) = inbox.recv().await {
        let mut newest: BTreeMap<PortId, (Value, Vec<Done>)> = BTreeMap::new();
        let mut next = Some(first);
        while let Some((port, value, done)) = next {
            let entry = newest.entry(port).or_default();
            entry.0 = value;
            entry.1.push(done);
            next = inbox.try_recv().ok();
        }
        let records: Vec<_> = newest.iter().map(|(port, (value, _))| (port.0, value.as_deref())).collect();
        let written = table.write(&records).await.map_err(|error| chain(&error));
        if let Err(error) = &written {
            tracing::error!(ports = records.len(), "The state of ports cannot be stored: {error}");
        }
        for done in newest.into_values().flat_map(|(_, waiting)| waiting) {
            let _ = done.send(written.clone());
        }
    }
}
