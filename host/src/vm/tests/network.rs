// SPDX-License-Identifier: Apache-2.0

use std::time::Duration;

use api::{
    PolicyBackend,
    problem::ProblemCode,
    types::{CauseCode, DecisionFilter, ObjectRef, Port, PortGroupSpec, VmAction, VmState},
};
use netpolicy::{MacAddress, Outcome, Reason};
use switch::Policy;

use super::fixture::{Host, PATIENCE, caller};
use crate::vm::VmHandle;

impl Host {
    fn policy(&self) -> &Policy {
        &self.env.policy
    }

    async fn put_group(&self, name: &str, settings: &str) {
        let spec = PortGroupSpec {
            switch: "default".parse().unwrap(),
            settings: serde_json::from_str(settings).unwrap(),
            port_overrides: Default::default(),
        };
        self.policy().put_port_group(caller(), name.parse().unwrap(), spec, None).await.unwrap();
    }

    async fn port(&self) -> Port {
        self.policy().get_port(ObjectRef::Name("web1/eth0".into())).await.unwrap()
    }

    /// Makes the VM send a request, and waits for the decision.
    async fn asks(&self, vm: &VmHandle, request: &str, verdict: Outcome) -> api::types::Decision {
        self.tell(vm, &format!("ask {request}")).await;
        let filter = DecisionFilter { verdict: Some(verdict), limit: 1, ..DecisionFilter::default() };
        let decided = async {
            loop {
                if let Some(decision) = self.policy().decisions(filter.clone()).await.unwrap().pop() {
                    return decision;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(PATIENCE, decided).await.expect("a decision")
    }
}

fn mac(n: u8) -> MacAddress {
    MacAddress::new([2, 0, 0, 0, 0, n])
}

#[tokio::test]
async fn an_adapter_is_a_port_whose_guest_is_decided_about() {
    let host = Host::new().await;
    let vm = host.create("web1", |_| {}).await;
    host.act(&vm, VmAction::Boot).await.unwrap();
    let port = host.port().await;
    assert_eq!((port.status.port_group.as_str(), port.status.vf_index), ("default", Some(0)));
    assert_eq!(port.status.vf.unwrap().to_string(), "0000:01:10.0");
    assert_eq!(host.settings(0).mac, Some(port.status.initial_mac));
    assert_eq!((host.settings(0).trust, host.settings(0).spoof_check), (Some(false), Some(true)));
    let denied = host.asks(&vm, r#"{"set_mac": "02:00:00:00:00:09"}"#, Outcome::Denied).await;
    assert_eq!(denied.reason, Some(Reason::MacChangesRejected));
    assert_eq!(host.settings(0).mac, Some(port.status.initial_mac));
    host.act(&vm, VmAction::Stop).await.unwrap();
    host.assert_untouched().await;
    let stopped = host.port().await;
    assert_eq!((stopped.id, stopped.status.vf), (port.id, None), "the port stays with its adapter");
    vm.delete(caller(), None).await.unwrap();
    assert!(host.policy().list_ports().await.unwrap().is_empty());
}

#[tokio::test]
async fn what_a_guest_was_granted_is_gone_after_a_crash() {
    let host = Host::new().await;
    host.put_group("web", r#"{"mac_changes": "accept"}"#).await;
    let vm = host.create("web1", |spec| spec.adapters[0].port_group = Some("web".parse().unwrap())).await;
    host.act(&vm, VmAction::Boot).await.unwrap();
    host.asks(&vm, r#"{"set_mac": "02:00:00:00:00:09"}"#, Outcome::Allowed).await;
    assert_eq!((host.settings(0).mac, host.port().await.status.guest_mac), (Some(mac(9)), mac(9)));
    host.tell(&vm, "crash").await;
    host.at_rest(&vm).await;
    host.assert_untouched().await;
    let status = host.port().await.status;
    assert_eq!((status.vf, status.effective_mac), (None, status.initial_mac));
}

#[tokio::test]
async fn a_vm_that_keeps_what_is_revoked_is_killed_and_its_vf_is_nobodys_until_it_is_clean() {
    let host = Host::new().await;
    host.put_group("web", r#"{"vlan": {"trunk": [100]}}"#).await;
    let vm = host.create("web1", |spec| spec.adapters[0].port_group = Some("web".parse().unwrap())).await;
    host.act(&vm, VmAction::Boot).await.unwrap();
    host.asks(&vm, r#"{"set_vlan": {"vid": 100, "add": true}}"#, Outcome::Allowed).await;
    // The fake vmm revokes nothing.
    host.put_group("web", "{}").await;
    host.at_rest(&vm).await;
    let cause = vm.status().run.cause.unwrap();
    assert_eq!((vm.state(), cause.code), (VmState::Failed, CauseCode::MachineFailed));
    assert!(cause.detail.contains("set_vlan"), "{}", cause.detail);
    // There is no VFIO in this test, so the VLAN cannot be left, and no other VM may get the VF.
    assert_eq!(host.claims().await, 1);
    assert_eq!(host.act(&vm, VmAction::Boot).await.unwrap_err(), ProblemCode::DeviceFailed);
    assert_eq!(host.port().await.status.vf_index, Some(0));
}

#[tokio::test]
async fn a_vf_comes_from_an_uplink_of_the_port_groups_switch() {
    let host = Host::new().await;
    let spec = api::types::SwitchSpec { uplinks: ["eth0".to_owned()].into(), ..Default::default() };
    host.policy().put_switch(caller(), "prod".parse().unwrap(), spec, None).await.unwrap();
    let vm = host.create("web1", |_| {}).await;
    assert_eq!(host.act(&vm, VmAction::Boot).await.unwrap_err(), ProblemCode::NoFreeVf);
    let vm = host.create("web2", |spec| spec.adapters[0].port_group = Some("no".parse().unwrap())).await;
    assert_eq!(host.act(&vm, VmAction::Boot).await.unwrap_err(), ProblemCode::PortGroupNotFound);
    assert_eq!(host.claims().await, 0);
}
