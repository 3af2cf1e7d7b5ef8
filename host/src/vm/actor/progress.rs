// SPDX-License-Identifier: Apache-2.0

//! How far an operation is. It is told while it lasts, and not stored: nothing that a boot waits for is added to it.

use api::types::{OperationAction, Stage, Timestamp, VmOperation, VmSpec};
use tokio::sync::watch;

use crate::vm::{Status, claims::Held};

/// The operation that is under way, if one is.
pub(super) struct Progress {
    status: watch::Sender<Status>,
    now: Option<UnderWay>,
}

struct UnderWay {
    action: OperationAction,
    /// Those that have been entered, and those that are expected.
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

    /// Another operation, in place of one that it overtakes. It is shown from its first stage on.
    pub(super) fn begin(&mut self, action: OperationAction, stages: Vec<Stage>) {
        self.now = Some(UnderWay { action, stages, entered: 0, since: Timestamp::now() });
    }

    /// These follow on the present stage, whatever else was expected. Without an operation they are one: the VM has ended by itself.
    pub(super) fn follow_with(&mut self, stages: Vec<Stage>) {
        match &mut self.now {
            None => self.begin(OperationAction::Release, stages),
            Some(now) => {
                now.stages.truncate(now.entered);
                now.stages.extend(stages);
            }
        }
    }

    /// The next stage of this name is begun, and shown. One that is not expected is a part of the present one.
    pub(super) fn enter(&mut self, stage: Stage) {
        let Some(now) = &mut self.now else { return };
        let expected = now.stages.iter().skip(now.entered).position(|next| *next == stage);
        let Some(before) = expected else { return };
        now.entered = now.entered.saturating_add(before).saturating_add(1);
        now.since = Timestamp::now();
        let shown = self.shown();
        self.status.send_modify(|status| status.operation = shown);
    }

    /// It is done, or given up. What is published next says so.
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

/// From files to a guest that runs. What an earlier end left is given back first.
pub(super) fn boot(spec: &VmSpec, left: &[Held]) -> Vec<Stage> {
    let mut stages = vec![Stage::OpeningFiles];
    stages.extend(release(left));
    if !spec.adapters.is_empty() || !spec.devices.is_empty() {
        stages.push(Stage::ClaimingFunctions);
    }
    for _ in &spec.adapters {
        stages.extend([Stage::BindingFunction, Stage::SettingPolicy]);
    }
    stages.extend(spec.devices.iter().map(|_| Stage::BindingFunction));
    stages.extend([Stage::StartingProcess, Stage::BuildingMachine, Stage::StartingVcpus]);
    stages
}

/// Giving everything back, in the order in which that is done.
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
            // The one after it is left out.
            (BindingFunction, (BindingFunction, 4)),
            (SettingPolicy, (BindingFunction, 4)),
            (StartingVcpus, (StartingVcpus, 5)),
        ] {
            progress.enter(stage);
            assert_eq!(shown(&progress), Some((Boot, expect.0, expect.1, 5)), "{stage}");
        }
        // It fails there: the rest of its way is another one.
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
