// SPDX-License-Identifier: Apache-2.0

//! Restarts and boots by the agent itself, and edits of VMs.

use std::time::Duration;

use api::{
    PolicyBackend,
    problem::ProblemCode,
    types::{CauseCode, ObjectRef, RestartPolicy, Stage, VmAction, VmSpec, VmState},
};

use store::{Expect, Scope};
use uuid::Uuid;

use super::fixture::{Host, PATIENCE, caller};
use crate::{
    environment::Backoff,
    vm::{
        Status, VmHandle,
        record::{Asked, RunRecord},
    },
};

/// Long enough to see an unwanted boot.
const SOON: Duration = Duration::from_millis(600);

const BACKOFF: Backoff = Backoff {
    first: Duration::from_millis(50),
    most: Duration::from_millis(300),
    reset: Duration::from_secs(3600),
};

/// No attempt with these delays happens during a test.
const SLOW: Backoff =
    Backoff { first: Duration::from_secs(3600), most: Duration::from_secs(7200), ..BACKOFF };

async fn host(backoff: Backoff) -> Host {
    Host::with_environment(|env| env.backoff = backoff).await
}

async fn until(vm: &VmHandle, what: &str, holds: impl FnMut(&Status) -> bool) -> Status {
    let mut status = vm.follow();
    let found = tokio::time::timeout(PATIENCE, status.wait_for(holds)).await;
    found.unwrap_or_else(|_| panic!("{what}: {:?}", vm.status())).unwrap().clone()
}

async fn runs_again(vm: &VmHandle, attempts: u32) {
    let again = |status: &Status| {
        status.run.state == VmState::Running
            && status.run.restart.attempts == attempts
            && status.run.boots == 1
    };
    let status = until(vm, "it runs again", again).await;
    assert_eq!(status.run.restart.next, None);
}

async fn stays(vm: &VmHandle, state: VmState) {
    tokio::time::sleep(SOON).await;
    assert_eq!((vm.state(), vm.status().run.restart.next), (state, None));
}

#[tokio::test]
async fn one_that_crashes_is_booted_again_and_one_that_powers_off_is_not() {
    let host = host(BACKOFF).await;
    let vm = host.create("web1", |spec| spec.restart = RestartPolicy::OnFailure).await;
    host.act(&vm, VmAction::Boot).await.unwrap();
    for (attempts, word) in [(1, "crash"), (2, "fail")] {
        host.tell(&vm, word).await;
        runs_again(&vm, attempts).await;
    }
    assert_eq!(host.claims().await, 1, "it has a VF as before");
    host.tell(&vm, "poweroff").await;
    host.reaches(&vm, VmState::Stopped).await;
    stays(&vm, VmState::Stopped).await;
    // A boot by a caller starts the count of attempts anew.
    host.act(&vm, VmAction::Boot).await.unwrap();
    assert_eq!(vm.status().run.restart.attempts, 0);
    host.act(&vm, VmAction::Stop).await.unwrap();
    stays(&vm, VmState::Stopped).await;
    host.assert_untouched().await;
}

/// A guest resets itself as often as it likes, and each reset is stored, so its price must not grow unseen.
#[tokio::test]
async fn a_guests_reset_costs_at_most_four_durable_writes() {
    let host = host(SLOW).await;
    let vm = host.create("web1", |_| {}).await;
    host.act(&vm, VmAction::Boot).await.unwrap();
    // A deletion of nothing has the revision of the store, the count of its writes.
    let written = async || {
        let nothing = host.env.stores.transaction(Scope::Local).remove::<RunRecord>(Uuid::new_v4()).unwrap();
        nothing.commit().await.unwrap()[0]
    };
    tokio::time::sleep(SOON).await;
    let mut before = written().await;
    for boots in 2..5 {
        host.tell(&vm, "reset").await;
        let is_over = |status: &Status| status.run.boots == boots && status.run.state == VmState::Running;
        until(&vm, "it rebooted", is_over).await;
        // The port notes its own reboot, and that it is over, beside the two states of the VM.
        tokio::time::sleep(SOON).await;
        let now = written().await;
        // Commits that wait for each other, on a busy machine, share a write.
        assert!((1..=4).contains(&(now - before)), "boot {boots}: {} writes", now - before);
        before = now;
    }
}

#[tokio::test]
async fn one_that_never_is_to_be_booted_again_stays_as_it_ended() {
    let host = host(BACKOFF).await;
    let vm = host.create("web1", |_| {}).await;
    host.act(&vm, VmAction::Boot).await.unwrap();
    host.tell(&vm, "crash").await;
    host.reaches(&vm, VmState::Failed).await;
    stays(&vm, VmState::Failed).await;
}

#[tokio::test]
async fn always_is_until_somebody_asks_for_the_end() {
    let host = host(BACKOFF).await;
    let vm = host.create("web1", |spec| spec.restart = RestartPolicy::Always).await;
    host.act(&vm, VmAction::Boot).await.unwrap();
    host.tell(&vm, "poweroff").await;
    runs_again(&vm, 1).await;
    // The guest obeys the request to power off.
    host.act(&vm, VmAction::Shutdown).await.unwrap();
    stays(&vm, VmState::Stopped).await;
}

#[tokio::test]
async fn one_that_ran_for_a_while_begins_with_the_first_attempt_again() {
    let host = host(Backoff { reset: Duration::ZERO, ..BACKOFF }).await;
    let vm = host.create("web1", |spec| spec.restart = RestartPolicy::Always).await;
    host.act(&vm, VmAction::Boot).await.unwrap();
    for _ in 0..2 {
        let boot = vm.status().run.booted;
        host.tell(&vm, "crash").await;
        until(&vm, "another boot", |status| status.run.booted.is_some() && status.run.booted != boot).await;
        runs_again(&vm, 1).await;
    }
    host.act(&vm, VmAction::Stop).await.unwrap();
}

#[tokio::test]
async fn a_boot_ends_when_the_vm_is_stopped_or_deleted() {
    let host = host(BACKOFF).await;
    for delete in [false, true] {
        let vm = host.create("web1", |spec| spec.restart = RestartPolicy::Always).await;
        let (spec, revision) = (vm.record().value.spec.clone(), vm.record().revision);
        host.gates().close("configure");
        let booted = vm.act(VmAction::Boot, caller()).await.unwrap();
        let builds = |status: &Status| {
            status.operation.as_ref().is_some_and(|operation| operation.stage == Stage::BuildingMachine)
        };
        until(&vm, "it is built", builds).await;
        // The edit and the deletion wait for their turn.
        let (other, another) = (vm.clone(), vm.clone());
        let edited =
            tokio::spawn(
                async move { other.edit(caller(), VmSpec { cpus: 2, ..spec }, Some(revision)).await },
            );
        let stale = tokio::spawn(async move { another.delete(caller(), Some(revision + 7)).await });
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(vm.state(), VmState::Starting);
        if delete {
            vm.delete(caller(), Some(revision)).await.unwrap();
            assert_eq!(edited.await.unwrap().unwrap_err().code, ProblemCode::NotFound);
            // On a slow machine its turn comes when the VM is gone.
            let code = stale.await.unwrap().unwrap_err().code;
            assert!(matches!(code, ProblemCode::RevisionMismatch | ProblemCode::NotFound), "{code:?}");
        } else {
            host.act(&vm, VmAction::Stop).await.unwrap();
            assert_eq!(vm.status().run.cause.unwrap().code, CauseCode::Stopped);
            // Its turn may come before the VM is at rest.
            if let Err(problem) = edited.await.unwrap() {
                assert!(problem.detail.contains("wait until it is stopped"), "{problem}");
            }
            assert_eq!(stale.await.unwrap().unwrap_err().code, ProblemCode::RevisionMismatch);
            stays(&vm, VmState::Stopped).await;
        }
        let problem = booted.await.unwrap().unwrap_err();
        assert_eq!(problem.code, ProblemCode::WrongState);
        assert!(problem.detail.contains("stopped while it was being booted"), "{problem}");
        host.assert_untouched().await;
        host.gates().open("configure");
        if !delete {
            host.act(&vm, VmAction::Boot).await.unwrap();
            vm.delete(caller(), None).await.unwrap();
        }
    }
}

#[tokio::test]
async fn what_cannot_be_done_now_says_when_it_can() {
    let host = host(BACKOFF).await;
    let vm = host.create("web1", |_| {}).await;
    let says = async |action, cure: &str| {
        let problem = vm.act(action, caller()).await.unwrap_err();
        assert_eq!(problem.code, ProblemCode::WrongState);
        assert!(problem.detail.contains(cure), "{problem}");
    };
    for action in [VmAction::Pause, VmAction::Resume, VmAction::Reboot] {
        says(action, "The VM web1 is defined and cannot").await;
        says(action, "boot it first").await;
    }
    host.act(&vm, VmAction::Boot).await.unwrap();
    says(VmAction::Boot, "`reboot` boots it again").await;
    host.act(&vm, VmAction::Pause).await.unwrap();
    says(VmAction::Shutdown, "resume it first, or stop it").await;
    host.gates().close("stop");
    let stopped = vm.act(VmAction::Stop, caller()).await.unwrap();
    for action in [VmAction::Boot, VmAction::Pause, VmAction::Resume, VmAction::Reboot] {
        says(action, "wait until it is stopped, and boot it then").await;
    }
    host.gates().open("stop");
    stopped.await.unwrap().unwrap();
    says(VmAction::Pause, "boot it first").await;
}

#[tokio::test]
async fn what_is_planned_is_shown_and_can_be_cancelled() {
    let host = host(SLOW).await;
    let vm = host.create("web1", |spec| spec.restart = RestartPolicy::OnFailure).await;
    for cancel in ["stop", "boot", "edit", "delete"] {
        host.act(&vm, VmAction::Boot).await.unwrap();
        let before = api::types::Timestamp::now().unix_ms();
        host.tell(&vm, "crash").await;
        let run = until(&vm, "its end", |status| status.run.state == VmState::Failed).await.run;
        let wait = run.restart.next.unwrap().unix_ms() - before;
        assert!((3_590_000..3_640_000).contains(&wait), "{wait} ms");
        match cancel {
            "stop" => host.act(&vm, VmAction::Stop).await.unwrap(),
            "boot" => host.act(&vm, VmAction::Boot).await.unwrap(),
            "edit" => {
                let spec = VmSpec { cpus: 2, ..vm.record().value.spec.clone() };
                vm.edit(caller(), spec, None).await.unwrap();
            }
            _ => vm.delete(caller(), None).await.unwrap(),
        }
        assert_eq!(vm.status().run.restart.next.filter(|_| cancel != "delete"), None, "{cancel}");
        if cancel == "boot" {
            host.act(&vm, VmAction::Stop).await.unwrap();
        }
    }
}

#[tokio::test]
async fn an_attempt_that_fails_is_followed_by_others() {
    let host = host(BACKOFF).await;
    let vm = host.create("web1", |spec| spec.restart = RestartPolicy::OnFailure).await;
    // The caller gets the error, and no later boot is scheduled.
    host.set_pf_up(false);
    assert_eq!(host.act(&vm, VmAction::Boot).await, Err(ProblemCode::PfDown));
    stays(&vm, vm.state()).await;
    host.set_pf_up(true);
    host.act(&vm, VmAction::Boot).await.unwrap();
    host.set_pf_up(false);
    host.tell(&vm, "crash").await;
    let tried = until(&vm, "two attempts", |status| status.run.restart.attempts == 2).await.run;
    let cause = tried.cause.unwrap();
    assert_eq!((cause.code, cause.problem), (CauseCode::BootFailed, Some(ProblemCode::PfDown)));
    host.set_pf_up(true);
    until(&vm, "it runs", |status| status.run.state == VmState::Running).await;
    host.act(&vm, VmAction::Stop).await.unwrap();
    host.assert_untouched().await;
}

#[tokio::test]
async fn a_new_agent_boots_what_the_former_one_was_about_to() {
    for (same_boot, state) in [(true, VmState::Running), (false, VmState::Failed)] {
        let mut host = host(SLOW).await;
        let vm = host.create("web1", |spec| spec.restart = RestartPolicy::OnFailure).await;
        host.act(&vm, VmAction::Boot).await.unwrap();
        host.tell(&vm, "crash").await;
        until(&vm, "its end", |status| status.run.restart.next.is_some()).await;
        vm.leave().await;
        host.new_agent_with(|env| {
            env.backoff = BACKOFF;
            if !same_boot {
                env.boot_id = "another".into();
            }
        })
        .await;
        let vm = host.load(vm.id).await;
        host.reaches(&vm, state).await;
        tokio::time::sleep(SOON).await;
        assert_eq!((vm.state(), vm.status().run.restart.next), (state, None));
        host.act(&vm, VmAction::Stop).await.unwrap();
    }
}

#[tokio::test]
async fn autostart_is_at_the_agent_s_start_unless_the_vm_was_stopped_on_this_boot_of_the_host() {
    for (how, same_boot, expect) in [
        ("stop", true, VmState::Stopped),
        ("stop", false, VmState::Running),
        ("shutdown", true, VmState::Stopped),
        ("shutdown", false, VmState::Running),
        ("poweroff", true, VmState::Stopped),
        ("poweroff", false, VmState::Running),
        ("crash", true, VmState::Running),
        ("agent", true, VmState::Running),
    ] {
        let mut host = Host::new().await;
        let vm = host.create("web1", |spec| spec.autostart = true).await;
        stays(&vm, VmState::Defined).await;
        vm.leave().await;
        host.new_agent().await;
        let vm = host.load(vm.id).await;
        // Autostart boots a VM that was never booted.
        host.reaches(&vm, VmState::Running).await;
        match how {
            "stop" => host.act(&vm, VmAction::Stop).await.unwrap(),
            "shutdown" => host.act(&vm, VmAction::Shutdown).await.unwrap(),
            "agent" => {
                let stopped = vm.act_for(VmAction::Stop, caller(), Asked::Agent).await.unwrap();
                stopped.await.unwrap().unwrap();
            }
            word => host.tell(&vm, word).await,
        }
        until(&vm, "its end", |status| status.run.state.is_at_rest()).await;
        vm.leave().await;
        host.new_agent_with(|env| {
            if !same_boot {
                env.boot_id = "another".into();
            }
        })
        .await;
        let vm = host.load(vm.id).await;
        host.reaches(&vm, expect).await;
        tokio::time::sleep(SOON).await;
        assert_eq!(vm.state(), expect, "{how}, the same boot: {same_boot}");
        host.act(&vm, VmAction::Stop).await.unwrap();
    }
}

#[tokio::test]
async fn what_nobody_asked_for_is_booted_with_the_author_s_rights() {
    let host = Host::new().await;
    let vm = host.create("web1", |_| {}).await;
    vm.leave().await;
    let mut entry = host.env.vms.get(vm.id).await.unwrap();
    // The agent's own user could open this kernel.
    let kernel = host.env.run_dir.join("kernel");
    std::fs::create_dir_all(&host.env.run_dir).unwrap();
    std::fs::write(&kernel, "not really").unwrap();
    entry.value.spec.boot.kernel = Some(kernel.to_str().unwrap().into());
    entry.value.spec.autostart = true;
    for (author, state) in [(None, VmState::Failed), (entry.value.author.clone(), VmState::Running)] {
        // As stored by an agent that noted only the author of the specification.
        entry.value.author = author;
        entry.value.boot_authors.clear();
        host.env.vms.put(vm.id, "web1", &entry.value, Expect::Any).await.unwrap();
        let vm = host.load(vm.id).await;
        host.reaches(&vm, state).await;
        if state == VmState::Failed {
            let problem = vm.status().run.cause.unwrap().problem;
            assert_eq!(problem, Some(ProblemCode::KernelUnreadable));
            vm.leave().await;
        } else {
            host.act(&vm, VmAction::Stop).await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_vm_at_rest_can_be_changed_and_its_ports_with_it() {
    let host = host(BACKOFF).await;
    let policy = &host.env.policy;
    let group = serde_json::from_value(serde_json::json!({ "switch": "default" })).unwrap();
    policy.put_port_group(caller(), "web".parse().unwrap(), group, None).await.unwrap();
    let vm = host.create("web1", |_| {}).await;
    // The agent does this when it creates a VM.
    crate::vm::switch_client::attach(&host.env, vm.id, &vm.record().value.spec).await.unwrap();
    let port = async |name: &str| policy.get_port(ObjectRef::Name(name.into())).await;
    let first = port("web1/eth0").await.unwrap();

    let base = vm.record().value.spec.clone();
    let revision = vm.record().revision;
    let wrong = vm.edit(caller(), VmSpec { cpus: 2, ..base.clone() }, Some(revision + 1)).await;
    assert_eq!(wrong.unwrap_err().code, ProblemCode::RevisionMismatch);
    let mut spec = VmSpec { name: "web2".parse().unwrap(), cpus: 2, ..base.clone() };
    spec.adapters[0].port_group = Some("nowhere".parse().unwrap());
    let wrong = vm.edit(caller(), spec.clone(), None).await.unwrap_err();
    assert_eq!(wrong.code, ProblemCode::PortGroupNotFound);
    assert_eq!((vm.record().revision, &vm.record().value.spec), (revision, &base), "nothing has changed");

    spec.adapters[0].port_group = Some("web".parse().unwrap());
    spec.adapters[0].mac = Some("02:00:00:00:00:77".parse().unwrap());
    spec.adapters.push(serde_json::from_value(serde_json::json!({ "id": "eth1" })).unwrap());
    vm.edit(caller(), spec.clone(), Some(revision)).await.unwrap();
    assert_eq!((vm.name().as_str(), &vm.record().value.spec), ("web2", &spec));
    assert!(vm.record().revision > revision);
    let now = port("web2/eth0").await.unwrap();
    assert_eq!((now.id, now.status.port_group.as_str()), (first.id, "web"));
    assert_eq!(now.status.effective_mac.to_string(), "02:00:00:00:00:77");
    assert!(port("web2/eth1").await.is_ok() && port("web1/eth0").await.is_err());
    // A repeated edit changes nothing.
    let revision = vm.record().revision;
    vm.edit(caller(), spec.clone(), None).await.unwrap();
    assert_eq!(vm.record().revision, revision);
    host.act(&vm, VmAction::Boot).await.unwrap();
    assert_eq!(host.settings(0).mac.unwrap().to_string(), "02:00:00:00:00:77");

    // While the VM runs, only the agent's own actions on it can be edited.
    let problem = vm.edit(caller(), base, None).await.unwrap_err();
    assert_eq!(problem.code, ProblemCode::WrongState);
    assert!(
        problem.detail.contains("web2 is running") && problem.detail.contains("stop it first"),
        "{problem}"
    );
    let life = VmSpec { restart: RestartPolicy::Always, autostart: true, ..spec.clone() };
    vm.edit(caller(), life, None).await.unwrap();
    host.tell(&vm, "crash").await;
    runs_again(&vm, 1).await;
    host.act(&vm, VmAction::Stop).await.unwrap();
    spec.adapters.clear();
    vm.edit(caller(), spec, None).await.unwrap();
    assert!(policy.list_ports().await.unwrap().is_empty());
    host.assert_untouched().await;
}

#[tokio::test]
async fn two_adapters_can_change_their_addresses() {
    let host = host(BACKOFF).await;
    let addresses = ["02:00:00:00:00:01", "02:00:00:00:00:02"];
    let adapters = |macs: [&str; 2]| {
        let adapter = |(n, mac)| serde_json::json!({ "id": format!("eth{n}"), "mac": mac });
        serde_json::from_value(macs.into_iter().enumerate().map(adapter).collect()).unwrap()
    };
    let vm = host.create("web1", |spec| spec.adapters = adapters(addresses)).await;
    crate::vm::switch_client::attach(&host.env, vm.id, &vm.record().value.spec).await.unwrap();
    let [a, b] = addresses;
    let spec = VmSpec { adapters: adapters([b, a]), ..vm.record().value.spec.clone() };
    vm.edit(caller(), spec, None).await.unwrap();
    // An agent that loads the ports from the store sees the same addresses.
    vm.leave().await;
    let again = host.another_agent(|_| {}).await;
    for (name, mac) in [("web1/eth0", b), ("web1/eth1", a)] {
        for policy in [&host.env.policy, &again.policy] {
            let port = policy.get_port(ObjectRef::Name(name.into())).await.unwrap();
            let status = port.status;
            let all = [status.initial_mac, status.effective_mac, status.guest_mac].map(|mac| mac.to_string());
            assert_eq!(all, [mac; 3], "{name}");
        }
    }
}
