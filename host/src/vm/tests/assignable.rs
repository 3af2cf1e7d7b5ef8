// SPDX-License-Identifier: Apache-2.0

//! Functions that VMs may have, and functions that the host uses.

use api::{
    problem::ProblemCode,
    types::{VmAction, VmState},
};
use sriov::{Bdf, PreviousBinding};
use store::Expect;
use uuid::Uuid;

use super::fixture::{Host, VF0, caller};
use crate::vm::{
    claims,
    record::{Before, Claim},
};

/// Boots a VM with an NVMe function under `devices`, on a host with these words of `--assignable`.
async fn boot_with_device(words: &[&str], change: impl FnOnce(&Host, Bdf)) -> Result<(), api::Problem> {
    let host = Host::with_assignable(words).await;
    let device = Bdf::new(0, 2, 0, 0).unwrap();
    host.sysfs.add_device(device, (0x8086, 0x0953), 0x01_08_02, Some(77), Some("nvme"));
    change(&host, device);
    let vm = host.create("web1", |spec| {
        spec.adapters.clear();
        spec.devices = vec![device.to_string().parse().unwrap()];
    });
    let vm = vm.await;
    let booted = vm.act(VmAction::Boot, caller()).await?.await.unwrap().map(drop);
    if booted.is_ok() {
        host.act(&vm, VmAction::Stop).await.unwrap();
    } else {
        assert_eq!(host.claims().await, 0);
    }
    booted
}

#[tokio::test]
async fn devices_has_functions_by_the_operator_s_word_only() {
    let here = "0000:02:00.0";
    for words in [&[here][..], &["8086:0953"], &["0000:09:00.0", "eth0", here]] {
        boot_with_device(words, |_, _| {}).await.unwrap();
    }
    for words in [&[][..], &["0000:02:00.1"], &["8086:0954", "eth0"]] {
        let problem = boot_with_device(words, |_, _| {}).await.unwrap_err();
        assert_eq!(problem.code, ProblemCode::NotAssignable, "{words:?}");
        assert!(problem.detail.contains("--assignable 0000:02:00.0."), "{problem}");
    }
}

#[tokio::test]
async fn a_device_without_a_reset_needs_a_word_of_its_own() {
    let no_reset = |host: &Host, device: Bdf| {
        std::fs::remove_file(host.sysfs.sysfs().device_dir(device).join("reset")).unwrap();
    };
    let problem = boot_with_device(&["8086:0953"], no_reset).await.unwrap_err();
    assert_eq!(problem.code, ProblemCode::DeviceUnsupported);
    for part in ["0000:02:00.0", "no reset", "--assignable 0000:02:00.0,no-reset"] {
        assert!(problem.detail.contains(part), "{problem}");
    }
    boot_with_device(&["8086:0953,no-reset"], no_reset).await.unwrap();
}

#[tokio::test]
async fn a_device_that_the_host_uses_is_refused_by_name() {
    let mounted = |host: &Host, device: Bdf| {
        let dir = host.sysfs.sysfs().device_dir(device);
        let sys = dir.ancestors().nth(4).unwrap();
        let disk = dir.join("nvme/nvme0/nvme0n1");
        std::fs::create_dir_all(disk.join("holders/dm-0")).unwrap();
        std::fs::create_dir_all(sys.join("class/block")).unwrap();
        std::os::unix::fs::symlink(&disk, sys.join("class/block/nvme0n1")).unwrap();
    };
    let problem = boot_with_device(&["8086:0953"], mounted).await.unwrap_err();
    assert_eq!(problem.code, ProblemCode::DeviceInUse);
    assert!(problem.detail.contains("nvme0n1") && problem.detail.contains("unmount"), "{problem}");
}

#[tokio::test]
async fn a_vf_whose_interface_is_up_is_refused_by_name() {
    let host = Host::new().await;
    let vm = host.create("web1", |spec| spec.adapters[0].vf = Some(VF0.to_string().parse().unwrap())).await;
    let net = host.sysfs.sysfs().device_dir(VF0).join("net");
    let name = std::fs::read_dir(&net).unwrap().next().unwrap().unwrap().file_name().into_string().unwrap();
    host.sysfs.set_interface_up(VF0, &name, true);
    let problem = vm.act(VmAction::Boot, caller()).await.unwrap_err();
    assert_eq!(problem.code, ProblemCode::VfInUse);
    assert!(
        problem.detail.contains(&name) && problem.detail.contains("take the interface down"),
        "{problem}"
    );
    host.sysfs.set_interface_up(VF0, &name, false);
    host.act(&vm, VmAction::Boot).await.unwrap();
    host.act(&vm, VmAction::Stop).await.unwrap();
}

#[tokio::test]
async fn adapters_have_vfs_of_the_named_pfs() {
    let host = Host::with_assignable(&["eth1"]).await;
    for vf in [Some(VF0.to_string().parse().unwrap()), None] {
        let vm = host.create("web1", |spec| spec.adapters[0].vf = vf).await;
        let problem = vm.act(VmAction::Boot, caller()).await.unwrap_err();
        assert_eq!(problem.code, ProblemCode::NotAssignable);
        assert!(problem.detail.contains("--assignable eth0"), "{problem}");
        vm.delete(caller(), None).await.unwrap();
    }
    let host = Host::with_assignable(&["eth1", "eth0"]).await;
    let vm = host.create("web1", |_| {}).await;
    host.act(&vm, VmAction::Boot).await.unwrap();
    host.act(&vm, VmAction::Stop).await.unwrap();
}

#[tokio::test]
async fn a_device_has_one_owner() {
    let host = Host::with_assignable(&["8086:0953"]).await;
    let device = Bdf::new(0, 2, 0, 0).unwrap();
    host.sysfs.add_device(device, (0x8086, 0x0953), 0x01_08_02, Some(77), None);
    let with = |spec: &mut api::types::VmSpec| {
        spec.adapters.clear();
        spec.devices = vec![device.to_string().parse().unwrap()];
    };
    let (first, second) = (host.create("first", with).await, host.create("second", with).await);
    host.act(&first, VmAction::Boot).await.unwrap();
    let problem = second.act(VmAction::Boot, caller()).await.unwrap_err();
    assert_eq!(problem.code, ProblemCode::DeviceInUse);
    assert!(problem.detail.contains("first"), "{problem}");
    let cause = second.status().run.cause.expect("who looks later sees why it was not booted");
    assert_eq!((second.state(), cause.problem), (VmState::Defined, Some(ProblemCode::DeviceInUse)));
    // A function in the same IOMMU group reaches the same memory.
    let sibling = Bdf::new(0, 2, 0, 1).unwrap();
    host.sysfs.add_device(sibling, (0x8086, 0x0953), 0x01_08_02, Some(77), None);
    let third = host.create("third", |spec| {
        spec.adapters.clear();
        spec.devices = vec![sibling.to_string().parse().unwrap()];
    });
    let problem = third.await.act(VmAction::Boot, caller()).await.unwrap_err();
    assert_eq!(problem.code, ProblemCode::DeviceInUse);
    assert!(problem.detail.contains("first") && problem.detail.contains("group 77"), "{problem}");
    host.act(&first, VmAction::Stop).await.unwrap();
}

/// An address that neither the kernel nor the simulated adapter gives to a function.
const NO_BACKEND: Bdf = Bdf::new(0x8000_0000, 0, 0, 0).unwrap();

#[tokio::test]
async fn a_function_without_a_backend_does_not_exist() {
    for host in
        [Host::new().await, Host::with_environment(|env| env.inventory.leave_out_backends_of_root()).await]
    {
        let wanted = || NO_BACKEND.to_string().parse().unwrap();
        let vf = host.create("vf", |spec| spec.adapters[0].vf = Some(wanted())).await;
        let device = host.create("device", |spec| {
            spec.adapters.clear();
            spec.devices = vec![wanted()];
        });
        for (vm, code) in [(vf, ProblemCode::VfNotFound), (device.await, ProblemCode::DeviceNotFound)] {
            let problem = vm.act(VmAction::Boot, caller()).await.unwrap_err();
            assert_eq!(problem.code, code);
            assert!(problem.detail.contains(&NO_BACKEND.to_string()), "{problem}");
        }
    }
}

#[tokio::test]
async fn a_claim_on_a_function_without_a_backend_is_released() {
    let host = Host::new().await;
    let vm = Uuid::new_v4();
    let claim = Claim {
        vm,
        vm_name: "web1".into(),
        slot: 0,
        bdf: NO_BACKEND,
        group: None,
        adapter: None,
        before: Some(Before { binding: PreviousBinding::default(), settings: None }),
    };
    host.env.claims.put(Uuid::new_v4(), "web1", &claim, Expect::Absent).await.unwrap();
    let held = claims::of_vm(&host.env, vm).await.unwrap();
    assert_eq!(claims::give_back(&host.env, held, |_| {}).await.len(), 0);
    assert_eq!(host.claims().await, 0);
}
