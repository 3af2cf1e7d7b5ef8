// SPDX-License-Identifier: Apache-2.0

//! Records decisions in the database, writes them to the log and publishes them as events.
//!
//! A guest chooses how often and for which requests it is denied, so everything here is bounded.
//! Equal decisions share one record with a count. Records are limited for each VM, log lines for
//! each port. The event hub drops subscribers that do not read.

pub mod events;
mod lines;
mod table;
#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{self, Receiver, RecvTimeoutError, SyncSender, TrySendError},
    },
    thread,
    time::{Duration, Instant},
};

use api::types::{DecisionFilter, PortCounters};
use netpolicy::{Decision, PortId};
use rustix::{process::setpriority_process, thread::gettid};
use store::StoreError;
use tokio::sync::oneshot;

use self::{events::EventHub, lines::Lines, table::Decisions};

/// Records that are kept in all. The oldest go first.
pub const KEPT: u32 = 10_000;

/// Commands that are written in one transaction.
const BATCH: usize = 256;

/// Commands that wait for the thread. `vmm_process` limits each process of a VM, so this bound is
/// reached only if many processes have been taken over at once. Further decisions are counted in
/// the log and not recorded.
const WAITING: usize = 16_384;

/// The delay before records without a waiting caller are written. A guest busy-waits for the
/// response to its request, so disk and log must not come first. An agent that crashes in between
/// has answered requests that it did not record.
const GATHER: Duration = Duration::from_millis(10);

/// Minimum time between two transactions of records without a waiting caller. Each transaction
/// writes the same pages of the table and its indexes again, 28 KiB and more. The event of a relay
/// about a change has a waiting caller, and the next request of that VM waits behind it.
const PACE: Duration = Duration::from_millis(250);

/// Decisions that are kept while they cannot be stored, for example because the disk is full.
const UNSTORED: usize = 4096;

/// Time between two attempts to store them.
const RETRY: Duration = Duration::from_secs(1);

/// Niceness of the thread, -20 to 19 (`setpriority(2)`).
const NICE: i32 = 10;

type Reply<T> = oneshot::Sender<Result<T, StoreError>>;

enum Command {
    Record { decision: Box<Decision>, reply: Option<Reply<()>> },
    Query { filter: DecisionFilter, reply: Reply<Vec<Decision>> },
    Counters { reply: Reply<HashMap<PortId, PortCounters>> },
    Forget { port: PortId },
}

/// The handle of the log. The log's thread ends with the last handle.
#[derive(Clone, Debug)]
pub struct DecisionLog {
    commands: SyncSender<Command>,
    /// Decisions dropped because the queue was full, since the last log line about that.
    lost: Arc<AtomicU64>,
}

impl DecisionLog {
    /// Opens the log in the database at `path` and starts its thread. A
    /// [`SqliteStore`](store::SqliteStore) must have opened the database, and so migrated
    /// it, before. At most `kept` records stay.
    ///
    /// # Errors
    /// Those of the database, and of starting a thread.
    pub fn open(path: &Path, kept: u32, events: EventHub) -> Result<Self, StoreError> {
        let table = Decisions::open(path, kept)?;
        let (commands, inbox) = mpsc::sync_channel(WAITING);
        let lost = Arc::new(AtomicU64::new(0));
        let recorder = Recorder {
            table,
            events,
            lines: Lines::default(),
            lost: Arc::clone(&lost),
            unstored: Vec::new(),
            dropped: None,
            written: None,
        };
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
    /// Those of the database. The log has the line all the same.
    pub async fn record(&self, decision: Decision) -> Result<(), StoreError> {
        let (reply, done) = oneshot::channel();
        self.send(Command::Record { decision: Box::new(decision), reply: Some(reply) }).await?;
        done.await.map_err(|_| StoreError::Closed)?
    }

    /// Records a decision soon, for callers that must not wait for a disk.
    pub fn note(&self, decision: Decision) {
        // A closed channel needs no handling: without its thread the agent is about to end.
        let sent = self.commands.try_send(Command::Record { decision: Box::new(decision), reply: None });
        if let Err(TrySendError::Full(_)) = sent {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The number of decisions of every port.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn counters(&self) -> Result<HashMap<PortId, PortCounters>, StoreError> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Counters { reply }).await?;
        answer.await.map_err(|_| StoreError::Closed)?
    }

    /// Deletes the counts of a deleted port. The records of its decisions stay.
    pub async fn forget(&self, port: PortId) {
        // A row left behind does no harm.
        drop(self.send(Command::Forget { port }).await);
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
    /// Decisions that could not be stored yet, in order.
    unstored: Vec<Decision>,
    /// Decisions dropped for lack of room since storing failed; None while storing works.
    dropped: Option<usize>,
    /// The time of the last attempt to store records.
    written: Option<Instant>,
}

impl Recorder {
    fn run(mut self, inbox: &Receiver<Command>) {
        // Threads that answer guests go first when all want the same processor. If the kernel
        // refuses, they are only slower.
        let _ = setpriority_process(Some(gettid()), NICE);
        loop {
            let first = if self.unstored.is_empty() {
                inbox.recv().map_err(|_| RecvTimeoutError::Disconnected)
            } else {
                inbox.recv_timeout(RETRY)
            };
            let commands = match first {
                Ok(first) => self.gather(first, inbox),
                Err(RecvTimeoutError::Timeout) => Vec::new(),
                Err(RecvTimeoutError::Disconnected) => return,
            };
            let (mut decisions, mut replies, mut queries) = (Vec::new(), Vec::new(), Vec::new());
            let (mut counters, mut forgotten) = (Vec::new(), Vec::new());
            for command in commands {
                match command {
                    Command::Record { decision, reply } => {
                        self.lines.say(&decision);
                        decisions.push(*decision);
                        replies.extend(reply);
                    }
                    Command::Query { filter, reply } => queries.push((filter, reply)),
                    Command::Counters { reply } => counters.push(reply),
                    Command::Forget { port } => forgotten.push(port),
                }
            }
            let lost = self.lost.swap(0, Ordering::Relaxed);
            if lost > 0 {
                tracing::error!(
                    lost,
                    "Decisions arrive faster than the agent can write them: some are not recorded"
                );
            }
            self.record(decisions, replies);
            // A query sees the decisions recorded before it.
            for (filter, reply) in queries {
                drop(reply.send(self.table.query(&filter)));
            }
            for port in forgotten {
                if let Err(error) = self.table.forget(port) {
                    tracing::warn!(%port, "Cannot delete the counts of a port's decisions: {error}");
                }
            }
            for reply in counters {
                drop(reply.send(self.table.counters()));
            }
        }
    }

    /// The commands of one transaction: `first`, and those that arrive until the transaction is due
    /// or a command has a waiting caller.
    fn gather(&self, first: Command, inbox: &Receiver<Command>) -> Vec<Command> {
        let now = Instant::now();
        let due = self.written.map_or(now, |written| written + PACE).max(now + GATHER);
        let mut commands = vec![first];
        while commands.len() < BATCH && matches!(commands.last(), Some(Command::Record { reply: None, .. })) {
            match inbox.recv_timeout(due.saturating_duration_since(Instant::now())) {
                Ok(command) => commands.push(command),
                Err(_) => break,
            }
        }
        commands.extend(inbox.try_iter().take(BATCH.saturating_sub(commands.len())));
        commands
    }

    /// Keeps decisions that cannot be stored. Without room the newest are dropped, because the
    /// older ones led to them.
    fn keep(&mut self, mut decisions: Vec<Decision>) {
        let surplus = decisions.len().saturating_sub(UNSTORED);
        self.dropped = Some(self.dropped.unwrap_or(0).saturating_add(surplus));
        decisions.truncate(UNSTORED);
        self.unstored = decisions;
    }

    fn record(&mut self, mut decisions: Vec<Decision>, replies: Vec<Reply<()>>) {
        if !self.unstored.is_empty() {
            decisions.splice(0..0, self.unstored.drain(..));
        }
        if decisions.is_empty() {
            return;
        }
        // Retry at most once each RETRY, however many decisions guests cause: each attempt writes
        // all waiting ones.
        if self.dropped.is_some() && self.written.is_some_and(|tried| tried.elapsed() < RETRY) {
            self.keep(decisions);
            for reply in replies {
                drop(reply.send(Err(StoreError::NotWritten("earlier decisions still wait".into()))));
            }
            return;
        }
        let result = self.table.record(&decisions);
        self.written = Some(Instant::now());
        let error = match result {
            Ok(stored) => {
                if let Some(missing) = self.dropped.take() {
                    tracing::warn!(missing, "Decisions can be stored again; the waiting ones are stored");
                }
                for decision in stored {
                    self.events.publish_decision(decision);
                }
                None
            }
            Err(error) => {
                if self.dropped.is_none() {
                    tracing::error!("Cannot store decisions, which wait: {error}");
                }
                self.keep(decisions);
                Some(error.to_string())
            }
        };
        for reply in replies {
            drop(reply.send(match &error {
                None => Ok(()),
                Some(why) => Err(StoreError::NotWritten(why.clone())),
            }));
        }
    }
}
