// SPDX-License-Identifier: Apache-2.0

//! VMs with a lease.

use std::{sync::atomic::Ordering, time::Duration};

use api::{
    LeaseTerms,
    problem::ProblemCode,
    types::{EventKind, Stage, VmAction, VmState},
};
use store::{Entry, Expect, StoreError};
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use super::fixture::{Host, PATIENCE, caller};
use crate::vm::{
    VmHandle,
    record::{RunRecord, VmRecord},
};

/// The grace period for a client in these tests.
const GRACE: Duration = Duration::from_millis(800);

/// Long enough to show that an end does not come.
const SOON: Duration = Duration::from_millis(400);

/// A lease without a holder.
const ANY: LeaseTerms = LeaseTerms { holder: None };

async fn host(grace: Duration) -> Host {
    Host::with_environment(|env| env.lease_grace = grace).await
}

/// Waits until nothing of the VM is left.
async fn is_gone(host: &Host, vm: &VmHandle) {
    let ended = async {
        while !vm.has_ended() {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, ended).await.unwrap_or_else(|_| panic!("it stays: {:?}", vm.status()));
    assert!(matches!(host.env.vms.get(vm.id).await, Err(StoreError::NotFound { .. })));
    assert!(matches!(host.env.runs.get(vm.id).await, Err(StoreError::NotFound { .. })));
    host.assert_untouched().await;
}

async fn lives_on(vm: &VmHandle, state: VmState) {
    sleep(SOON).await;
    assert_eq!((vm.has_ended(), vm.state()), (false, state));
}

#[tokio::test]
async fn a_vm_ends_with_the_last_client_of_its_lease() {
    let host = host(Duration::from_secs(3600)).await;
    let mut events = host.env.policy.events.subscribe(None).unwrap();
    let vm = host.create("web1", |_| {}).await;
    assert_eq!(vm.status().lease, None);
    let first = vm.lease(ANY).await.unwrap();
    host.act(&vm, VmAction::Boot).await.unwrap();
    assert_eq!(vm.status().lease.unwrap().until, None);
    // A client whose old connection ends late has connected again.
    let second = vm.lease(ANY).await.unwrap();
    drop(first);
    lives_on(&vm, VmState::Running).await;
    assert_eq!(host.claims().await, 1);
    drop(second);
    is_gone(&host, &vm).await;
    let mut by = None;
    while let Ok(event) = events.try_recv() {
        if let EventKind::Deleted { object, by: who } = event.what
            && object.id == vm.id
        {
            by = Some(who);
        }
    }
    assert_eq!(by, Some(None), "the agent did it by itself");
    assert_eq!(vm.lease(ANY).await.map(drop).unwrap_err().code, ProblemCode::NotFound);
}

#[tokio::test]
async fn a_vm_whose_lease_is_ended_lives_on() {
    let host = host(GRACE).await;
    let vm = host.create("web1", |_| {}).await;
    let lease = vm.lease(ANY).await.unwrap();
    host.act(&vm, VmAction::Boot).await.unwrap();
    vm.end_lease().await.unwrap();
    timeout(PATIENCE, lease).await.expect("the client hears of it");
    lives_on(&vm, VmState::Running).await;
    assert_eq!(vm.status().lease, None);
    assert!(!host.env.runs.get(vm.id).await.unwrap().value.leased, "also after the agent's end");
    vm.end_lease().await.unwrap();
    // A deletion by another caller ends the lease, too.
    let lease = vm.lease(ANY).await.unwrap();
    vm.delete(caller(), None).await.unwrap();
    timeout(PATIENCE, lease).await.expect("the client hears of it");
    is_gone(&host, &vm).await;
}

/// A new VM with a lease is deleted unless its client comes within the grace period.
#[tokio::test]
async fn a_vm_that_is_created_with_a_lease_waits_for_its_client() {
    let host = host(GRACE).await;
    for comes in [true, false] {
        let spec = super::fixture::spec("web1");
        let (id, value) = (Uuid::new_v4(), VmRecord::new(api::types::Timestamp::now(), spec, &caller()));
        let revision = host.env.vms.put(id, "web1", &value, Expect::Absent).await.unwrap();
        let entry = Entry { id, name: "web1".into(), revision, value };
        let vm = VmHandle::start_leased(host.env.clone(), entry, ANY);
        let mut status = vm.follow();
        let waits = status.wait_for(|status| status.lease.is_some_and(|lease| lease.until.is_some()));
        timeout(PATIENCE, waits).await.expect("it says how long it waits").unwrap();
        if comes {
            let lease = vm.lease(ANY).await.unwrap();
            sleep(GRACE).await;
            lives_on(&vm, VmState::Defined).await;
            drop(lease);
        }
        is_gone(&host, &vm).await;
    }
}

/// An agent that ends closes its clients' connections. That does not end their leases: the next agent waits for
/// them.
#[tokio::test]
async fn the_next_agent_waits_for_the_client_for_a_time() {
    for comes in [true, false] {
        let mut host = host(GRACE).await;
        let vm = host.create("web1", |_| {}).await;
        let lease = vm.lease(ANY).await.unwrap();
        host.act(&vm, VmAction::Boot).await.unwrap();
        host.env.ending.store(true, Ordering::SeqCst);
        drop(lease);
        lives_on(&vm, VmState::Running).await;
        vm.leave().await;
        host.env = host.another_agent(|env| env.lease_grace = GRACE).await;
        let vm = host.load(vm.id).await;
        host.reaches(&vm, VmState::Running).await;
        let mut status = vm.follow();
        let waits = status.wait_for(|status| status.lease.is_some_and(|lease| lease.until.is_some()));
        timeout(PATIENCE, waits).await.expect("it says how long it waits").unwrap();
        assert_eq!(host.claims().await, 1);
        if comes {
            let lease = vm.lease(ANY).await.unwrap();
            sleep(GRACE).await;
            lives_on(&vm, VmState::Running).await;
            assert_eq!(vm.status().lease.unwrap().until, None);
            drop(lease);
        }
        is_gone(&host, &vm).await;
    }
}

/// The holder alone has the lease, at once and after a restart of the agent. A stranger is refused also while the agent waits for
/// the holder.
#[tokio::test]
async fn a_lease_with_a_holder_is_that_client_s_alone() {
    let mut host = host(Duration::from_secs(3600)).await;
    let vm = host.create("web1", |_| {}).await;
    let [holder, stranger] = [(); 2].map(|()| LeaseTerms { holder: Some(Uuid::new_v4()) });
    let refused = async |vm: &VmHandle| {
        for terms in [stranger, ANY] {
            let problem = vm.lease(terms).await.map(drop).unwrap_err();
            assert_eq!(problem.code, ProblemCode::WrongState);
            assert!(problem.detail.contains("web1 lives by the lease of another client"), "{problem}");
        }
    };
    let lease = vm.lease(holder).await.unwrap();
    refused(&vm).await;
    host.act(&vm, VmAction::Boot).await.unwrap();
    refused(&vm).await;
    host.env.ending.store(true, Ordering::SeqCst);
    drop(lease);
    vm.leave().await;
    host.env = host.another_agent(|env| env.lease_grace = Duration::from_secs(3600)).await;
    let vm = host.load(vm.id).await;
    host.reaches(&vm, VmState::Running).await;
    refused(&vm).await;
    let lease = vm.lease(holder).await.unwrap();
    refused(&vm).await;
    // Its old connection may end late.
    let again = vm.lease(holder).await.unwrap();
    drop(lease);
    lives_on(&vm, VmState::Running).await;
    // A lease that was ended is free for the next client.
    vm.end_lease().await.unwrap();
    drop(again);
    let lease = vm.lease(stranger).await.unwrap();
    drop(lease);
    is_gone(&host, &vm).await;
}

#[tokio::test]
async fn a_boot_ends_with_its_client() {
    let host = host(GRACE).await;
    let vm = host.create("web1", |_| {}).await;
    let lease = vm.lease(ANY).await.unwrap();
    host.gates().close("configure");
    let booted = vm.act(VmAction::Boot, caller()).await.unwrap();
    let mut status = vm.follow();
    let builds = status.wait_for(|status| {
        status.operation.as_ref().is_some_and(|operation| operation.stage == Stage::BuildingMachine)
    });
    timeout(PATIENCE, builds).await.expect("it is built").unwrap();
    drop(lease);
    is_gone(&host, &vm).await;
    assert_eq!(booted.await.unwrap().unwrap_err().code, ProblemCode::WrongState);
    host.gates().open("configure");
}

/// Records of agents without leases are of VMs without one.
#[test]
fn an_old_record_has_no_lease() {
    let run: RunRecord = serde_json::from_value(
        serde_json::json!({ "state": "stopped", "since": "2026-01-31T12:00:00.000Z" }),
    )
    .unwrap();
    assert!(!run.leased);
}

#[tokio::test]
async fn a_deletion_that_fails_is_tried_again() {
    let host = host(GRACE).await;
    let vm = host.create("web1", |_| {}).await;
    let lease = vm.lease(ANY).await.unwrap();
    host.act(&vm, VmAction::Boot).await.unwrap();
    host.pf_answers(&[Some(5); 64]);
    drop(lease);
    let ended = async {
        while vm.state() == VmState::Running {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, ended).await.unwrap();
    sleep(SOON).await;
    assert_eq!((vm.has_ended(), host.claims().await), (false, 1), "the VF has the tenant's address");
    host.pf_answers(&[]);
    is_gone(&host, &vm).await;
}
