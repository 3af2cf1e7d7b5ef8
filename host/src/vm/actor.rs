// SPDX-License-Identifier: Apache-2.0

//! The task that owns a VM: see the state machine in [`super`].

mod booting;
mod connection;
mod deletion;
mod disks;
mod edit;
mod end;
mod lease;
mod progress;
mod recovery;
mod restart;
mod room;

use std::{
    collections::HashMap,
    future::pending,
    sync::Arc,
    time::{Duration, Instant},
};

use api::{
    Caller, LeaseTerms,
    problem::{Problem, ProblemCode},
    types::{
        Cause, CauseCode, EventKind, Name, ObjectKind, OperationAction, Owner, RestartStatus, Stage, Subject,
        Timestamp, VmAction, VmState,
    },
};
use failpoints::{Point, reach};
use protocol::{DeviceLoss, End, State, VmmCommand, VmmEvent};
use tokio::{
    sync::{OwnedMutexGuard, mpsc, oneshot, watch},
    task::AbortHandle,
    time::{MissedTickBehavior, interval, sleep, timeout},
};
use tracing::Instrument as _;

use lease::Tenancy;
use progress::Progress;
use services::problem::ToProblem;
use services::{
    console,
    vmm_process::{Allowance, CommandError, Connection, Exit, MachineEvent, Process, VmDirectory},
};
use store::{Entry, Expect, StoreError};
use text::chain;

use super::{
    Command, Completion, Origin, Status,
    boot::{self, PROMPT},
    claims::{self, Held},
    command_queue::{Inbox, Sent},
    record::{Asked, RunRecord, VmRecord},
    switch_client,
};
use crate::{cgroup, environment::Environment};

/// The longest time from the command to stop to the end of a vmm, which resets its devices before it ends.
const STOP: Duration = Duration::from_secs(15);

/// The longest time to read the last events of a process that has ended.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// The longest time from the end of a process's connection to the end of the process.
const DYING: Duration = Duration::from_millis(500);

/// The period of the checks for lost vmm processes, long logs and lost devices.
const TICK: Duration = Duration::from_secs(1);
/// Ticks between two presses of a power button, and the ticks after which the agent gives up. The button's
/// interrupt is edge-triggered: a guest that is still booting has it masked, and misses that press.
const PRESS_AGAIN: u32 = 3;
const PRESSED_FOR: u32 = 60;

/// The shortest time between two wake-ups of a console's followers.
const CONSOLE_PACE: Duration = Duration::from_millis(20);

/// The longest wait of one command for console output. The agent then sends the command again.
const CONSOLE_WAIT: Duration = Duration::from_secs(3600);

type Done = oneshot::Sender<Result<(), Problem>>;

type Begun = oneshot::Sender<Result<Completion, Problem>>;

/// The channels on which the task publishes.
pub(super) struct Outlets {
    pub(super) status: watch::Sender<Status>,
    pub(super) record: watch::Sender<Arc<Entry<VmRecord>>>,
    pub(super) connection: watch::Sender<Option<Connection>>,
    pub(super) console: Arc<watch::Sender<u64>>,
}

struct Actor {
    env: Arc<Environment>,
    inbox: Inbox,
    vm: Arc<Entry<VmRecord>>,
    directory: VmDirectory,
    outlets: Outlets,
    progress: Progress,
    run: RunRecord,
    /// Whether `run` is in the store as it is.
    stored: bool,
    held: Vec<Held>,
    process: Option<Process>,
    /// The lock of the host's huge pages, while the process takes its pages or returns them.
    filling: Option<OwnedMutexGuard<()>>,
    link: Option<Link>,
    /// The messages that the process may still send.
    allowance: Allowance,
    /// The reason that the agent cannot talk to the process.
    unreachable: Option<String>,
    /// The cause of the end, as the machine reported it.
    end: Option<End>,
    /// The protocol violation of the process, which is being killed for it.
    misbehaved: Option<String>,
    /// The number of ticks for which the guest has not reacted to its power button.
    button: Option<u32>,
    /// The time at which the process is killed if it has not ended.
    deadline: Option<Instant>,
    /// The largest sizes that running disks were to have, and for which the process may write longer files.
    grown: HashMap<Name, u64>,
    /// The wait for room on a disk's file system.
    room: room::Room,
    /// The next boot by the agent itself.
    due: Option<restart::Due>,
    /// Requests that complete when the VM is at rest.
    resting: Vec<Done>,
    deleting: Vec<Done>,
    deleted_by: Option<String>,
    /// The clients that keep the VM by their leases.
    tenancy: Tenancy,
    /// The agent is shutting down, and has stopped the VM or found it at rest. It does not boot the VM again.
    closed: bool,
    finished: mpsc::Sender<Finished>,
    /// The sender by which the switch demands that the VM stop.
    expel: mpsc::Sender<String>,
}

/// A connection, and the events that it delivers.
struct Link {
    connection: Connection,
    events: mpsc::Receiver<MachineEvent>,
    console: AbortHandle,
}

impl Drop for Link {
    fn drop(&mut self) {
        // The console's task holds a handle of the connection, so it would keep the connection open.
        self.console.abort();
    }
}

/// The completion of a command.
struct Finished {
    action: VmAction,
    result: Result<(), CommandError>,
    done: Done,
}

/// Runs the task of one VM until the VM is deleted or the agent leaves it.
pub(super) async fn run(
    env: Arc<Environment>,
    vm: Arc<Entry<VmRecord>>,
    origin: Origin,
    inbox: Inbox,
    outlets: Outlets,
) {
    let (finished, mut commands) = mpsc::channel(8);
    let (expel, mut expelled) = mpsc::channel(1);
    let progress = Progress::new(outlets.status.clone());
    let mut actor = Actor {
        allowance: Allowance::new(vm.value.spec.ports().count()),
        directory: VmDirectory::new(&env.run_dir, vm.id),
        run: RunRecord::created(vm.value.created),
        env,
        inbox,
        vm,
        outlets,
        progress,
        held: Vec::new(),
        process: None,
        filling: None,
        link: None,
        unreachable: None,
        stored: false,
        button: None,
        end: None,
        misbehaved: None,
        deadline: None,
        grown: HashMap::new(),
        room: room::Room::default(),
        due: None,
        resting: Vec::new(),
        deleting: Vec::new(),
        deleted_by: None,
        tenancy: Tenancy::default(),
        closed: false,
        finished,
        expel,
    };
    match origin {
        Origin::Created => {}
        Origin::CreatedLeased(LeaseTerms { holder }) => {
            (actor.run.leased, actor.run.holder) = (true, holder);
        }
        Origin::Found => actor.recover().await,
    }
    if actor.run.leased {
        actor.await_client();
    }
    let mut tick = interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            command = actor.inbox.next() => match command {
                None => return,
                Some((_, Command::Leave { done })) => {
                    actor.leave();
                    actor.disconnected().await;
                    drop(actor);
                    let _ = done.send(());
                    return;
                }
                // Log lines of the command belong to the span of its request.
                Some((span, Command::Act { action, caller, by, begun })) => {
                    actor.act(action, caller, by, begun).instrument(span).await;
                }
                Some((span, Command::Edit { caller, spec, expect, done })) => {
                    drop(done.send(actor.edit(&caller, *spec, expect).instrument(span).await));
                }
                Some((span, Command::ResizeDisk { caller, wanted, done })) => {
                    span.in_scope(|| actor.resize_disk(&caller, wanted, done));
                }
                // Skip a client that has given up. Its lease would lapse at once, and end the VM for which the
                // client may have sent a second request.
                Some((_, Command::Lease { done, .. })) if done.is_closed() => {}
                Some((span, Command::Lease { terms, done })) => {
                    drop(done.send(actor.take_lease(terms).instrument(span).await));
                }
                Some((span, Command::EndLease { done })) => {
                    drop(done.send(actor.end_lease().instrument(span).await));
                }
                Some((span, Command::Delete { caller, expect, done })) => {
                    actor.delete(caller, expect, done).instrument(span).await;
                }
            },
            exit = ended(&mut actor.process) => actor.on_exit(exit).await,
            event = next(&mut actor.link) => match event {
                Some(event) => actor.on_event(event).await,
                None => actor.on_hang_up().await,
            },
            Some(why) = expelled.recv() => actor.expel(why),
            Some(finished) = commands.recv() => {
                // Handle the events first: the process reported the command's effects before its completion.
                actor.catch_up().await;
                actor.on_finished(finished).await;
            }
            () = restart::due(&actor.due) => actor.boot_unasked().await,
            () = actor.tenancy.lapses(&actor.env) => actor.lapse().await,
            _ = tick.tick() => actor.on_tick().await,
        }
        if actor.forget().await {
            return;
        }
    }
}

async fn ended(process: &mut Option<Process>) -> Exit {
    match process {
        Some(process) => process.ended().await,
        None => pending().await,
    }
}

async fn next(link: &mut Option<Link>) -> Option<MachineEvent> {
    match link {
        Some(link) => link.events.recv().await,
        None => pending().await,
    }
}

impl Actor {
    // ---- commands ----

    async fn act(&mut self, action: VmAction, caller: Caller, by: Asked, begun: Begun) {
        let (done, completion) = oneshot::channel();
        let state = self.run.state;
        let wrong = |cure: &str| {
            let detail = format!("The VM {} is {state} and cannot {}: {cure}.", self.name(), action.as_str());
            Err(Problem::new(ProblemCode::WrongState, detail))
        };
        let problem = match (action, state) {
            // Allow the stop by an agent that shuts down: it waits for the end of the VM, too.
            _ if !self.deleting.is_empty() && (by == Asked::User || state.is_at_rest()) => {
                wrong("it is being deleted")
            }
            (VmAction::Boot, state) if state.is_at_rest() && self.closed => {
                let detail = format!("The agent is shutting down and does not boot the VM {}.", self.name());
                Err(Problem::new(ProblemCode::Unavailable, detail))
            }
            (VmAction::Boot, state) if state.is_at_rest() => {
                return self.boot(caller, begun, done, completion).await;
            }
            // The agent may have just commanded the VM to resume, because a disk has room again. Pause it after
            // that.
            (VmAction::Pause, VmState::Paused) if self.run.full.is_some() => self.pause(done).await,
            // The VM is in that state already.
            (VmAction::Pause, VmState::Paused) | (VmAction::Resume, VmState::Running) => {
                drop(begun.send(Ok(completion)));
                drop(done.send(Ok(())));
                return;
            }
            (VmAction::Stop | VmAction::Shutdown, state) if state.is_at_rest() => {
                self.closed |= action == VmAction::Stop && by == Asked::Agent;
                // The agent's own stop replaces the mark of an earlier stop by a user only if a restart is planned.
                if by == Asked::User || self.run.restart.next.is_some() {
                    self.asked_to_end(by).await;
                }
                drop(begun.send(Ok(completion)));
                drop(done.send(Ok(())));
                return;
            }
            (VmAction::Stop, _) => return self.stop_for(by, begun, done, completion).await,
            (VmAction::Shutdown, VmState::Stopping) => {
                self.resting.push(done);
                drop(begun.send(Ok(completion)));
                return;
            }
            (VmAction::Shutdown, VmState::Running) => {
                // Store this before the guest can react.
                self.asked_to_end(by).await;
                let commanded = self.command(action, VmmCommand::PowerButton, done);
                if commanded.is_ok() {
                    self.button = Some(0);
                    self.show_shutdown();
                }
                commanded
            }
            (VmAction::Pause, VmState::Running) => self.pause(done).await,
            (VmAction::Resume, VmState::Paused) => {
                self.run.pause_asked = false;
                self.command(action, VmmCommand::Run, done)
            }
            (VmAction::Reboot, VmState::Running | VmState::Paused) => {
                self.run.pause_asked = false;
                let commanded = self.command(action, VmmCommand::Reboot, done);
                if commanded.is_ok() {
                    self.progress.begin(OperationAction::Reboot, vec![Stage::ResettingMachine]);
                    self.progress.enter(Stage::ResettingMachine);
                }
                commanded
            }
            (action, state) => wrong(cure(action, state)),
        };
        drop(begun.send(problem.map(|()| completion)));
    }

    /// Pauses the VM until a request resumes it.
    async fn pause(&mut self, done: Done) -> Result<(), Problem> {
        let before = std::mem::replace(&mut self.run.pause_asked, true);
        let commanded = self.command(VmAction::Pause, VmmCommand::Pause, done);
        match commanded {
            Ok(()) => drop(self.store().await),
            Err(_) => self.run.pause_asked = before,
        }
        commanded
    }

    /// Leaves the VM, because the agent ends. A VM that the agent has begun to stop does not outlive it.
    fn leave(&self) {
        if let Some(process) = self.process.as_ref().filter(|_| self.closed) {
            tracing::error!(vm = %self.name(), "its process has not ended in time and is killed");
            process.kill();
        }
    }

    /// Stops a VM that is not at rest.
    async fn stop_for(&mut self, by: Asked, begun: Begun, done: Done, completion: Completion) {
        drop(begun.send(Ok(completion)));
        self.resting.push(done);
        self.run.asked = Some(by);
        self.closed |= by == Asked::Agent;
        self.stop().await;
    }

    /// Sends a command; [`Self::on_finished`] handles its completion.
    fn command(&self, action: VmAction, command: VmmCommand, done: Done) -> Result<(), Problem> {
        let link = self.link.as_ref().ok_or_else(|| self.no_connection())?;
        let (connection, finished) = (link.connection.clone(), self.finished.clone());
        tokio::spawn(async move {
            let result = connection.command(command, Vec::new(), PROMPT).await.map(drop);
            drop(finished.send(Finished { action, result, done }).await);
        });
        Ok(())
    }

    fn no_connection(&self) -> Problem {
        let why = self.unreachable.as_deref().unwrap_or("the connection has just ended.");
        let detail = format!(
            "The agent has no connection to the process of the VM {}, which runs on, and tries again: \
             {why} If this persists, stop the VM and boot it again.",
            self.name()
        );
        Problem::new(ProblemCode::VmmFailed, detail)
    }

    async fn on_finished(&mut self, finished: Finished) {
        let Finished { action, result, done } = finished;
        let over = match action {
            VmAction::Reboot => Some(OperationAction::Reboot),
            VmAction::Shutdown if result.is_err() => Some(OperationAction::Shutdown),
            _ => None,
        };
        // Another operation may have replaced this one.
        if over.is_some() && over == self.progress.action() {
            self.progress.end();
            self.publish();
        }
        if let Err(error) = result {
            self.run.pause_asked &= action != VmAction::Pause || self.run.state == VmState::Paused;
            // The VM may have ended meanwhile, or the vmm may have failed: the state shows which.
            drop(done.send(Err(error.problem())));
            return;
        }
        match action {
            // A shutdown completes when the VM has stopped.
            VmAction::Shutdown if !self.run.state.is_at_rest() => return self.resting.push(done),
            // Usually the vmm's event has already set the state. If the VM has ended meanwhile, this has no effect.
            VmAction::Pause => self.on_state(State::Paused).await,
            // A disk without room may have paused the VM again.
            VmAction::Resume | VmAction::Reboot if self.run.full.is_some() => {}
            VmAction::Resume | VmAction::Reboot => self.on_state(State::Running).await,
            _ => {}
        }
        drop(done.send(Ok(())));
    }

    // ---- state ----

    /// Enters a state: stores and publishes it.
    async fn step(&mut self, state: VmState) {
        tracing::debug!(vm = %self.name(), from = %self.run.state, to = %state, "state");
        self.run.state = state;
        self.run.since = Timestamp::now();
        self.tell_state();
        // Go on after a failed write: the new state is published anyway, and the next step stores it.
        drop(self.store().await);
    }

    fn tell_state(&self) {
        let vm = Owner { vm: self.vm.id, name: self.vm.name.clone(), adapter: None };
        let (state, cause) = (self.run.state, self.run.cause.clone());
        self.env.tell(EventKind::VmState { vm, state, cause });
    }

    async fn store(&mut self) -> Result<(), Problem> {
        let put = self.env.runs.put(self.vm.id, self.name(), &self.run, Expect::Any).await;
        self.stored = put.is_ok();
        self.publish();
        put.map(drop).map_err(|error| {
            tracing::error!(vm = %self.name(), "its state cannot be stored: {}", chain(&error));
            error.problem()
        })
    }

    fn publish(&self) {
        let (run, held, operation) = (self.run.clone(), self.held.clone(), self.progress.shown());
        let lease = run.leased.then(|| self.tenancy.shown());
        self.outlets.status.send_replace(Status { run, held, operation, lease });
    }

    fn subject(&self) -> Subject {
        Subject { kind: ObjectKind::Vm, id: self.vm.id, name: self.vm.name.clone() }
    }

    fn name(&self) -> &str {
        &self.vm.name
    }
}

/// The cure for an action that is impossible in this state.
fn cure(action: VmAction, state: VmState) -> &'static str {
    match (action, state) {
        (VmAction::Boot, VmState::Running | VmState::Paused) => "it is booted; `reboot` boots it again",
        (VmAction::Boot, VmState::Starting | VmState::Rebooting) => "it is being booted",
        (_, VmState::Stopping) => "wait until it is stopped, and boot it then",
        (VmAction::Shutdown, VmState::Paused) => "its guest cannot react: resume it first, or stop it",
        (_, VmState::Defined | VmState::Stopped | VmState::Failed) => "boot it first",
        _ => "wait until it runs",
    }
}

fn cause(code: CauseCode, detail: &str) -> Cause {
    Cause { code, problem: None, detail: detail.to_owned() }
}

fn boot_failed(problem: &Problem) -> Cause {
    Cause { code: CauseCode::BootFailed, problem: Some(problem.code), detail: problem.detail.clone() }
}

fn crashed(exit: Exit, directory: &VmDirectory) -> Problem {
    let said = directory.log_tail();
    let said = if said.is_empty() { "Its log is empty.".into() } else { format!("Its log ends in: {said}") };
    Problem::new(ProblemCode::VmmFailed, format!("The VM's process {exit} unexpectedly. {said}"))
}
