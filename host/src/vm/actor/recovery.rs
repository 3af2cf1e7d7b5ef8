// SPDX-License-Identifier: Apache-2.0

//! Recovery after a former agent: running VMs are adopted, all others are cleaned up.

use super::*;

impl Actor {
    pub(super) async fn recover(&mut self) {
        match self.env.runs.get(self.vm.id).await {
            Ok(entry) => self.run = entry.value,
            Err(StoreError::NotFound { .. }) => {}
            Err(error) => tracing::error!(vm = %self.name(), "its state cannot be read: {}", chain(&error)),
        }
        match claims::of_vm(&self.env, self.vm.id).await {
            Ok(held) => self.held = held,
            Err(error) => tracing::error!(vm = %self.name(), "its claims cannot be read: {}", chain(&error)),
        }
        if let (Some(users), Some(user)) = (&self.env.users, self.run.user) {
            users.keep(user);
        }
        if let Some(identity) = self.run.process.clone() {
            match Process::find(&identity) {
                Ok(Some(process)) => {
                    self.process = Some(process);
                    self.take_up().await;
                    return;
                }
                Ok(None) => {}
                Err(error) => tracing::error!(vm = %self.name(), "its process cannot be watched: {error}"),
            }
        }
        if !self.run.state.is_at_rest() || !self.held.is_empty() {
            self.put_right().await;
        } else {
            self.resume_restart();
        }
        self.publish();
    }

    /// Adopts the running process.
    pub(super) async fn take_up(&mut self) {
        self.publish();
        match self.connect().await {
            Ok(State::Empty | State::Ready) => {
                // The former agent was about to build the machine, and the files that it had opened
                // are gone.
                self.fail(Problem::new(ProblemCode::VmmFailed, "The agent was restarted during the boot."));
                if let Some(process) = &self.process {
                    process.kill();
                }
            }
            Ok(state) => tracing::info!(vm = %self.name(), ?state, "found running"),
            // The error is logged, and a later tick tries again.
            Err(_) => {}
        }
        if self.run.state == VmState::Stopping {
            self.stop().await;
        }
    }

    /// Cleans up after a VM without a process that is not at rest or holds claims.
    pub(super) async fn put_right(&mut self) {
        let (state, known) = (self.run.state, self.run.process.take());
        if known.is_none() && !state.is_at_rest() {
            // The process may have been started just before the former agent died.
            match Process::of_vm(self.vm.id) {
                Ok(Some(mut process)) => {
                    process.kill();
                    if timeout(STOP, process.ended()).await.is_err() {
                        tracing::error!(vm = %self.name(), "cannot kill its process; its functions stay claimed");
                        self.process = Some(process);
                        return;
                    }
                }
                Ok(None) => {}
                Err(error) => tracing::error!(vm = %self.name(), "cannot search for its process: {error}"),
            }
        }
        if let Some(before) = &known {
            self.run.rested_in = Some(before.boot_id.clone());
        }
        let cause = match (state, known) {
            (VmState::Defined | VmState::Stopped | VmState::Failed, _) => self.run.cause.take(),
            (VmState::Stopping, _) => Some(cause(CauseCode::Stopped, "It was stopped.")),
            (VmState::Starting, _) => {
                let problem =
                    Problem::new(ProblemCode::VmmFailed, "The agent was restarted during the boot.");
                Some(boot_failed(&problem))
            }
            (_, Some(before)) if before.boot_id != self.env.boot_id => {
                Some(cause(CauseCode::HostRestarted, "The host was restarted while the VM was running."))
            }
            _ => {
                let detail = format!("Its process ended while no agent was running. {}", self.last_words());
                Some(cause(CauseCode::VmmCrashed, detail.trim()))
            }
        };
        let rest = match state {
            VmState::Defined | VmState::Stopped | VmState::Failed => state,
            VmState::Stopping => VmState::Stopped,
            _ => VmState::Failed,
        };
        // A VM at rest stays as it was. A VM that has ended meanwhile may be restarted.
        let (again, planned) = (!state.is_at_rest(), self.run.restart.next);
        self.rest(rest, cause, again).await;
        if !again {
            self.run.restart.next = planned;
        }
        self.resume_restart();
    }
}
