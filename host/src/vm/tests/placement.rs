// SPDX-License-Identifier: Apache-2.0

//! The place of guest memory beside the VM's functions.

use std::path::PathBuf;

use api::{
    problem::ProblemCode,
    types::{HugePages, NumaPlace, PlacementSpec, Stage, VmAction, VmState},
};
use tokio::time::timeout;

use super::fixture::{Host, PATIENCE, VF0, VF1, caller};
use crate::placement::{MemoryPlace, Topology};

/// A host with the NUMA nodes 0 and 1, on which two VFs are.
async fn host(nodes: [i32; 2]) -> Host {
    let host = Host::with_environment(|env| {
        let sys = env.run_dir.parent().unwrap().join("sys");
        let node = sys.join("devices/system/node");
        std::fs::create_dir_all(&node).unwrap();
        std::fs::write(node.join("has_memory"), "0-1\n").unwrap();
        env.topology = Topology::new(sys);
    })
    .await;
    for (vf, node) in [VF0, VF1].into_iter().zip(nodes) {
        host.sysfs.set_numa_node(vf, node);
    }
    host
}

async fn boot(host: &Host) -> Result<Option<MemoryPlace>, api::Problem> {
    let vm = host.create("web1", |spec| {
        let mut second = spec.adapters[0].clone();
        (second.id, second.mac) = ("eth1".parse().unwrap(), None);
        spec.adapters.push(second);
        for (adapter, vf) in spec.adapters.iter_mut().zip([VF0, VF1]) {
            adapter.vf = Some(vf.to_string().parse().unwrap());
        }
        let numa = Some(NumaPlace::OfAdapters);
        spec.placement = Some(PlacementSpec { numa, ..PlacementSpec::default() });
    });
    let vm = vm.await;
    vm.act(VmAction::Boot, caller()).await?.await.unwrap()?;
    let place = vm.status().run.memory_place;
    host.act(&vm, VmAction::Stop).await.unwrap();
    Ok(place)
}

#[tokio::test]
async fn memory_is_on_the_node_of_the_adapters() {
    for (nodes, expect) in [([1, 1], Some(1)), ([-1, 0], Some(0)), ([-1, -1], None)] {
        let place = boot(&host(nodes).await).await.unwrap().unwrap();
        assert_eq!((place.node, place.not_placed.is_none()), (expect, expect.is_some()), "{nodes:?}");
    }
}

#[tokio::test]
async fn adapters_of_several_nodes_are_refused_and_given_back() {
    let host = host([0, 1]).await;
    let problem = boot(&host).await.unwrap_err();
    assert_eq!(problem.code, ProblemCode::PlacementUnavailable);
    assert!(problem.detail.contains(&format!("{VF0} on node 0, {VF1} on node 1")), "{problem}");
    host.assert_untouched().await;
}

/// A host with many huge pages, and the file of their number.
async fn with_pool() -> (Host, PathBuf) {
    let mut pool = PathBuf::new();
    let host = Host::with_environment(|env| {
        let sys = env.run_dir.parent().unwrap().join("sys");
        pool = sys.join("kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
        std::fs::create_dir_all(pool.parent().unwrap()).unwrap();
        std::fs::write(&pool, "1000000\n").unwrap();
        env.topology = Topology::new(sys);
    });
    (host.await, pool)
}

/// The VM takes its pages only while no other VM does, and is refused if that one has left too few.
#[tokio::test]
async fn vms_take_huge_pages_one_after_another() {
    let (host, pool) = with_pool().await;
    for (name, left, expect) in
        [("web1", "1000000\n", Ok(())), ("web2", "0\n", Err(ProblemCode::MemoryUnavailable))]
    {
        let filling = host.env.filling.lock().await;
        let vm = host.create(name, |spec| spec.hugepages = HugePages::Mib2).await;
        let done = vm.act(VmAction::Boot, caller()).await.unwrap();
        let mut status = vm.follow();
        let waits = status.wait_for(|status| {
            status.operation.is_some_and(|operation| operation.stage == Stage::StartingProcess)
        });
        drop(timeout(PATIENCE, waits).await.unwrap().unwrap());
        let ordinary = host.create(&format!("beside-{name}"), |_| {}).await;
        let beside = timeout(PATIENCE, host.act(&ordinary, VmAction::Boot)).await.unwrap();
        assert_eq!((beside, vm.status().run.state), (Ok(()), VmState::Starting));
        host.act(&ordinary, VmAction::Stop).await.unwrap();
        std::fs::write(&pool, left).unwrap();
        drop(filling);
        let booted = timeout(PATIENCE, done).await.unwrap().unwrap();
        assert_eq!(booted.map_err(|problem| problem.code), expect);
        if expect.is_ok() {
            host.act(&vm, VmAction::Stop).await.unwrap();
        }
    }
}

/// Another VM would find too few in the pool while the process of a failed boot returns its own.
#[tokio::test]
async fn the_process_of_a_failed_boot_ends_before_another_vm_takes_huge_pages() {
    let gone = |pid: i32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit_once(") ").is_none_or(|(_, fields)| fields.starts_with('Z'))
    };
    for stopped in [false, true] {
        let (host, _) = with_pool().await;
        host.gates().close("configure");
        let vm = host.create("web1", |spec| {
            spec.hugepages = HugePages::Mib2;
            spec.boot.cmdline = "refuse-memory".to_owned();
        });
        let vm = vm.await;
        let done = vm.act(VmAction::Boot, caller()).await.unwrap();
        let mut status = vm.follow();
        let waits = status.wait_for(|status| {
            status.operation.is_some_and(|operation| operation.stage == Stage::BuildingMachine)
        });
        drop(timeout(PATIENCE, waits).await.unwrap().unwrap());
        let pid = vm.status().run.process.unwrap().pid;
        assert!(!gone(pid) && host.env.filling.try_lock().is_err());
        let next = async {
            let _filling = host.env.filling.lock().await;
            // The process may end by chance before the VM's task has noticed it.
            let stage = vm.status().operation.unwrap().stage;
            let releases = matches!(stage, Stage::CleaningFunction | Stage::ReturningFunction);
            assert!(gone(pid) && releases, "{stage:?}, stopped: {stopped}");
        };
        let end = async {
            if stopped {
                host.act(&vm, VmAction::Stop).await.unwrap();
            } else {
                host.gates().open("configure");
            }
            done.await.unwrap().unwrap_err();
        };
        timeout(PATIENCE, async { tokio::join!(next, end) }).await.unwrap();
    }
}

/// A command to stop the VM does not wait for another VM's pages.
#[tokio::test]
async fn a_vm_that_waits_for_huge_pages_can_be_stopped() {
    let (host, _) = with_pool().await;
    let vm = host.create("web1", |spec| spec.hugepages = HugePages::Mib2).await;
    let _filling = host.env.filling.lock().await;
    let done = vm.act(VmAction::Boot, caller()).await.unwrap();
    timeout(PATIENCE, host.act(&vm, VmAction::Stop)).await.unwrap().unwrap();
    assert!(timeout(PATIENCE, done).await.unwrap().unwrap().is_err());
    assert_eq!(vm.status().run.state, VmState::Stopped);
}
