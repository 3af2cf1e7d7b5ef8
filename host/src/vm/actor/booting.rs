// SPDX-License-Identifier: Apache-2.0

//! Boots a VM, and cleans up after a boot that did not complete.

use std::sync::atomic::Ordering;

use api::types::{ByteSize, HugePages, VmLimits};
use uuid::Uuid;

use super::*;
use crate::{cgroup::CgroupError, placement::MemoryPlace};

/// The reason why a machine was not built.
pub(super) enum NotBuilt {
    Failed(Problem),
    /// A command to stop or delete the VM came meanwhile, or its lease lapsed. The end of the VM is under way.
    Unwanted,
}

impl From<Problem> for NotBuilt {
    fn from(problem: Problem) -> Self {
        Self::Failed(problem)
    }
}

/// The end of the wait for a machine.
enum Waited {
    Ran(Result<(Connection, mpsc::Receiver<MachineEvent>), Problem>),
    Died(Exit),
    Unwanted(Sent),
    Lapsed,
}

impl Actor {
    pub(super) async fn boot(&mut self, caller: Caller, begun: Begun, done: Done, completion: Completion) {
        let files = match self.begin(Some(caller), 0).await {
            Ok(files) => files,
            Err(problem) => {
                // The status shows the cause until the next boot, for clients other than the caller.
                self.run.cause = Some(boot_failed(&problem));
                self.progress.end();
                drop(self.store().await);
                return drop(begun.send(Err(problem)));
            }
        };
        drop(begun.send(Ok(completion)));
        match self.build(files).await {
            Ok(()) => drop(done.send(Ok(()))),
            Err(NotBuilt::Failed(problem)) => {
                self.fail(problem.clone());
                // The caller gets the error; do not schedule a restart.
                self.abandon(false).await;
                drop(done.send(Err(problem)));
            }
            Err(NotBuilt::Unwanted) => {
                let detail = format!("The VM {} was stopped while it was being booted.", self.name());
                drop(done.send(Err(Problem::new(ProblemCode::WrongState, detail))));
            }
        }
    }

    /// The first part of a boot, up to the response to its caller. After an error the VM holds nothing. `caller` is
    /// None if the agent boots the VM by itself; `attempts` is how often it has done so.
    pub(super) async fn begin(
        &mut self,
        caller: Option<Caller>,
        attempts: u32,
    ) -> Result<boot::Files, Problem> {
        self.progress.begin(OperationAction::Boot, progress::boot(&self.vm.value.spec, &self.held));
        self.progress.enter(Stage::OpeningFiles);
        // Before anything is touched.
        self.check_place().await?;
        let rights = self.vm.value.boot_rights(caller);
        let files = boot::open_files(&self.env, rights, self.vm.id, &self.vm.value.spec).await?;
        // Release functions that could not be released at an earlier end.
        self.give_back().await?;
        self.progress.enter(Stage::ClaimingFunctions);
        self.held = claims::claim(&self.env, self.vm.id, &self.vm.value.spec).await?;
        let placed = match self.check_sandbox() {
            Ok(()) => self.place_memory().await,
            Err(problem) => Err(problem),
        };
        let memory_place = match placed {
            Ok(place) => place,
            Err(problem) => {
                self.give_back().await?;
                return Err(problem);
            }
        };
        let user = match &self.env.users {
            None => None,
            Some(users) => match users.take() {
                Some(user) => Some(user),
                None => {
                    self.give_back().await?;
                    let detail = "All user ids for VMs are in use: give the agent more (--vmm-uid-count).";
                    return Err(Problem::new(ProblemCode::SandboxUnavailable, detail));
                }
            },
        };
        self.end = None;
        self.misbehaved = None;
        self.due = None;
        self.run = RunRecord {
            state: VmState::Starting,
            restart: RestartStatus { attempts, next: None },
            user,
            off: Some(self.env.protections_off()),
            leased: self.run.leased,
            holder: self.run.holder,
            memory_place,
            ..RunRecord::default()
        };
        if let Err(problem) = self.store().await {
            self.abandon(false).await;
            return Err(problem);
        }
        self.tell_state();
        reach(Point::BootBegun);
        Ok(files)
    }

    /// Compares the specification's placement with the host.
    async fn check_place(&self) -> Result<(), Problem> {
        let spec = &self.vm.value.spec;
        if spec.placement.is_none() && spec.hugepages == HugePages::Off {
            return Ok(());
        }
        let (env, spec) = (Arc::clone(&self.env), spec.clone());
        let check = move || env.topology.check(&env.cgroup_parent, &spec);
        let checked = tokio::task::spawn_blocking(check).await;
        checked.map_err(|error| Problem::new(ProblemCode::Internal, chain(&error)))?
    }

    /// Chooses the NUMA node of guest memory. None if the specification asks for none.
    async fn place_memory(&self) -> Result<Option<MemoryPlace>, Problem> {
        if self.vm.value.spec.placement.as_ref().is_none_or(|place| place.numa.is_none()) {
            return Ok(None);
        }
        let (env, spec) = (Arc::clone(&self.env), self.vm.value.spec.clone());
        let held: Vec<_> = self.held.iter().map(|claim| claim.value.bdf).collect();
        let place = move || {
            let node = |bdf| {
                let backend = env.inventory.backend(bdf).map_err(|error| error.problem())?;
                Ok((bdf, backend.numa_node(bdf).map_err(|error| error.problem())?))
            };
            let functions = held.into_iter().map(node).collect::<Result<Vec<_>, Problem>>()?;
            env.topology.place_memory(&env.cgroup_parent, &spec, &functions).map(Some)
        };
        let placed = tokio::task::spawn_blocking(place).await;
        placed.map_err(|error| Problem::new(ProblemCode::Internal, chain(&error)))?
    }

    /// Rejects functions that need the whole sandbox if a part of it is off.
    fn check_sandbox(&self) -> Result<(), Problem> {
        let needs_all = claims::first_with(&self.env, &self.held, |facts| facts.needs_whole_sandbox)?;
        let off: Vec<_> = self.env.sandbox_off.iter().map(|part| part.as_str()).collect();
        match needs_all {
            Some(bdf) if !off.is_empty() => {
                let detail = format!(
                    "The VM {} has the host's function {bdf}, which needs the whole sandbox, and this agent \
                     runs without {}: start the agent without --sandbox-off.",
                    self.name(),
                    off.join(", ")
                );
                Err(Problem::new(ProblemCode::SandboxUnavailable, detail))
            }
            _ => Ok(()),
        }
    }

    pub(super) async fn build(&mut self, files: boot::Files) -> Result<(), NotBuilt> {
        let started = Instant::now();
        for claim in &mut self.held {
            claims::prepare(&self.env, claim, |stage| self.progress.enter(stage)).await?;
        }
        self.progress.enter(Stage::StartingProcess);
        let process = boot::start(&self.env, self.vm.id, &self.vm.value.spec, &self.held, &self.directory)?;
        reach(Point::BootSpawned);
        self.run.process = Some(process.identity().clone());
        self.process = Some(process);
        self.grown.clear();
        self.store().await?;
        reach(Point::BootProcessStored);
        self.limit().await?;
        reach(Point::BootLimited);
        let enter = |stage| self.progress.enter(stage);
        self.allowance = Allowance::new(self.vm.value.spec.ports().count());
        let new = boot::NewProcess {
            directory: &self.directory,
            user: self.run.user,
            node: self.run.memory_place.as_ref().and_then(|place| place.node),
            allowance: &self.allowance,
            filling: &mut self.filling,
        };
        let run = boot::run(&self.env, &self.vm, files, &self.held, new, enter);
        let waited = tokio::select! {
            result = run => Waited::Ran(result),
            exit = ended(&mut self.process) => Waited::Died(exit),
            sent = self.inbox.next_end(self.vm.revision) => Waited::Unwanted(sent),
            () = self.tenancy.lapses(&self.env) => Waited::Lapsed,
        };
        let (connection, events) = match waited {
            Waited::Ran(Ok(running)) => running,
            // The connection of a dying vmm ends just before its process. Wait for the exit, which shows the cause.
            Waited::Ran(Err(problem)) if problem.code == ProblemCode::VmmFailed => {
                return Err(match timeout(DYING, ended(&mut self.process)).await {
                    Ok(exit) => crashed(exit, &self.directory),
                    Err(_) => problem,
                }
                .into());
            }
            Waited::Ran(Err(problem)) => return Err(problem.into()),
            Waited::Died(exit) => return Err(crashed(exit, &self.directory).into()),
            Waited::Unwanted((span, command)) => {
                self.end_boot(command).instrument(span).await;
                return Err(NotBuilt::Unwanted);
            }
            Waited::Lapsed => {
                self.lapse().await;
                return Err(NotBuilt::Unwanted);
            }
        };
        self.adopt(connection, events).await;
        self.run.boots = 1;
        self.run.booted = Some(Timestamp::now());
        self.progress.end();
        self.step(VmState::Running).await;
        reach(Point::BootStored);
        tracing::info!(vm = %self.name(), took = ?started.elapsed(), "booted");
        Ok(())
    }

    /// Carries out a command that ends the VM during its boot. Kills the process, and releases the functions after
    /// the process has ended.
    async fn end_boot(&mut self, command: Command) {
        match command {
            Command::Act { by, begun, .. } => {
                let (done, completion) = oneshot::channel();
                self.stop_for(by, begun, done, completion).await;
            }
            Command::Delete { caller, expect, done } => self.delete(caller, expect, done).await,
            // `Inbox::next_end` never returns these.
            Command::Edit { .. }
            | Command::ResizeDisk { .. }
            | Command::Lease { .. }
            | Command::EndLease { .. }
            | Command::Leave { .. } => {}
        }
    }

    /// Sets the limits of the process before it has guest memory or further threads.
    async fn limit(&self) -> Result<(), Problem> {
        let Some(process) = &self.process else { return Ok(()) };
        let (env, vm, pid) = (Arc::clone(&self.env), self.vm.id, process.identity().pid);
        let asked = self.vm.value.spec.limits.clone();
        let default = cgroup::default_memory(&self.vm.value.spec);
        let spec = &self.vm.value.spec;
        let (pages, bytes) = (spec.hugepages, spec.memory.bytes());
        let set = move || {
            limit_memory(&env, vm, asked, default, pid)?;
            let limited = cgroup::limit_huge_pages(&env.cgroup_parent, vm, pages, bytes, pid);
            if let Err(error) = limited
                && !env.told_unlimited_huge_pages.swap(true, Ordering::Relaxed)
            {
                tracing::warn!(
                    "VMs have no limit of huge pages, so a process under the control of its guest can take \
                     all free ones: {}",
                    chain(&error)
                );
            }
            Ok::<_, CgroupError>(())
        };
        let limited = tokio::task::spawn_blocking(set).await;
        limited.map_err(|error| Problem::new(ProblemCode::Internal, chain(&error)))?.map_err(|error| {
            let detail = format!("Cannot set the limits of the VM {}: {}.", self.name(), chain(&error));
            Problem::new(ProblemCode::SandboxUnavailable, detail)
        })
    }

    /// Cleans up after a failed boot: ends the process and releases all that the VM holds. `again`: the restart policy
    /// may boot the VM.
    pub(super) async fn abandon(&mut self, again: bool) {
        if let Some(mut process) = self.process.take() {
            self.progress.follow_with(self.stages_of_end());
            self.progress.enter(Stage::EndingProcess);
            process.kill();
            if timeout(STOP, process.ended()).await.is_err() {
                tracing::error!(vm = %self.name(), "cannot kill its process; its functions stay claimed");
                self.process = Some(process);
                // Other VMs do not wait for it. The check of the pool shows its pages.
                self.filling = None;
                return;
            }
        }
        let (state, cause) = (VmState::Failed, self.run.cause.take());
        self.rest(state, cause, again).await;
    }

    /// Notes the cause before the VM becomes `failed`.
    pub(super) fn fail(&mut self, problem: Problem) {
        tracing::error!(vm = %self.name(), code = %problem.code, "the boot failed: {problem}");
        self.run.cause = Some(boot_failed(&problem));
    }
}

/// Sets the limits of the specification (`asked`), and `default` for the memory if it has none and the host can set it.
fn limit_memory(
    env: &Environment,
    vm: Uuid,
    asked: Option<VmLimits>,
    default: ByteSize,
    pid: i32,
) -> Result<(), CgroupError> {
    let limit = |limits: &VmLimits| cgroup::limit(&env.cgroup_parent, vm, limits, pid);
    let limits = asked.clone().unwrap_or_default();
    if limits.memory.is_some() {
        return limit(&limits);
    }
    let Err(error) = limit(&VmLimits { memory: Some(default), ..limits }) else { return Ok(()) };
    // The limits of the specification must be set all the same.
    asked.as_ref().map_or(Ok(()), limit)?;
    if !env.told_unlimited.swap(true, Ordering::Relaxed) {
        tracing::warn!(
            "VMs without limits.memory have no default limit of memory, so a process under the control of \
             its guest can take all memory of the host: {}",
            chain(&error)
        );
    }
    Ok(())
}
