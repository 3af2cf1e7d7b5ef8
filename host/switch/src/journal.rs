// SPDX-License-Identifier: Apache-2.0

//! Stores the state of ports while the switch goes on. The store carries out the writes in the
//! order of the calls; those that wait together share one durable write.

use netpolicy::PortId;
use services::line_rate::PortLog;
use store::Table;
use text::chain;
use tokio::sync::oneshot;

use super::record::Attachment;

/// Writes ports to the store.
#[derive(Clone)]
pub(super) struct Journal {
    table: Table<Attachment>,
    log: PortLog,
}

impl Journal {
    pub(super) fn new(table: Table<Attachment>, log: PortLog) -> Self {
        Self { table, log }
    }

    /// Saves a port. The receiver gets the result of the durable write; an error is the reason.
    pub(super) fn save(&self, port: PortId, value: &Attachment) -> oneshot::Receiver<Result<(), String>> {
        self.submit(port, Some(value))
    }

    /// Forgets a port.
    pub(super) fn forget(&self, port: PortId) -> oneshot::Receiver<Result<(), String>> {
        self.submit(port, None)
    }

    fn submit(&self, port: PortId, value: Option<&Attachment>) -> oneshot::Receiver<Result<(), String>> {
        let (done, written) = oneshot::channel();
        let log = self.log.clone();
        self.table.submit(port.0, value, move |result| {
            let result = result.map_err(|error| chain(&error));
            if let Err(why) = &result {
                log.line(port, |suppressed| {
                    tracing::error!(%port, suppressed, "The state of a port cannot be stored: {why}");
                });
            }
            let _ = done.send(result);
        });
        written
    }
}
