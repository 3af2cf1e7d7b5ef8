// SPDX-License-Identifier: Apache-2.0

//! Boots without a request: again after an end, or when the agent starts.

use api::types::{RestartPolicy, RestartStatus, VmSpec};

use super::{booting::NotBuilt, *};
use crate::{environment::Backoff, vm::record::Asked};

/// The next boot of a VM by the agent itself.
pub(super) struct Due {
    at: tokio::time::Instant,
    /// The number of attempts that the status will show.
    attempts: u32,
}

/// Completes at the time of the next boot. Never completes if none is planned.
pub(super) async fn due(due: &Option<Due>) {
    match due {
        Some(due) => tokio::time::sleep_until(due.at).await,
        None => pending().await,
    }
}

impl Actor {
    /// Decides at the end of a VM whether and when it is booted again. Call it before the state shows that the VM is at rest.
    pub(super) fn plan_restart(&mut self, state: VmState, cause: Option<&Cause>) {
        self.cancel_restart();
        if !self.deleting.is_empty() || !restarts(self.vm.value.spec.restart, &self.run, state, cause) {
            return;
        }
        let backoff = self.env.backoff;
        let ran =
            self.run.booted.map_or(0, |since| Timestamp::now().unix_ms().saturating_sub(since.unix_ms()));
        if u128::from(ran) >= backoff.reset.as_millis() {
            self.run.restart.attempts = 0;
        }
        let delay = delay(backoff, self.run.restart.attempts);
        tracing::info!(vm = %self.name(), attempts = self.run.restart.attempts, "the agent boots it again in {delay:?}");
        self.run.restart.next = Some(later(delay));
        self.arm(delay, self.run.restart.attempts.saturating_add(1));
    }

    pub(super) fn cancel_restart(&mut self) {
        self.run.restart.next = None;
        self.due = None;
    }

    fn arm(&mut self, delay: Duration, attempts: u32) {
        self.due = tokio::time::Instant::now().checked_add(delay).map(|at| Due { at, attempts });
    }

    /// Resumes the plan of the former agent. Called at the agent's start for a VM at rest.
    pub(super) fn resume_restart(&mut self) {
        let boot = self.env.boot_id.as_str();
        if autostarts(&self.vm.value.spec, &self.run, boot) {
            return self.arm(Duration::ZERO, self.run.restart.attempts);
        }
        match self.run.restart.next {
            Some(next) if self.run.rested_in.as_deref() == Some(boot) => {
                let delay = Duration::from_millis(next.unix_ms().saturating_sub(Timestamp::now().unix_ms()));
                // The clock may have been changed meanwhile, so limit the delay.
                self.arm(delay.min(self.env.backoff.most), self.run.restart.attempts.saturating_add(1));
            }
            // No boot is planned, or the host has restarted since: then only `autostart` boots the VM.
            _ => self.cancel_restart(),
        }
    }

    /// Notes that a caller wants the VM to end, or to stay at rest.
    pub(super) async fn asked_to_end(&mut self, by: Asked) {
        let at_rest = self.run.state.is_at_rest();
        self.cancel_restart();
        self.run.asked = Some(by);
        if at_rest && self.run.state != VmState::Defined {
            self.run.rested_in = Some(self.env.boot_id.clone());
        }
        drop(self.store().await);
    }

    /// Boots the VM with the rights of the users that chose its files.
    pub(super) async fn boot_unasked(&mut self) {
        let Some(Due { attempts, .. }) = self.due.take() else { return };
        if self.closed {
            return;
        }
        tracing::info!(vm = %self.name(), attempts, "the agent boots it by itself");
        let result = match self.begin(None, attempts).await {
            Ok(files) => match self.build(files).await {
                Ok(()) | Err(NotBuilt::Unwanted) => return,
                Err(NotBuilt::Failed(problem)) => {
                    self.fail(problem);
                    self.abandon(true).await;
                    return;
                }
            },
            Err(problem) => problem,
        };
        // The boot did not begin: the VM is still at rest, now with another cause.
        self.progress.end();
        self.fail(result);
        self.run.restart = RestartStatus { attempts, next: None };
        self.run.booted = None;
        self.run.rested_in = Some(self.env.boot_id.clone());
        let cause = self.run.cause.clone();
        self.plan_restart(VmState::Failed, cause.as_ref());
        self.step(VmState::Failed).await;
    }
}

pub(super) fn later(delay: Duration) -> Timestamp {
    let ms = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
    Timestamp::from_unix_ms(Timestamp::now().unix_ms().saturating_add(ms))
}

/// The delay before the next attempt, after this number of attempts.
fn delay(backoff: Backoff, attempts: u32) -> Duration {
    backoff.first.saturating_mul(2_u32.saturating_pow(attempts)).min(backoff.most)
}

/// Whether a VM is booted again after this end; `run` is its record before the end.
fn restarts(policy: RestartPolicy, run: &RunRecord, end: VmState, cause: Option<&Cause>) -> bool {
    let wanted = match policy {
        RestartPolicy::Never => false,
        RestartPolicy::OnFailure => end == VmState::Failed,
        RestartPolicy::Always => true,
    };
    let asked = match run.asked {
        // The agent stopped the VM when it shut down.
        Some(Asked::Agent) => true,
        // A guest that fails after a request to power off has not carried out the request.
        Some(Asked::User) => run.state == VmState::Stopping || end == VmState::Stopped,
        None => false,
    };
    let code = cause.map(|cause| cause.code);
    wanted && !asked && !matches!(code, Some(CauseCode::Stopped | CauseCode::HostRestarted))
}

/// Whether a starting agent boots this VM, which is at rest. `boot` is the host's boot.
fn autostarts(spec: &VmSpec, run: &RunRecord, boot: &str) -> bool {
    let stopped = match run.asked {
        Some(Asked::User) => true,
        Some(Asked::Agent) => false,
        None => run.state == VmState::Stopped,
    };
    spec.autostart && !(stopped && run.rested_in.as_deref() == Some(boot))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::tests::fixture::spec;

    #[test]
    fn the_time_between_attempts_doubles_up_to_a_limit() {
        let backoff = Backoff::default();
        let seconds: Vec<u64> = (0..10).map(|attempts| delay(backoff, attempts).as_secs()).collect();
        assert_eq!(seconds, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300]);
        assert_eq!(delay(backoff, u32::MAX).as_secs(), 300);
    }

    #[test]
    fn who_is_booted_again() {
        use CauseCode::*;
        use RestartPolicy::*;
        for (end, code, asked, before, never, on_failure, always) in [
            (VmState::Failed, VmmCrashed, None, VmState::Running, false, true, true),
            (VmState::Failed, BootFailed, None, VmState::Starting, false, true, true),
            (VmState::Stopped, PoweredOff, None, VmState::Running, false, false, true),
            (VmState::Stopped, Stopped, None, VmState::Stopping, false, false, false),
            (VmState::Failed, HostRestarted, None, VmState::Running, false, false, false),
            (VmState::Stopped, PoweredOff, Some(Asked::User), VmState::Running, false, false, false),
            (VmState::Failed, MachineFailed, Some(Asked::User), VmState::Running, false, true, true),
            (VmState::Failed, MachineFailed, Some(Asked::User), VmState::Stopping, false, false, false),
            (VmState::Stopped, PoweredOff, Some(Asked::Agent), VmState::Running, false, false, false),
            (VmState::Failed, MachineFailed, Some(Asked::Agent), VmState::Running, false, false, false),
        ] {
            let run = RunRecord { state: before, asked, ..RunRecord::default() };
            let cause = cause(code, "");
            for (policy, expect) in [(Never, never), (OnFailure, on_failure), (Always, always)] {
                let again = restarts(policy, &run, end, Some(&cause));
                assert_eq!(again, expect, "{policy:?} {end} {code:?} {asked:?} {before}");
            }
        }
    }

    #[test]
    fn who_is_booted_when_the_agent_starts() {
        let spec = VmSpec { autostart: true, ..spec("web1") };
        for (state, asked, rested_in, expect) in [
            (VmState::Defined, None, None, true),
            (VmState::Failed, None, Some("now"), true),
            (VmState::Failed, Some(Asked::User), Some("now"), false),
            (VmState::Failed, Some(Asked::User), Some("before"), true),
            (VmState::Stopped, None, Some("now"), false),
            (VmState::Stopped, None, Some("before"), true),
            (VmState::Stopped, Some(Asked::User), Some("now"), false),
            (VmState::Stopped, Some(Asked::User), Some("before"), true),
            (VmState::Stopped, Some(Asked::Agent), Some("now"), true),
            // From the record of an agent that did not store the time.
            (VmState::Stopped, None, None, true),
        ] {
            let run =
                RunRecord { state, asked, rested_in: rested_in.map(Into::into), ..RunRecord::default() };
            assert_eq!(autostarts(&spec, &run, "now"), expect, "{state} {asked:?} {rested_in:?}");
            assert!(!autostarts(&VmSpec { autostart: false, ..spec.clone() }, &run, "now"));
        }
    }
}
