// SPDX-License-Identifier: Apache-2.0

//! Disks of VMs that run.

use api::types::VmSpec;
use protocol::{DiskLimits, DiskRate};
use serde_json::json;

use super::{fixture::PATIENCE, *};
use crate::vm::VmHandle;

/// A VM that runs, with the disks `root` and `data`.
async fn boot(host: &Host) -> VmHandle {
    let [root, data] = ["root", "data"].map(|id| {
        json!({ "id": id, "path": host.disk(id), "format": "raw",
                "limits": { "operations_per_second": 50, "burst_operations": 70 } })
    });
    let disks = serde_json::from_value(json!([root, data])).unwrap();
    let vm = host.create("web1", |spec| (spec.disks, spec.adapters) = (disks, Vec::new())).await;
    host.act(&vm, VmAction::Boot).await.unwrap();
    vm
}

/// The limits in the process.
fn limits(host: &Host, disk: &str) -> DiskLimits {
    let text = std::fs::read_to_string(host.gates().0.join(format!("limits-{disk}"))).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn operations(per_second: u64, burst: u64) -> DiskLimits {
    DiskLimits { bytes: None, operations: Some(DiskRate { per_second, burst }) }
}

fn limited(vm: &VmHandle, rates: [u32; 2]) -> VmSpec {
    let mut spec = vm.record().value.spec.clone();
    for (disk, rate) in spec.disks.iter_mut().zip(rates) {
        let limits = json!({ "operations_per_second": rate });
        disk.limits = serde_json::from_value(limits).unwrap();
    }
    spec
}

#[tokio::test]
async fn the_limits_of_a_disk_change_while_the_vm_runs() {
    let host = Host::new().await;
    let vm = boot(&host).await;
    assert_eq!(limits(&host, "root"), operations(50, 70));
    vm.edit(caller(), limited(&vm, [8, 9]), None).await.unwrap();
    assert_eq!((limits(&host, "root"), limits(&host, "data")), (operations(8, 8), operations(9, 9)));
    let before = vm.record();

    // The fake refuses this rate: nothing has changed, the first disk neither.
    let problem = vm.edit(caller(), limited(&vm, [7, 13]), None).await.unwrap_err();
    assert_eq!(problem.code, ProblemCode::DeviceFailed);
    assert_eq!(limits(&host, "root"), operations(8, 8));
    assert_eq!(vm.record(), before);

    // Another part of a disk is the machine.
    let mut other = limited(&vm, [8, 9]);
    other.disks[0].read_only = true;
    let problem = vm.edit(caller(), other, None).await.unwrap_err();
    assert!(problem.code == ProblemCode::WrongState && problem.detail.contains("stop it first"), "{problem}");

    host.act(&vm, VmAction::Stop).await.unwrap();
    vm.edit(caller(), limited(&vm, [13, 13]), None).await.unwrap();
    assert_eq!(limits(&host, "root"), operations(8, 8), "there is no process");
}

/// An agent that dies between the process and the store leaves the new limits in the process.
#[tokio::test]
async fn the_next_agent_repeats_the_limits() {
    let host = Host::new().await;
    let vm = boot(&host).await;
    std::fs::remove_file(host.gates().0.join("limits-root")).unwrap();
    vm.leave().await;
    let _vm = host.load(vm.id).await;
    let deadline = std::time::Instant::now() + PATIENCE;
    while !host.gates().0.join("limits-root").exists() {
        assert!(std::time::Instant::now() < deadline, "the limits do not come");
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_process_of_an_older_version_is_named_as_the_cause() {
    let host = Host::new().await;
    let vm = boot(&host).await;
    host.tell(&vm, "nonsense old").await;
    let deadline = std::time::Instant::now() + PATIENCE;
    let problem = loop {
        let problem = vm.edit(caller(), limited(&vm, [8, 9]), None).await.unwrap_err();
        if problem.code != ProblemCode::VmmFailed {
            break problem;
        }
        assert!(std::time::Instant::now() < deadline, "{problem}");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    };
    assert_eq!(problem.code, ProblemCode::WrongState);
    assert!(
        problem.detail.contains("older version") && problem.detail.contains("boot it again"),
        "{problem}"
    );
}

/// Waits for the VM to run.
async fn goes_on(host: &Host, vm: &VmHandle) {
    host.reaches(vm, VmState::Running).await;
    let run = vm.status().run;
    assert_eq!((run.cause, run.full), (None, None));
}

fn is_full(vm: &VmHandle) -> bool {
    vm.status().run.cause.is_some_and(|cause| cause.code == CauseCode::DiskFull)
}

/// The file system of the test has room, so the agent lets the VM go on after its first look.
#[tokio::test]
async fn a_vm_without_room_is_paused_and_goes_on_by_itself() {
    let host = Host::new().await;
    let vm = boot(&host).await;
    host.tell(&vm, "full root").await;
    host.reaches(&vm, VmState::Paused).await;
    let cause = vm.status().run.cause.unwrap();
    assert_eq!(cause.code, CauseCode::DiskFull);
    assert!(cause.detail.contains("disk root (/") && cause.detail.contains("vm resume web1"), "{cause:?}");
    goes_on(&host, &vm).await;

    // The next agent finds the VM so.
    host.tell(&vm, "full data").await;
    host.reaches(&vm, VmState::Paused).await;
    vm.leave().await;
    let vm = host.load(vm.id).await;
    host.reaches(&vm, VmState::Paused).await;
    assert!(is_full(&vm));
    goes_on(&host, &vm).await;

    // A disk that the VM does not have is nothing to wait for.
    host.tell(&vm, "full other").await;
    host.reaches(&vm, VmState::Paused).await;
    assert!(!is_full(&vm));
    tokio::time::sleep(std::time::Duration::from_secs(3)).await;
    assert_eq!(vm.state(), VmState::Paused);
}

#[tokio::test]
async fn a_pause_by_a_request_outlasts_the_want_of_room() {
    let host = Host::new().await;
    let vm = boot(&host).await;
    host.tell(&vm, "full root").await;
    host.reaches(&vm, VmState::Paused).await;
    host.act(&vm, VmAction::Pause).await.unwrap();
    tokio::time::sleep(std::time::Duration::from_secs(4)).await;
    assert!(vm.state() == VmState::Paused && is_full(&vm), "{:?}", vm.status().run);
    vm.leave().await;
    let vm = host.load(vm.id).await;
    host.reaches(&vm, VmState::Paused).await;
    tokio::time::sleep(std::time::Duration::from_secs(3)).await;
    assert!(vm.state() == VmState::Paused && is_full(&vm), "under the next agent, too");
    host.act(&vm, VmAction::Resume).await.unwrap();
    goes_on(&host, &vm).await;
    // The request is over: the next want of room is the agent's business again.
    host.tell(&vm, "full root").await;
    host.reaches(&vm, VmState::Paused).await;
    goes_on(&host, &vm).await;
}
