// SPDX-License-Identifier: Apache-2.0

//! What was decided: recorded in the database, said in the log, told to subscribers.
//!
//! A guest chooses how often it is refused and what for, so everything here is bounded: equal decisions are counted in
//! one record, a port has a share of the records and of the log lines, and subscribers that do not read are left behind.

pub mod events;
mod lines;
mod table;
#[cfg(test)]
mod tests;

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{self, Receiver, SyncSender, TrySendError},
    },
    thread,
    time::Duration,
};

use api::types::{DecisionFilter, EventKind};
use netpolicy::Decision;
use rustix::{process::setpriority_process, thread::gettid};
use tokio::sync::oneshot;

use self::{events::EventHub, lines::Lines, table::Decisions};
use crate::store::StoreError;

/// Records that are kept in all, the oldest go first.
pub const KEPT: u32 = 10_000;

/// Commands that are written in one transaction.
const BATCH: usize = 256;

/// Commands that wait for the thread. More come only if many processes of VMs have been taken over at once, each of which may cause
/// no more than `vmm_process` lets it; what is more is counted in the log, and not recorded.
const WAITING: usize = 16_384;

/// What nobody waits for is written this much later. A guest waits, busily, for the answer to what was decided: the disk and
/// the log must not be served before it. An agent that crashes in between has answered what it did not record.
const GATHER: Duration = Duration::from_millis(10);

/// Niceness of the thread, -20 to 19 (`setpriority(2)`).
const NICE: i32 = 10;

type Reply<T> = oneshot::Sender<Result<T, StoreError>>;

enum Command {
    Record { decision: Box<Decision>, reply: Option<Reply<()>> },
    Query { filter: DecisionFilter, reply: Reply<Vec<Decision>> },
}

/// The handle of the log, whose thread ends with its last handle.
#[derive(Clone, Debug)]
pub struct DecisionLog {
    commands: SyncSender<Command>,
    /// Decisions for which there was no place, since that was last told.
    lost: Arc<AtomicU64>,
}

impl DecisionLog {
    /// Opens the log in the database at `path`, which a [`SqliteStore`](crate::store::SqliteStore) has opened (and so
    /// migrated) before, and starts its thread. At most `kept` records stay.
    ///
    /// # Errors
    /// Those of the database, and of starting a thread.
    pub fn open(path: &Path, kept: u32, events: EventHub) -> Result<Self, StoreError> {
        let table = Decisions::open(path, kept)?;
        let (commands, inbox) = mpsc::sync_channel(WAITING);
        let lost = Arc::new(AtomicU64::new(0));
        let recorder = Recorder { table, events, lines: Lines::default(), lost: Arc::clone(&lost) };
        thread::Builder::new()
            .name("decisions".into())
            .spawn(move || recorder.run(&inbox))
            .map_err(|source| StoreError::Open { path: path.to_path_buf(), source })?;
        Ok(Self { commands, lost })
    }

    async fn send(&self, mut command: Command) -> Result<(), StoreError> {
        loop {
            command = match self.commands.try_send(command) {
                Ok(()) => return Ok(()),
                Err(TrySendError::Full(command)) => command,
                Err(TrySendError::Disconnected(_)) => return Err(StoreError::Closed),
            };
            tokio::time::sleep(GATHER).await;
        }
    }

    /// Records a decision; returns when it is in the database.
    ///
    /// # Errors
    /// Those of the database. The line is in the log all the same.
    pub async fn record(&self, decision: Decision) -> Result<(), StoreError> {
        let (reply, done) = oneshot::channel();
        self.send(Command::Record { decision: Box::new(decision), reply: Some(reply) }).await?;
        done.await.map_err(|_| StoreError::Closed)?
    }

    /// Records a decision soon: for those who cannot wait for a disk.
    pub fn note(&self, decision: Decision) {
        // Without its thread the agent is about to end.
        let sent = self.commands.try_send(Command::Record { decision: Box::new(decision), reply: None });
        if let Err(TrySendError::Full(_)) = sent {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Decisions that pass the filter, the latest first.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn query(&self, filter: DecisionFilter) -> Result<Vec<Decision>, StoreError> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Query { filter, reply }).await?;
        answer.await.map_err(|_| StoreError::Closed)?
    }
}

struct Recorder {
    table: Decisions,
    events: EventHub,
    lines: Lines,
    lost: Arc<AtomicU64>,
}

impl Recorder {
    fn run(mut self, inbox: &Receiver<Command>) {
        // Behind the threads that answer guests, if all want the same processor. Refused, it is only slower.
        let _ = setpriority_process(Some(gettid()), NICE);
        while let Ok(first) = inbox.recv() {
            if matches!(first, Command::Record { reply: None, .. }) {
                thread::sleep(GATHER);
            }
            let more = inbox.try_iter().take(BATCH);
            let (mut decisions, mut replies, mut queries) = (Vec::new(), Vec::new(), Vec::new());
            for command in std::iter::once(first).chain(more) {
                match command {
                    Command::Record { decision, reply } => {
                        self.lines.say(&decision);
                        decisions.push(*decision);
                        replies.extend(reply);
                    }
                    Command::Query { filter, reply } => queries.push((filter, reply)),
                }
            }
            let lost = self.lost.swap(0, Ordering::Relaxed);
            if lost > 0 {
                tracing::error!(
                    lost,
                    "Decisions came faster than they can be written: some are not recorded"
                );
            }
            self.record(decisions, replies);
            // A query sees what was recorded before it was asked.
            for (filter, reply) in queries {
                drop(reply.send(self.table.query(&filter)));
            }
        }
    }

    fn record(&mut self, decisions: Vec<Decision>, replies: Vec<Reply<()>>) {
        if decisions.is_empty() {
            return;
        }
        let result = self.table.record(decisions);
        let error = match result {
            Ok(stored) => {
                for decision in stored {
                    self.events.publish(EventKind::Decision { decision: Box::new(decision.into()) });
                }
                None
            }
            Err(error) => {
                tracing::error!("Decisions cannot be stored: {error}");
                Some(error.to_string())
            }
        };
        for reply in replies {
            drop(reply.send(match &error {
                None => Ok(()),
                Some(_) => Err(StoreError::Closed),
            }));
        }
    }
}
