// SPDX-License-Identifier: Apache-2.0

//! The progress of an operation. It is published while the operation lasts. It is not stored, so
//! that a boot waits for no further write.

use api::types::{OperationAction, Stage, Timestamp, VmOperation, VmSpec};
use tokio::sync::watch;

use crate::vm::{Status, claims::Held};

/// The operation under way, if there is one.
pub(super) struct Progress {
    status: watch::Sender<Status>,
    now: Option<UnderWay>,
}

struct UnderWay {
    action: OperationAction,
    /// The stages that were entered, followed by the expected ones.
    stages: Vec<Stage>,
    entered: usize,
    since: Timestamp,
}

impl Progress {
    pub(super) fn new(status: watch::Sender<Status>) -> Self {
        Self { status, now: None }
    }

    pub(super) fn action(&self) -> Option<OperationAction> {
        self.now.as_ref().map(|now| now.action)
    }

    /// Begins an operation, in place of the current one. It is shown from its first stage on.
    pub(super) fn begin(&mut self, action: OperationAction, stages: Vec<Stage>) {
        self.now = Some(UnderWay { action, stages, entered: 0, since: Timestamp::now() });
    }

    /// Replaces the expected stages after the present one. Without an operation, the VM has ended
    /// by itself: begins an operation with these stages.
    pub(super) fn follow_with(&mut self, stages: Vec<Stage>) {
        match &mut self.now {
            None => self.begin(OperationAction::Release, stages),
            Some(now) => {
                now.stages.truncate(now.entered);
                now.stages.extend(stages);
            }
        }
    }

    /// Enters the next expected stage of this name, and shows it. A stage that is not expected is a
    /// part of the present one.
    pub(super) fn enter(&mut self, stage: Stage) {
        let Some(now) = &mut self.now else { return };
        let expected = now.stages.iter().skip(now.entered).position(|next| *next == stage);
        let Some(before) = expected else { return };
        now.entered = now.entered.saturating_add(before).saturating_add(1);
        now.since = Timestamp::now();
        let shown = self.shown();
        self.status.send_modify(|status| status.operation = shown);
    }

    /// Ends the operation, completed or not. The next published status shows that.
    pub(super) fn end(&mut self) {
        self.now = None;
    }

    pub(super) fn shown(&self) -> Option<VmOperation> {
        let now = self.now.as_ref()?;
        let stage = *now.stages.get(now.entered.checked_sub(1)?)?;
        let number = |count| u32::try_from(count).unwrap_or(u32::MAX);
        let (step, steps) = (number(now.entered), number(now.stages.len()));
        Some(VmOperation { action: now.action, stage, since: now.since, step, steps })
    }
}

/// The stages from opening files to a running guest. Claims that an earlier end left are released
/// first.
pub(super) fn boot(spec: &VmSpec, left: &[Held]) -> Vec<Stage> {
    let mut stages = vec![Stage::OpeningFiles];
    stages.extend(release(left));
    if spec.functions() > 0 {
        stages.push(Stage::ClaimingFunctions);
    }
    // In the order of the claims.
    let ports = |is_nic: bool| {
        let of_kind = spec.ports().filter(move |port| port.is_nic == is_nic);
        of_kind.flat_map(|_| [Stage::BindingFunction, Stage::SettingPolicy])
    };
    stages.extend(ports(false));
    stages.extend(spec.devices.iter().map(|_| Stage::BindingFunction));
    stages.extend(ports(true));
    stages.extend([Stage::StartingProcess, Stage::BuildingMachine, Stage::StartingVcpus]);
    stages
}

/// The stages of releasing all claims, in the order of the release.
pub(super) fn release(held: &[Held]) -> Vec<Stage> {
    let of = |claim: &Held| {
        let clean = claim.value.adapter.is_some().then_some(Stage::CleaningFunction);
        clean.into_iter().chain([Stage::ReturningFunction])
    };
    held.iter().rev().flat_map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(progress: &Progress) -> Option<(OperationAction, Stage, u32, u32)> {
        let operation = progress.shown();
        assert_eq!(progress.status.borrow().operation, operation, "what is shown is published");
        operation.map(|it| (it.action, it.stage, it.step, it.steps))
    }

    #[test]
    fn stages_are_counted_in_their_order_and_others_change_nothing() {
        use OperationAction::*;
        use Stage::*;
        let mut progress = Progress::new(watch::channel(Status::default()).0);
        progress.enter(OpeningFiles);
        assert_eq!(shown(&progress), None, "nothing is under way");
        let stages = vec![ClaimingFunctions, BindingFunction, SettingPolicy, BindingFunction, StartingVcpus];
        progress.begin(Boot, stages);
        assert_eq!(shown(&progress), None, "nothing of it has begun");
        for (stage, expect) in [
            (ClaimingFunctions, (ClaimingFunctions, 1)),
            (BindingFunction, (BindingFunction, 2)),
            (ClaimingFunctions, (BindingFunction, 2)),
            (Forgetting, (BindingFunction, 2)),
            // The stage between the two is skipped.
            (BindingFunction, (BindingFunction, 4)),
            (SettingPolicy, (BindingFunction, 4)),
            (StartingVcpus, (StartingVcpus, 5)),
        ] {
            progress.enter(stage);
            assert_eq!(shown(&progress), Some((Boot, expect.0, expect.1, 5)), "{stage}");
        }
        // The boot fails at this stage, so other stages follow.
        progress.follow_with(vec![EndingProcess, ReturningFunction]);
        progress.enter(EndingProcess);
        assert_eq!(shown(&progress), Some((Boot, EndingProcess, 6, 7)));
        progress.follow_with(vec![ReturningFunction]);
        progress.enter(ReturningFunction);
        assert_eq!(shown(&progress), Some((Boot, ReturningFunction, 7, 7)));
        progress.end();
        progress.follow_with(vec![ReturningFunction]);
        progress.enter(ReturningFunction);
        assert_eq!(shown(&progress), Some((Release, ReturningFunction, 1, 1)));
    }
}
