// SPDX-License-Identifier: Apache-2.0

//! The progress that an operation shows while one of its stages is held.

use api::types::{
    OperationAction::{self, Boot, Delete, Reboot, Release, Shutdown, Stop},
    Stage::{self, *},
    VmAction, VmState,
};
use sriov::{PfControl as _, VfChange};
use tokio::time::timeout;

use super::fixture::{Gates, Host, PATIENCE, VF0, caller};
use crate::vm::{Completion, VmHandle};

/// A VM with gates to hold its operations.
struct Watched {
    host: Host,
    vm: VmHandle,
    gates: Gates,
}

impl Watched {
    async fn new(cmdline: &str) -> Self {
        let host = Host::new().await;
        let vm = host.create("web1", |spec| spec.boot.cmdline = cmdline.into()).await;
        let gates = host.gates();
        Self { host, vm, gates }
    }

    async fn begin(&self, action: VmAction) -> Completion {
        self.vm.act(action, caller()).await.unwrap()
    }

    async fn shows(&self, action: OperationAction, stage: Stage, step: u32, steps: u32) {
        let expect = Some((action, stage, step, steps));
        let of =
            |status: &crate::vm::Status| status.operation.map(|it| (it.action, it.stage, it.step, it.steps));
        let mut status = self.vm.follow();
        let found = timeout(PATIENCE, status.wait_for(|status| of(status) == expect)).await.map(drop);
        assert!(found.is_ok(), "{:?} in place of {expect:?}", self.vm.status());
    }

    /// Waits for the completion. The stage must be gone when the state is there.
    async fn ends(&self, done: Completion, state: VmState) {
        timeout(PATIENCE, done).await.unwrap().unwrap().unwrap();
        let status = self.vm.status();
        assert_eq!((status.run.state, status.operation), (state, None));
    }
}

#[tokio::test]
async fn a_boot_and_a_stop_show_each_stage_while_it_lasts() {
    let it = Watched::new("").await;
    for gate in ["read", "set", "start", "configure", "run", "reboot", "stop"] {
        it.gates.close(gate);
    }
    let claiming = it.host.env.claiming.lock().await;
    // The call is answered when the functions are claimed.
    let (vm, by) = (it.vm.clone(), caller());
    let begun = tokio::spawn(async move { vm.act(VmAction::Boot, by).await });
    it.shows(Boot, ClaimingFunctions, 2, 7).await;
    assert_eq!(it.host.claims().await, 0);
    drop(claiming);
    it.shows(Boot, BindingFunction, 3, 7).await;
    assert_eq!(it.host.driver(super::VF0), Some("igbvf".into()));
    it.gates.open("read");
    it.shows(Boot, SettingPolicy, 4, 7).await;
    assert_eq!(it.host.driver(super::VF0), Some("vfio-pci".into()));
    it.gates.open("set");
    it.shows(Boot, StartingProcess, 5, 7).await;
    it.gates.open("start");
    it.shows(Boot, BuildingMachine, 6, 7).await;
    it.gates.open("configure");
    it.shows(Boot, StartingVcpus, 7, 7).await;
    assert_eq!(it.vm.state(), VmState::Starting);
    it.gates.open("run");
    it.ends(begun.await.unwrap().unwrap(), VmState::Running).await;

    let done = it.begin(VmAction::Reboot).await;
    it.shows(Reboot, ResettingMachine, 1, 1).await;
    it.gates.open("reboot");
    it.ends(done, VmState::Running).await;

    it.gates.close("set");
    let done = it.begin(VmAction::Stop).await;
    it.shows(Stop, EndingProcess, 1, 3).await;
    let since = it.vm.status().operation.unwrap().since;
    // A repeated stop continues the one under way.
    let again = it.begin(VmAction::Stop).await;
    assert_eq!(it.vm.status().operation.unwrap().since, since);
    it.gates.open("stop");
    it.shows(Stop, ReturningFunction, 3, 3).await;
    assert_eq!((it.vm.state(), it.host.claims().await), (VmState::Stopping, 1));
    it.gates.open("set");
    it.ends(done, VmState::Stopped).await;
    it.ends(again, VmState::Stopped).await;
}

#[tokio::test]
async fn a_boot_that_fails_goes_on_with_giving_back() {
    let it = Watched::new("refuse-kernel").await;
    it.gates.close("configure");
    let done = it.begin(VmAction::Boot).await;
    it.shows(Boot, BuildingMachine, 6, 7).await;
    it.gates.close("set");
    it.gates.open("configure");
    it.shows(Boot, ReturningFunction, 9, 9).await;
    it.gates.open("set");
    timeout(PATIENCE, done).await.unwrap().unwrap().unwrap_err();
    let status = it.vm.status();
    assert_eq!((status.run.state, status.operation), (VmState::Failed, None));

    // A boot that is refused at once is no longer shown when the call is answered.
    it.host.set_pf_up(false);
    it.vm.act(VmAction::Boot, caller()).await.unwrap_err();
    assert_eq!(it.vm.status().operation, None);
}

#[tokio::test]
async fn a_guest_that_does_not_react_is_waited_for_until_another_operation_takes_over() {
    let it = Watched::new("").await;
    it.host.act(&it.vm, VmAction::Boot).await.unwrap();
    it.host.tell(&it.vm, "deaf").await;
    let done = it.begin(VmAction::Shutdown).await;
    it.shows(Shutdown, AskingGuest, 1, 4).await;
    let since = it.vm.status().operation.unwrap().since;
    let again = it.begin(VmAction::Shutdown).await;
    it.host.act(&it.vm, VmAction::Pause).await.unwrap();
    let operation = it.vm.status().operation.unwrap();
    assert_eq!((operation.stage, operation.since), (AskingGuest, since));
    it.gates.close("stop");
    let stopped = it.begin(VmAction::Stop).await;
    it.shows(Stop, EndingProcess, 1, 3).await;
    // Delete the VM during the stop.
    let vm = it.vm.clone();
    let deleted = tokio::spawn(async move { vm.delete(caller(), None).await });
    it.shows(Delete, EndingProcess, 1, 4).await;
    it.gates.close("set");
    it.gates.open("stop");
    it.shows(Delete, ReturningFunction, 3, 4).await;
    it.gates.open("set");
    deleted.await.unwrap().unwrap();
    for done in [done, again, stopped] {
        done.await.unwrap().unwrap();
    }
    it.host.assert_untouched().await;
}

#[tokio::test]
async fn an_end_that_nobody_asked_for_shows_what_is_given_back() {
    let it = Watched::new("").await;
    for word in ["crash", "poweroff"] {
        it.host.act(&it.vm, VmAction::Boot).await.unwrap();
        it.gates.close("set");
        it.host.tell(&it.vm, word).await;
        it.shows(Release, ReturningFunction, 2, 2).await;
        assert_eq!(it.vm.state(), VmState::Running);
        it.gates.open("set");
        it.host.at_rest(&it.vm).await;
        assert_eq!(it.vm.status().operation, None, "{word}");
    }
}

#[tokio::test]
async fn what_a_former_agent_left_is_given_back_before_the_next_boot() {
    let it = Watched::new("").await;
    it.host.act(&it.vm, VmAction::Boot).await.unwrap();
    // The PF refuses to restore the VF's settings.
    it.host.pf_answers(&[Some(5); 4]);
    it.host.act(&it.vm, VmAction::Stop).await.unwrap_err();
    assert_eq!((it.host.claims().await, it.vm.status().operation), (1, None));
    it.host.pf_answers(&[]);
    it.gates.close("set");
    let (vm, by) = (it.vm.clone(), caller());
    let begun = tokio::spawn(async move { vm.act(VmAction::Boot, by).await });
    it.shows(Boot, ReturningFunction, 3, 9).await;
    it.gates.open("set");
    it.ends(begun.await.unwrap().unwrap(), VmState::Running).await;
    it.host.act(&it.vm, VmAction::Stop).await.unwrap();
}

/// The second attempt once took the tenant's address for one that the host's driver had chosen, and left it to the host.
#[tokio::test]
async fn a_release_that_fails_twice_is_not_forgotten() {
    let it = Watched::new("").await;
    it.host.act(&it.vm, VmAction::Boot).await.unwrap();
    it.host.pf_answers(&[Some(5); 64]);
    it.host.act(&it.vm, VmAction::Stop).await.unwrap_err();
    it.vm.delete(caller(), None).await.unwrap_err();
    assert_eq!(it.host.claims().await, 1);
    assert_ne!(it.host.driver(VF0), Some("igbvf".into()), "the host has not got the tenant's VF");
    it.host.pf_answers(&[]);
    it.vm.delete(caller(), None).await.unwrap();
    it.host.assert_untouched().await;
}

/// The host's driver has the VF again, and has chosen an address, when a release is repeated. There was no address before.
#[tokio::test]
async fn a_repeated_release_leaves_the_host_the_address_that_it_has_chosen() {
    let it = Watched::new("").await;
    assert_eq!(it.host.settings(0).mac, None);
    it.host.act(&it.vm, VmAction::Boot).await.unwrap();
    let database = rusqlite::Connection::open(it.host.database()).unwrap();
    let full = "CREATE TRIGGER full BEFORE DELETE ON objects WHEN OLD.kind = 'claim' \
                BEGIN SELECT RAISE(ABORT, 'disk is full'); END";
    database.execute_batch(full).unwrap();
    it.host.act(&it.vm, VmAction::Stop).await.unwrap_err();
    assert_eq!((it.host.claims().await, it.host.driver(VF0)), (1, Some("igbvf".into())));
    let chosen = "52:54:00:00:00:77".parse().unwrap();
    it.host.pf.lock().unwrap().set(0, VfChange::Mac(Some(chosen))).unwrap();
    database.execute_batch("DROP TRIGGER full").unwrap();
    it.vm.delete(caller(), None).await.unwrap();
    assert_eq!((it.host.claims().await, it.host.driver(VF0)), (0, Some("igbvf".into())));
    assert_eq!(it.host.settings(0).mac, Some(chosen), "the host's interface still has its address");
}
