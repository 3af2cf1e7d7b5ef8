// SPDX-License-Identifier: Apache-2.0

//! One task per VM owns its life; everybody else sends it commands and reads copies of its status.
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
//!             process gone, functions given back; guest power-off likewise
//! ```
//!
//! A VM at rest is booted by its task itself, too: some time after its end (`restart`), or when the agent starts (`autostart`).
//!
//! Who may move it: `actor` only, told by commands (the API), by reports (the vmm, which the guest may have taken
//! over: reports move it between Running, Paused and Rebooting, or to its end, never back) and by the process's exit.

mod actor;
mod boot;
pub mod claims;
mod inbox;
pub mod network;
pub mod problem;
pub mod record;
pub mod unknown;

use std::sync::Arc;

use api::{
    Caller, Lease, Missing,
    problem::{Problem, ProblemCode},
    types::{Name, VmAction, VmLease, VmOperation, VmSpec, VmState},
};
use tokio::sync::{mpsc, oneshot, watch};
use tracing::Span;
use uuid::Uuid;

use self::{
    claims::Held,
    record::{Asked, RunRecord, VmRecord},
};
use crate::{environment::Environment, store::Entry, vmm_process::Connection};

/// The end of an action: completes when it is done, or could not be.
pub type Completion = oneshot::Receiver<Result<(), Problem>>;

/// What a VM's task can be told.
enum Command {
    /// Do it. The first answer says whether it was begun.
    Act { action: VmAction, caller: Caller, by: Asked, begun: oneshot::Sender<Result<Completion, Problem>> },
    /// Another specification.
    Edit {
        caller: Caller,
        spec: Box<VmSpec>,
        expect: Option<u64>,
        done: oneshot::Sender<Result<(), Problem>>,
    },
    /// The VM lives by a lease, which this client holds.
    Lease { done: oneshot::Sender<Result<Lease, Problem>> },
    /// It lives without a lease.
    EndLease { done: oneshot::Sender<Result<(), Problem>> },
    /// Stop, give back, forget, if the VM is at this revision. The task ends.
    Delete { caller: Caller, expect: Option<u64>, done: oneshot::Sender<Result<(), Problem>> },
    /// The agent ends; the VM runs on. The task ends.
    Leave { done: oneshot::Sender<()> },
}

/// The origin of a VM that a task begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// It has just been stored.
    Created,
    /// The same, and it lives by a lease.
    CreatedLeased,
    /// The agent has just started.
    Found,
}

/// A VM at one moment.
#[derive(Clone, Debug, Default)]
pub struct Status {
    /// Its state, as stored.
    pub run: RunRecord,
    /// What it holds.
    pub held: Vec<Held>,
    /// What its task does that takes time.
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

    /// The same for one that lives by a lease, whose client is still to come.
    pub fn start_leased(env: Arc<Environment>, record: Entry<VmRecord>) -> Self {
        Self::spawn(env, record, Origin::CreatedLeased)
    }

    /// Starts the task of a VM that an agent which starts has found in the store. What a former agent was doing with it is taken up
    /// or put right before the first command; it may be booted.
    pub fn find(env: Arc<Environment>, record: Entry<VmRecord>) -> Self {
        Self::spawn(env, record, Origin::Found)
    }

    fn spawn(env: Arc<Environment>, record: Entry<VmRecord>, origin: Origin) -> Self {
        let (commands, inbox) = inbox::new();
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

    /// The VM as it was asked for.
    #[must_use]
    pub fn record(&self) -> Arc<Entry<VmRecord>> {
        Arc::clone(&self.record.borrow())
    }

    /// Its name now.
    #[must_use]
    pub fn name(&self) -> Name {
        self.record.borrow().value.spec.name.clone()
    }

    /// Where it is now.
    #[must_use]
    pub fn status(&self) -> Status {
        self.status.borrow().clone()
    }

    /// Its state now.
    #[must_use]
    pub fn state(&self) -> VmState {
        self.status.borrow().run.state
    }

    /// Status changes.
    #[must_use]
    pub fn follow(&self) -> watch::Receiver<Status> {
        self.status.clone()
    }

    /// Changes whenever the console has grown.
    #[must_use]
    pub fn console_growth(&self) -> watch::Receiver<u64> {
        self.console.clone()
    }

    /// The connection to its process.
    ///
    /// # Errors
    /// `wrong_state` of a VM that does not run, `vmm_failed` while its process cannot be talked to.
    pub fn connection(&self) -> Result<Connection, Problem> {
        self.connection.borrow().clone().ok_or_else(|| {
            let (name, state) = (self.name(), self.state());
            if !matches!(state, VmState::Running | VmState::Paused | VmState::Rebooting) {
                let detail = format!("The VM {name} is {state} and has no process: boot it.");
                return Problem::new(ProblemCode::WrongState, detail);
            }
            let detail = format!(
                "The agent cannot talk to the process of the VM {name} now, which is {state}: try again."
            );
            Problem::new(ProblemCode::VmmFailed, detail)
        })
    }

    /// Begins an action. What can be said at once is the error; the completion tells the rest.
    ///
    /// # Errors
    /// A problem; nothing was begun.
    pub async fn act(&self, action: VmAction, caller: Caller) -> Result<Completion, Problem> {
        self.act_for(action, caller, Asked::User).await
    }

    /// The same; the agent that is about to end asks for it, too.
    ///
    /// # Errors
    /// As of [`Self::act`].
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

    /// Takes the VM's lease, by which it lives from now on: once all leases of it have been dropped, it is stopped and deleted.
    ///
    /// # Errors
    /// A problem; the VM lives on as before.
    pub async fn lease(&self) -> Result<Lease, Problem> {
        let (done, answer) = oneshot::channel();
        self.send(Command::Lease { done }).await?;
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

    /// Whether its task has ended, which may have been the VM's end.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.commands.is_closed()
    }

    /// Stops the VM, gives back what it holds, and forgets it, if it is at this revision.
    ///
    /// # Errors
    /// A problem: another revision, or what could not be given back. The VM is still there then.
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
