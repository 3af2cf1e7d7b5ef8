// SPDX-License-Identifier: Apache-2.0

//! The end of a process: stopping it, and releasing all that the VM holds.

use super::*;

const OUT_OF_MEMORY: &str =
    "It had reached limits.memory, or the default limit: raise the limit, or give the guest less memory.";

impl Actor {
    pub(super) async fn stop(&mut self) {
        let action = match self.deleting.is_empty() {
            true => OperationAction::Stop,
            false => OperationAction::Delete,
        };
        // A repeated stop continues the one under way.
        if self.progress.action() != Some(action) {
            self.progress.begin(action, self.stages_of_end());
            self.progress.enter(Stage::EndingProcess);
        }
        if self.run.state != VmState::Stopping {
            self.step(VmState::Stopping).await;
        }
        reach(Point::StopBegun);
        self.deadline = self.deadline.or(Instant::now().checked_add(STOP));
        match (&self.link, &self.process) {
            (Some(link), _) => {
                let connection = link.connection.clone();
                tokio::spawn(async move { connection.command(VmmCommand::Stop, Vec::new(), STOP).await });
            }
            (None, Some(process)) => process.kill(),
            (None, None) => {
                self.rest(VmState::Stopped, Some(cause(CauseCode::Stopped, "It was stopped.")), false).await
            }
        }
    }

    /// Kills the process, because the switch can no longer hold the VM to its policy.
    pub(super) fn expel(&mut self, why: String) {
        if let Some(process) = &self.process {
            process.kill();
            self.end = self.end.take().or(Some(End::Failed { detail: why }));
        }
    }

    pub(super) async fn on_exit(&mut self, exit: Exit) {
        self.process = None;
        // The event of the end may still be on its way.
        let words = async {
            while let Some(link) = &mut self.link {
                match link.events.recv().await {
                    Some(MachineEvent { event: VmmEvent::Ended { end }, .. }) => self.end = Some(end),
                    Some(_) => {}
                    // By now the last events of the process's relays have reached the switch, too.
                    None => return,
                }
            }
        };
        drop(timeout(LAST_WORDS, words).await);
        let stopping = self.run.state == VmState::Stopping;
        let (misbehaved, end) = (self.misbehaved.take(), self.end.take());
        let (state, cause) = match end {
            _ if misbehaved.is_some() => {
                (VmState::Failed, Some(cause(CauseCode::VmmMisbehaved, &misbehaved.unwrap_or_default())))
            }
            _ if self.run.cause.as_ref().is_some_and(|cause| cause.code == CauseCode::BootFailed) => {
                (VmState::Failed, self.run.cause.take())
            }
            Some(End::PoweredOff) => {
                (VmState::Stopped, Some(cause(CauseCode::PoweredOff, "The guest powered off.")))
            }
            Some(End::Failed { detail }) => {
                let detail: String = detail.chars().take(2000).collect();
                (VmState::Failed, Some(cause(CauseCode::MachineFailed, &detail)))
            }
            Some(End::Stopped) => (VmState::Stopped, Some(cause(CauseCode::Stopped, "It was stopped."))),
            None if stopping => (VmState::Stopped, Some(cause(CauseCode::Stopped, "It was stopped."))),
            None => {
                let problem = crashed(exit, &self.directory);
                tracing::error!(vm = %self.name(), "{problem}");
                (VmState::Failed, Some(cause(CauseCode::VmmCrashed, &problem.detail)))
            }
        };
        self.rest(state, cause, true).await;
    }

    /// Removes the process's control group. Extends the cause of the end if the group ran out of
    /// memory.
    async fn unlimit(&self, cause: Option<Cause>) -> Option<Cause> {
        let (env, vm) = (Arc::clone(&self.env), self.vm.id);
        let removed = tokio::task::spawn_blocking(move || cgroup::remove(&env.cgroup_parent, vm)).await;
        match removed.unwrap_or_else(|error| Err(std::io::Error::other(error))) {
            Ok(true) => {
                cause.map(|cause| Cause { detail: format!("{} {OUT_OF_MEMORY}", cause.detail), ..cause })
            }
            Ok(false) => cause,
            Err(error) => {
                tracing::warn!(vm = %self.name(), "its control group cannot be removed: {error}");
                cause
            }
        }
    }

    /// Releases all that the VM holds after the end of its process, and publishes its state.
    /// `again`: the restart policy may boot the VM.
    pub(super) async fn rest(&mut self, state: VmState, cause: Option<Cause>, again: bool) {
        self.disconnected().await;
        self.deadline = None;
        self.progress.follow_with(self.release_stages());
        self.filling = None;
        reach(Point::ReleaseBegun);
        let kept = self.give_back().await;
        reach(Point::ReleaseDone);
        if let (Some(users), Some(user)) = (&self.env.users, self.run.user.take()) {
            users.give_back(user);
        }
        let cause = self.unlimit(cause).await;
        reach(Point::ReleaseUnlimited);
        if let Err(error) = self.directory.close() {
            tracing::warn!(vm = %self.name(), "its control socket cannot be removed: {error}");
        }
        reach(Point::ReleaseClosed);
        self.run.process = None;
        self.run.cause = cause;
        if let (Err(problem), Some(cause)) = (&kept, &mut self.run.cause) {
            cause.detail = format!("{} Not everything could be released: {problem}", cause.detail);
        }
        match again {
            true => {
                let cause = self.run.cause.clone();
                self.plan_restart(state, cause.as_ref());
            }
            false => self.cancel_restart(),
        }
        self.run.rested_in.get_or_insert_with(|| self.env.boot_id.clone());
        if self.deleting.is_empty() {
            self.progress.end();
        }
        self.step(state).await;
        reach(Point::ReleaseStored);
        for done in self.resting.drain(..) {
            drop(done.send(kept.clone()));
        }
    }

    pub(super) async fn give_back(&mut self) -> Result<(), Problem> {
        let held = std::mem::take(&mut self.held);
        let mut kept = claims::give_back(&self.env, held, |stage| self.progress.enter(stage)).await;
        kept.reverse();
        let problem = kept.first().map(|(_, problem)| problem.clone());
        self.held = kept.into_iter().map(|(claim, _)| claim).collect();
        problem.map_or(Ok(()), Err)
    }

    /// The stages after the end of the process.
    pub(super) fn release_stages(&self) -> Vec<Stage> {
        let mut stages = progress::release(&self.held);
        if !self.deleting.is_empty() {
            stages.push(Stage::Forgetting);
        }
        stages
    }

    /// The stages of ending a process that runs.
    pub(super) fn stages_of_end(&self) -> Vec<Stage> {
        let mut stages = vec![Stage::EndingProcess];
        stages.extend(self.release_stages());
        stages
    }

    /// Shows the operation of a shutdown, unless it is shown already.
    pub(super) fn show_shutdown(&mut self) {
        if self.progress.action() != Some(OperationAction::Shutdown) {
            let mut stages = vec![Stage::AskingGuest];
            stages.extend(self.stages_of_end());
            self.progress.begin(OperationAction::Shutdown, stages);
            self.progress.enter(Stage::AskingGuest);
        }
    }

    pub(super) fn last_words(&self) -> String {
        self.directory.log_tail()
    }
}
