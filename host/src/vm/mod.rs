// SPDX-License-Identifier: Apache-2.0

//! One task per VM owns its life. All other parts send it commands and read copies of its status.
//!
//! ```text
//!             boot
//!  Defined ─────────▶ Starting ──────────────────▶ Running ◀─────────▶ Paused
//!                      │ │                         │  ▲    pause/resume  │
//!  Stopped ──boot──▶   │ │ cannot                  ▼  │ reboot, guest    │
//!                      │ ▼                      Rebooting   reset        │
//!  Failed ◀────────────│─┴── crash, machine failure ──┤                  │
//!    └────boot──▶      └──────────────────────┐       ▼                  │
//!  Stopped ◀──────────────────── Stopping ◀───┴ stop ─┴──────────────────┘
//!             process gone, functions released; guest power-off likewise
//! ```
//!
//! The task also boots a VM by itself: some time after the VM's end (`restart`), or at the agent's start (`autostart`).
//!
//! Only `actor` changes the state. Its causes are commands (the API), events (the vmm, which the guest may have taken
//! over: events move a VM between Running, Paused and Rebooting, or to its end, never back) and the process's exit.

mod actor;
mod boot;
pub mod claims;
mod command_queue;
pub mod problem;
pub mod record;
pub mod scrub;
pub mod switch_client;
pub mod unknown;

use std::sync::Arc;

use api::{
    Caller, Lease, LeaseTerms, Missing,
    problem::{Problem, ProblemCode},
    types::{DiskSize, Name, VmAction, VmLease, VmOperation, VmSpec, VmState},
};
use services::vmm_process::Connection;
use store::Entry;
use tokio::sync::{mpsc, oneshot, watch};
use tracing::Span;
use uuid::Uuid;

use self::{
    claims::Held,
    record::{Asked, RunRecord, VmRecord},
};
use crate::environment::Environment;

/// The completion of an action, with its success or its failure.
pub type Completion = oneshot::Receiver<Result<(), Problem>>;

/// A command to a VM's task.
enum Command {
    /// Begin an action. `begun` receives whether the task has begun it.
    Act { action: VmAction, caller: Caller, by: Asked, begun: oneshot::Sender<Result<Completion, Problem>> },
    /// Replace the specification, if the VM is at this revision.
    Edit {
        caller: Caller,
        spec: Box<VmSpec>,
        expect: Option<u64>,
        done: oneshot::Sender<Result<(), Problem>>,
    },
    /// Enlarge a disk of the running VM.
    ResizeDisk { caller: Caller, wanted: DiskSize, done: oneshot::Sender<Result<(), Problem>> },
    /// Give the VM's lease to a client: the VM lives by it from now on.
    Lease { terms: LeaseTerms, done: oneshot::Sender<Result<Lease, Problem>> },
    /// End the lease: the VM lives on without one.
    EndLease { done: oneshot::Sender<Result<(), Problem>> },
    /// Stop the VM, release its functions and delete it, if it is at this revision. The task ends.
    Delete { caller: Caller, expect: Option<u64>, done: oneshot::Sender<Result<(), Problem>> },
    /// The agent ends; the VM runs on. The task ends.
    Leave { done: oneshot::Sender<()> },
}

/// The origin of a VM that a task begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// It has just been stored.
    Created,
    /// It has just been stored, and lives by a lease.
    CreatedLeased(LeaseTerms),
    /// The agent has just started.
    Found,
}

/// A VM at one moment.
#[derive(Clone, Debug, Default)]
pub struct Status {
    /// Its state, as stored.
    pub run: RunRecord,
    /// The functions that it holds.
    pub held: Vec<Held>,
    /// The long operation of its task, if one is under way.
    pub operation: Option<VmOperation>,
    /// The lease that it lives by.
    pub lease: Option<VmLease>,
}

/// The handle of a VM's task.
#[derive(Clone)]
pub struct VmHandle {
    /// The VM's id.
    pub id: Uuid,
    commands: mpsc::Sender<(Span, Command)>,
    status: watch::Receiver<Status>,
    record: watch::Receiver<Arc<Entry<VmRecord>>>,
    connection: watch::Receiver<Option<Connection>>,
    console: watch::Receiver<u64>,
}

impl VmHandle {
    /// Starts the task of a VM that has just been stored.
    pub fn start(env: Arc<Environment>, record: Entry<VmRecord>) -> Self {
        Self::spawn(env, record, Origin::Created)
    }

    /// Starts the task of a VM that has just been stored and lives by a lease. No client has taken the lease yet.
    pub fn start_leased(env: Arc<Environment>, record: Entry<VmRecord>, terms: LeaseTerms) -> Self {
        Self::spawn(env, record, Origin::CreatedLeased(terms))
    }

    /// Starts the task of a VM that a starting agent has found in the store. Before the first command, the task
    /// continues or corrects the work that a former agent left unfinished. It may boot the VM.
    pub fn find(env: Arc<Environment>, record: Entry<VmRecord>) -> Self {
        Self::spawn(env, record, Origin::Found)
    }

    fn spawn(env: Arc<Environment>, record: Entry<VmRecord>, origin: Origin) -> Self {
        let (commands, inbox) = command_queue::new();
        let run = RunRecord::created(record.value.created);
        let (status_out, status) = watch::channel(Status { run, ..Status::default() });
        let (connection_out, connection) = watch::channel(None);
        let (console_out, console) = watch::channel(0);
        let vm = Arc::new(record);
        let (record_out, record) = watch::channel(Arc::clone(&vm));
        let outlets = actor::Outlets {
            status: status_out,
            record: record_out,
            connection: connection_out,
            console: Arc::new(console_out),
        };
        let id = vm.id;
        tokio::spawn(actor::run(env, vm, origin, inbox, outlets));
        Self { id, commands, status, record, connection, console }
    }

    /// The VM's stored specification.
    #[must_use]
    pub fn record(&self) -> Arc<Entry<VmRecord>> {
        Arc::clone(&self.record.borrow())
    }

    /// Its present name.
    #[must_use]
    pub fn name(&self) -> Name {
        self.record.borrow().value.spec.name.clone()
    }

    /// A copy of its present status.
    #[must_use]
    pub fn status(&self) -> Status {
        self.status.borrow().clone()
    }

    /// Its present state.
    #[must_use]
    pub fn state(&self) -> VmState {
        self.status.borrow().run.state
    }

    /// A receiver of the changes of its status.
    #[must_use]
    pub fn follow(&self) -> watch::Receiver<Status> {
        self.status.clone()
    }

    /// A receiver that changes whenever the console has grown.
    #[must_use]
    pub fn console_growth(&self) -> watch::Receiver<u64> {
        self.console.clone()
    }

    /// The connection to its process.
    ///
    /// # Errors
    /// `wrong_state` if the VM does not run, `vmm_failed` while the agent has no connection to its process.
    pub fn connection(&self) -> Result<Connection, Problem> {
        self.connection.borrow().clone().ok_or_else(|| {
            let (name, state) = (self.name(), self.state());
            if !matches!(state, VmState::Running | VmState::Paused | VmState::Rebooting) {
                let detail = format!("The VM {name} is {state} and has no process: boot it.");
                return Problem::new(ProblemCode::WrongState, detail);
            }
            let detail = format!(
                "The agent has no connection to the process of the VM {name}, which is {state}: try again."
            );
            Problem::new(ProblemCode::VmmFailed, detail)
        })
    }

    /// Begins an action. The error is a failure to begin it; later failures arrive with the completion.
    ///
    /// # Errors
    /// A problem; nothing was begun.
    pub async fn act(&self, action: VmAction, caller: Caller) -> Result<Completion, Problem> {
        self.act_for(action, caller, Asked::User).await
    }

    /// Begins an action for a client of the API or, before the agent's end, for the agent itself.
    ///
    /// # Errors
    /// See [`Self::act`].
    pub async fn act_for(&self, action: VmAction, caller: Caller, by: Asked) -> Result<Completion, Problem> {
        let (begun, answer) = oneshot::channel();
        self.send(Command::Act { action, caller, by, begun }).await?;
        answer.await.map_err(|_| self.gone())?
    }

    /// Replaces the specification, if the VM is at this revision.
    ///
    /// # Errors
    /// A problem; the specification is the old one.
    pub async fn edit(&self, caller: Caller, spec: VmSpec, expect: Option<u64>) -> Result<(), Problem> {
        let (done, answer) = oneshot::channel();
        self.send(Command::Edit { caller, spec: Box::new(spec), expect, done }).await?;
        answer.await.map_err(|_| self.gone())?
    }

    /// Enlarges a disk of the running VM. Returns when its new size is on stable storage.
    ///
    /// # Errors
    /// A problem: the disk has its old size. After `vmm_failed` it may have the new one.
    pub async fn resize_disk(&self, caller: Caller, wanted: DiskSize) -> Result<(), Problem> {
        let (done, answer) = oneshot::channel();
        self.send(Command::ResizeDisk { caller, wanted, done }).await?;
        answer.await.map_err(|_| self.gone())?
    }

    /// Takes the VM's lease, by which it lives from now on: once all its leases have been dropped, the task stops and
    /// deletes it.
    ///
    /// # Errors
    /// A problem; the VM lives on as before. `wrong_state` if the lease is that of another holder.
    pub async fn lease(&self, terms: LeaseTerms) -> Result<Lease, Problem> {
        let (done, answer) = oneshot::channel();
        self.send(Command::Lease { terms, done }).await?;
        answer.await.map_err(|_| self.gone())?
    }

    /// Ends the VM's lease: it lives on without one.
    ///
    /// # Errors
    /// A problem; the VM lives by its lease as before.
    pub async fn end_lease(&self) -> Result<(), Problem> {
        let (done, answer) = oneshot::channel();
        self.send(Command::EndLease { done }).await?;
        answer.await.map_err(|_| self.gone())?
    }

    /// Whether its task has ended, perhaps because the VM was deleted.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.commands.is_closed()
    }

    /// Stops the VM, releases its functions and deletes it, if it is at this revision.
    ///
    /// # Errors
    /// A problem: another revision, or a function that could not be released. The VM still exists then.
    pub async fn delete(&self, caller: Caller, expect: Option<u64>) -> Result<(), Problem> {
        let (done, answer) = oneshot::channel();
        self.send(Command::Delete { caller, expect, done }).await?;
        answer.await.map_err(|_| self.gone())?
    }

    /// Ends the task and leaves the VM running.
    pub async fn leave(&self) {
        let (done, answer) = oneshot::channel();
        if self.send(Command::Leave { done }).await.is_ok() {
            drop(answer.await);
        }
    }

    async fn send(&self, command: Command) -> Result<(), Problem> {
        self.commands.send((Span::current(), command)).await.map_err(|_| self.gone())
    }

    fn gone(&self) -> Problem {
        Problem::not_found(&Missing::new("VM", self.name()))
    }
}

#[cfg(test)]
pub(crate) mod tests;
