// SPDX-License-Identifier: Apache-2.0

//! The place of guest memory beside the VM's functions.

use api::{
    problem::ProblemCode,
    types::{NumaPlace, PlacementSpec, VmAction},
};

use super::fixture::{Host, VF0, VF1, caller};
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
