// SPDX-License-Identifier: Apache-2.0

//! VMs' lives on a host that is made up: sysfs and PF are fakes, the vmm is this test program started again.

mod assignable;
mod disks;
mod fake_vmm;
pub(crate) mod fixture;
mod lease;
mod life;
mod network;
mod placement;
mod progress;
mod slow_disk;

use api::{
    problem::ProblemCode,
    types::{CauseCode, VmAction, VmState},
};
use sriov::{Bdf, PfControl, PreviousBinding, VfChange, fake::FakePf};
use store::Expect;

use self::fixture::{Host, VF0, VF1, caller};
use crate::vm::record::{Before, Claim, ClaimedVf};

#[tokio::test]
async fn boot_gives_the_vf_and_stop_takes_it_back() {
    let host = Host::new().await;
    let vm = host.create("web1", |_| {}).await;
    host.act(&vm, VmAction::Boot).await.unwrap();
    assert_eq!(vm.state(), VmState::Running);
    let held = vm.status().held;
    let vf = held[0].value.adapter.clone().unwrap();
    assert_eq!((held[0].value.bdf, vf.index, vf.pf_name.as_str()), (VF0, 0, "eth0"));
    assert_eq!(host.driver(VF0), Some("vfio-pci".into()));
    let settings = host.settings(0);
    assert_eq!(settings.mac.unwrap().bytes(), vf.mac.octets());
    assert_eq!((settings.trust, settings.spoof_check), (Some(false), Some(true)));
    assert_eq!(host.claims().await, 1);

    host.act(&vm, VmAction::Pause).await.unwrap();
    assert_eq!(vm.state(), VmState::Paused);
    assert_eq!(host.act(&vm, VmAction::Shutdown).await.unwrap_err(), ProblemCode::WrongState);
    host.act(&vm, VmAction::Resume).await.unwrap();
    host.act(&vm, VmAction::Reboot).await.unwrap();
    assert_eq!((vm.state(), vm.status().run.boots), (VmState::Running, 2));
    assert_eq!(host.act(&vm, VmAction::Boot).await.unwrap_err(), ProblemCode::WrongState);

    host.act(&vm, VmAction::Stop).await.unwrap();
    assert_eq!(vm.state(), VmState::Stopped);
    assert_eq!(vm.status().run.cause.unwrap().code, CauseCode::Stopped);
    host.assert_untouched().await;
    // It boots again, and goes away with all that was its own.
    host.act(&vm, VmAction::Boot).await.unwrap();
    vm.delete(caller(), None).await.unwrap();
    host.assert_untouched().await;
    assert!(host.env.vms.list().await.unwrap().is_empty());
    assert!(!host.env.run_dir.join("vms").join(vm.id.to_string()).exists());
}

#[tokio::test]
async fn what_the_pf_had_for_the_vf_is_back_afterwards() {
    let host = Host::new().await;
    let changes = [VfChange::Trust(true), VfChange::SpoofCheck(false)];
    host.pf.lock().unwrap().apply(0, &changes).unwrap();
    let before = host.settings(0);
    let vm = host.create("web1", |_| {}).await;
    host.act(&vm, VmAction::Boot).await.unwrap();
    assert_eq!((host.settings(0).trust, host.settings(0).spoof_check), (Some(false), Some(true)));
    host.act(&vm, VmAction::Stop).await.unwrap();
    assert_eq!(host.settings(0), before);
}

#[tokio::test]
async fn whatever_fails_during_a_boot_nothing_is_left_behind() {
    struct Case {
        what: &'static str,
        code: ProblemCode,
        breaks: fn(&Host),
        spec: fn(&mut api::types::VmSpec),
    }
    let case = |what, code, breaks, spec| Case { what, code, breaks, spec };
    let cases = [
        case(
            "no kernel",
            ProblemCode::KernelNotFound,
            |_| {},
            |spec| spec.boot.kernel = Some("absent".into()),
        ),
        case(
            "kernel is a device",
            ProblemCode::KernelUnreadable,
            |_| {},
            |spec| {
                spec.boot.kernel = Some("/dev/null".into());
            },
        ),
        case(
            "no initramfs",
            ProblemCode::InitramfsNotFound,
            |_| {},
            |spec| {
                spec.boot.initramfs = Some("absent".into());
            },
        ),
        case(
            "no such VF",
            ProblemCode::VfNotFound,
            |_| {},
            |spec| {
                spec.adapters[0].vf = Some("0000:77:10.0".parse().unwrap());
            },
        ),
        case(
            "no such device",
            ProblemCode::DeviceNotFound,
            |_| {},
            |spec| {
                spec.devices.push("0000:77:00.0".parse().unwrap());
            },
        ),
        case(
            "a VF as a plain device",
            ProblemCode::DeviceUnsupported,
            |_| {},
            |spec| {
                spec.devices.push(VF1.to_string().parse().unwrap());
            },
        ),
        case(
            "a bridge",
            ProblemCode::DeviceUnsupported,
            |host| {
                let bridge = Bdf::new(0, 3, 0, 0).unwrap();
                host.sysfs.add_device(bridge, (0x8086, 0x0953), 0x06_04_00, Some(78), None);
            },
            |spec| {
                spec.devices.push("0000:03:00.0".parse().unwrap());
            },
        ),
        case("PF down", ProblemCode::PfDown, |host| host.set_pf_up(false), |_| {}),
        case(
            "no vfio-pci",
            ProblemCode::VfioUnavailable,
            |host| host.sysfs.unload_driver("vfio-pci"),
            |_| {},
        ),
        case("the PF refuses trust off", ProblemCode::PfRefused, |host| host.pf_answers(&[Some(1)]), |_| {}),
        case(
            "the PF refuses the address",
            ProblemCode::PfRefused,
            |host| host.pf_answers(&[None, None, Some(22)]),
            |_| {},
        ),
        case(
            "the PF ignores all",
            ProblemCode::PfRefused,
            |host| host.pf.lock().unwrap().deaf = true,
            |_| {},
        ),
        case(
            "not a kernel",
            ProblemCode::KernelInvalid,
            |_| {},
            |spec| spec.boot.cmdline = "refuse-kernel".into(),
        ),
        case(
            "initramfs is a device",
            ProblemCode::InitramfsUnreadable,
            |_| {},
            |spec| spec.boot.initramfs = Some("/dev/null".into()),
        ),
        case(
            "initramfs is larger than memory",
            ProblemCode::InitramfsInvalid,
            |host| {
                let file = std::fs::File::create(host.env.image_dirs[0].join("large")).unwrap();
                file.set_len((2 << 20) + 1).unwrap();
            },
            |spec| spec.boot.initramfs = Some("large".into()),
        ),
        case(
            "interrupt remapping is off",
            ProblemCode::InterruptRemappingOff,
            |host| host.sysfs.set_interrupt_chip("PCI-MSI"),
            // One that is not named would be looked for elsewhere.
            |spec| spec.adapters[0].vf = Some(VF0.to_string().parse().unwrap()),
        ),
        case(
            "no memory",
            ProblemCode::MemoryUnavailable,
            |_| {},
            |spec| spec.boot.cmdline = "refuse-memory".into(),
        ),
        case("vmm dies", ProblemCode::VmmFailed, |_| {}, |spec| spec.boot.cmdline = "die".into()),
        case("vmm hangs up", ProblemCode::VmmFailed, |_| {}, |spec| spec.boot.cmdline = "hang-up".into()),
    ];
    for Case { what, code, breaks, spec } in cases {
        let host = Host::new().await;
        let vm = host.create("web1", spec).await;
        breaks(&host);
        assert_eq!(host.act(&vm, VmAction::Boot).await.unwrap_err(), code, "{what}");
        assert!(vm.state().is_at_rest(), "{what}: {}", vm.state());
        let pid = vm.status().run.process;
        assert_eq!(pid, None, "{what}");
        host.pf.lock().unwrap().deaf = false;
        host.sysfs.load_driver("vfio-pci");
        host.assert_untouched().await;
    }
}

#[tokio::test]
async fn a_vf_and_its_group_have_one_owner() {
    let host = Host::new().await;
    let named = |spec: &mut api::types::VmSpec| spec.adapters[0].vf = Some(VF0.to_string().parse().unwrap());
    let first = host.create("first", named).await;
    let second = host.create("second", named).await;
    let any = host.create("any", |_| {}).await;
    host.act(&first, VmAction::Boot).await.unwrap();
    let problem = second.act(VmAction::Boot, caller()).await.unwrap_err();
    assert_eq!(problem.code, ProblemCode::VfInUse);
    assert!(problem.detail.contains("first") && problem.detail.contains(&VF0.to_string()), "{problem}");
    host.act(&any, VmAction::Boot).await.unwrap();
    assert_eq!(any.status().held[0].value.bdf, VF1, "the one that is free");
    host.act(&first, VmAction::Stop).await.unwrap();
    host.act(&second, VmAction::Boot).await.unwrap();
    for vm in [any, second] {
        host.act(&vm, VmAction::Stop).await.unwrap();
    }
    host.assert_untouched().await;
}

/// A container's, for example. Nothing of it is touched, and it is not the one that is chosen.
#[tokio::test]
async fn a_vf_whose_interface_is_in_another_network_namespace_is_not_free() {
    let host = Host::new().await;
    host.sysfs.hide_interfaces(VF0);
    let before = host.pf.lock().unwrap().read(0).unwrap();
    let pinned =
        host.create("pinned", |spec| spec.adapters[0].vf = Some(VF0.to_string().parse().unwrap())).await;
    let problem = pinned.act(VmAction::Boot, caller()).await.unwrap_err();
    assert_eq!(problem.code, ProblemCode::VfInUse);
    let words = [&VF0.to_string(), "igbvf", "network namespace"];
    assert!(words.iter().all(|word| problem.detail.contains(word)), "{problem}");
    let any = host.create("any", |_| {}).await;
    host.act(&any, VmAction::Boot).await.unwrap();
    assert_eq!(any.status().held[0].value.bdf, VF1);
    let more = host.create("more", |_| {}).await;
    assert_eq!(host.act(&more, VmAction::Boot).await.unwrap_err(), ProblemCode::NoFreeVf);
    assert_eq!(host.driver(VF0), Some("igbvf".into()));
    assert_eq!(host.pf.lock().unwrap().read(0).unwrap(), before);
    host.act(&any, VmAction::Stop).await.unwrap();
    host.assert_untouched().await;
}

#[tokio::test]
async fn a_guest_s_end_is_told_apart_from_a_crash() {
    for (input, state, code) in [
        ("poweroff", VmState::Stopped, CauseCode::PoweredOff),
        ("fail", VmState::Failed, CauseCode::MachineFailed),
        ("crash", VmState::Failed, CauseCode::VmmCrashed),
    ] {
        let host = Host::new().await;
        let vm = host.create("web1", |_| {}).await;
        host.act(&vm, VmAction::Boot).await.unwrap();
        host.tell(&vm, input).await;
        host.at_rest(&vm).await;
        let run = vm.status().run;
        let cause = run.cause.unwrap();
        assert_eq!((run.state, cause.code), (state, code), "{input}: {}", cause.detail);
        if input == "crash" {
            assert!(cause.detail.contains("last words of the fake"), "{}", cause.detail);
        }
        host.assert_untouched().await;
    }
}

#[tokio::test]
async fn shutdown_is_done_when_the_guest_has_powered_off() {
    let host = Host::new().await;
    let vm = host.create("web1", |_| {}).await;
    host.act(&vm, VmAction::Boot).await.unwrap();
    host.act(&vm, VmAction::Shutdown).await.unwrap();
    assert_eq!(vm.state(), VmState::Stopped);
    assert_eq!(vm.status().run.cause.unwrap().code, CauseCode::PoweredOff);
}

#[tokio::test]
async fn a_new_agent_finds_a_running_vm() {
    let mut host = Host::new().await;
    let vm = host.create("web1", |_| {}).await;
    host.act(&vm, VmAction::Boot).await.unwrap();
    let process = vm.status().run.process.unwrap();
    vm.leave().await;
    host.new_agent().await;
    let vm = host.load(vm.id).await;
    host.reaches(&vm, VmState::Running).await;
    assert_eq!(vm.status().run.process, Some(process));
    assert_eq!(vm.status().held.len(), 1);
    host.act(&vm, VmAction::Pause).await.unwrap();
    // Paused while no agent looks, it is found paused.
    vm.leave().await;
    host.new_agent().await;
    let vm = host.load(vm.id).await;
    host.reaches(&vm, VmState::Paused).await;
    host.act(&vm, VmAction::Stop).await.unwrap();
    host.assert_untouched().await;
}

#[tokio::test]
async fn what_happens_while_no_agent_runs_is_known_afterwards() {
    for (input, state, code) in [
        ("poweroff-later", VmState::Stopped, CauseCode::PoweredOff),
        ("crash-later", VmState::Failed, CauseCode::VmmCrashed),
    ] {
        let mut host = Host::new().await;
        let vm = host.create("web1", |_| {}).await;
        host.act(&vm, VmAction::Boot).await.unwrap();
        host.tell(&vm, input).await;
        vm.leave().await;
        tokio::time::sleep(std::time::Duration::from_millis(600)).await;
        host.new_agent().await;
        let vm = host.load(vm.id).await;
        host.at_rest(&vm).await;
        let run = vm.status().run;
        assert_eq!((run.state, run.cause.unwrap().code), (state, code), "{input}");
        host.assert_untouched().await;
    }
}

#[tokio::test]
async fn an_agent_that_died_between_two_steps_of_a_boot_is_cleaned_up_after() {
    let remembered = |host: &Host| Before {
        binding: PreviousBinding { driver: Some("igbvf".into()), driver_override: None },
        settings: Some(host.settings(0)),
    };
    for step in ["claimed", "remembered", "bound", "programmed"] {
        let host = Host::new().await;
        let vm = host.create("web1", |_| {}).await;
        vm.leave().await;
        let mac = "02:00:00:00:00:99".parse().unwrap();
        let adapter =
            ClaimedVf { id: "eth0".parse().unwrap(), pf: fixture::PF, pf_name: "eth0".into(), index: 0, mac };
        let before = (step != "claimed").then(|| remembered(&host));
        let claim = Claim {
            vm: vm.id,
            vm_name: "web1".into(),
            slot: 0,
            bdf: VF0,
            group: Some(host.group(VF0)),
            adapter: Some(adapter),
            before,
        };
        host.env.claims.put(uuid::Uuid::new_v4(), &VF0.to_string(), &claim, Expect::Absent).await.unwrap();
        let mut run = vm.status().run;
        run.state = VmState::Starting;
        host.env.runs.put(vm.id, "web1", &run, Expect::Any).await.unwrap();
        if step == "bound" || step == "programmed" {
            host.sysfs.sysfs().bind_vfio(VF0).unwrap();
        }
        if step == "programmed" {
            host.pf.lock().unwrap().choose_mac(0, netpolicy::MacAddress::new([2, 0, 0, 0, 0, 0x99]));
        }
        let vm = host.load(vm.id).await;
        host.at_rest(&vm).await;
        host.reaches(&vm, VmState::Failed).await;
        assert_eq!(vm.status().run.cause.unwrap().code, CauseCode::BootFailed, "{step}");
        host.assert_untouched().await;
    }
}

#[tokio::test]
async fn a_lost_vf_is_recorded_and_its_claim_ends_with_it() {
    let host = Host::new().await;
    let vm = host.create("web1", |_| {}).await;
    host.act(&vm, VmAction::Boot).await.unwrap();
    host.sysfs.remove_device(VF0);
    host.tell(&vm, &format!("lose {VF0}")).await;
    let mut status = vm.follow();
    let lost = status.wait_for(|status| status.held.is_empty());
    let run = tokio::time::timeout(fixture::PATIENCE, lost).await.unwrap().unwrap().run.clone();
    assert_eq!(run.lost[&VF0.to_string()].code, CauseCode::VfRemoved);
    assert_eq!(run.state, VmState::Running, "the guest goes on without it");
    assert_eq!(host.claims().await, 0);
    host.act(&vm, VmAction::Stop).await.unwrap();
}

#[tokio::test]
async fn a_vf_that_breaks_is_recorded_and_the_guest_goes_on() {
    let host = Host::new().await;
    let vm = host.create("web1", |_| {}).await;
    host.act(&vm, VmAction::Boot).await.unwrap();
    host.tell(&vm, &format!("break {VF0}")).await;
    let mut status = vm.follow();
    let broken = status.wait_for(|status| status.run.lost.contains_key(&VF0.to_string()));
    let run = tokio::time::timeout(fixture::PATIENCE, broken).await.unwrap().unwrap().run.clone();
    assert_eq!((run.lost[&VF0.to_string()].code, run.state), (CauseCode::DeviceFailed, VmState::Running));
    host.act(&vm, VmAction::Stop).await.unwrap();
}

#[tokio::test]
async fn a_vm_that_ran_when_the_host_was_restarted_says_so() {
    let host = Host::new().await;
    let vm = host.create("web1", |_| {}).await;
    host.act(&vm, VmAction::Boot).await.unwrap();
    host.act(&vm, VmAction::Stop).await.unwrap();
    let mut run = vm.status().run;
    vm.leave().await;
    // As the former agent left it: running, on another boot of the host.
    run.state = VmState::Running;
    run.process =
        Some(services::vmm_process::Identity { pid: 1, start_time: 1, boot_id: "of-another-boot".into() });
    host.env.runs.put(vm.id, "web1", &run, Expect::Any).await.unwrap();
    let vm = host.load(vm.id).await;
    host.reaches(&vm, VmState::Failed).await;
    assert_eq!(vm.status().run.cause.unwrap().code, CauseCode::HostRestarted);
    host.assert_untouched().await;
}

#[tokio::test]
async fn a_vf_that_its_pf_no_longer_has_is_not_booted_with() {
    let host = Host::new().await;
    let vm = host.create("web1", |_| {}).await;
    *host.pf.lock().unwrap() = FakePf::new("eth0", 0);
    assert_eq!(host.act(&vm, VmAction::Boot).await.unwrap_err(), ProblemCode::VfRemoved);
    assert_eq!((vm.state(), host.claims().await), (VmState::Failed, 0));
}

#[tokio::test]
async fn what_cannot_be_given_back_stays_claimed_and_is_tried_again() {
    let host = Host::new().await;
    let vm = host.create("web1", |_| {}).await;
    host.act(&vm, VmAction::Boot).await.unwrap();
    host.sysfs.unload_driver("igbvf");
    assert_eq!(host.act(&vm, VmAction::Stop).await.unwrap_err(), ProblemCode::VfioUnavailable);
    assert_eq!((vm.state(), host.claims().await), (VmState::Stopped, 1));
    assert_eq!(vm.delete(caller(), None).await.unwrap_err().code, ProblemCode::VfioUnavailable);
    host.sysfs.load_driver("igbvf");
    vm.delete(caller(), None).await.unwrap();
    host.assert_untouched().await;
}

#[tokio::test]
async fn a_vmm_that_talks_nonsense_is_killed_and_its_vm_failed() {
    for kind in [
        "garbage",
        "unknown",
        "long",
        "hello",
        "refused",
        "answer",
        "again",
        "report",
        "foreign-ask",
        "foreign-notice",
        "flood",
        "version",
    ] {
        let host = Host::new().await;
        let vm = host.create("web1", |_| {}).await;
        host.act(&vm, VmAction::Boot).await.unwrap();
        host.tell(&vm, &format!("nonsense {kind}")).await;
        host.at_rest(&vm).await;
        let cause = vm.status().run.cause.unwrap();
        assert_eq!(
            (vm.state(), cause.code),
            (VmState::Failed, CauseCode::VmmMisbehaved),
            "{kind}: {cause:?}"
        );
        host.assert_untouched().await;
        // It can be booted again.
        host.act(&vm, VmAction::Boot).await.unwrap();
        host.act(&vm, VmAction::Stop).await.unwrap();
    }
}

#[tokio::test]
async fn a_vmm_that_answers_something_else_is_killed() {
    let host = Host::new().await;
    let vm = host.create("web1", |_| {}).await;
    host.act(&vm, VmAction::Boot).await.unwrap();
    host.tell(&vm, "nonsense confused").await;
    let command = protocol::VmmCommand::Stats;
    let error = vm.connection().unwrap().command(command, Vec::new(), fixture::PATIENCE).await.unwrap_err();
    assert!(error.to_string().contains("the result of another command"), "{error}");
    host.at_rest(&vm).await;
    assert_eq!(vm.status().run.cause.unwrap().code, CauseCode::VmmMisbehaved);
}

#[tokio::test]
async fn what_is_only_odd_is_no_nonsense() {
    let host = Host::new().await;
    let vm = host.create("web1", |_| {}).await;
    host.act(&vm, VmAction::Boot).await.unwrap();
    host.tell(&vm, "nonsense huge").await;
    // The states before the first boot can be read late.
    host.tell(&vm, "nonsense fewer-boots").await;
    // A command that nobody waits for any more is answered.
    let late = protocol::VmmCommand::ConsoleWait { offset: 0 };
    let given_up =
        vm.connection().unwrap().command(late, Vec::new(), std::time::Duration::from_millis(1)).await;
    assert!(given_up.is_err());
    host.tell(&vm, "print hello").await;
    host.act(&vm, VmAction::Pause).await.unwrap();
    assert_eq!((vm.state(), vm.status().run.boots), (VmState::Paused, 1));
    host.act(&vm, VmAction::Stop).await.unwrap();
    host.assert_untouched().await;
}
