// SPDX-License-Identifier: Apache-2.0

use api::{
    PolicyBackend,
    problem::{Problem, ProblemCode},
    types::{ObjectRef, PortGroupSpec, PortSpec, SwitchSpec},
};

use super::fixture::{Host, caller, vm};

impl Host {
    pub(super) async fn delete_group(&self, name: &str) -> Result<(), Problem> {
        self.policy.delete_port_group(caller(), ObjectRef::Name(name.into()), None).await
    }

    async fn put_switch(
        &self,
        name: &str,
        uplinks: &[&str],
        expect: Option<u64>,
    ) -> Result<u64, ProblemCode> {
        let uplinks = uplinks.iter().map(ToString::to_string).collect();
        let spec = SwitchSpec { uplinks, ..SwitchSpec::default() };
        let put = self.policy.put_switch(caller(), name.parse().unwrap(), spec, expect).await;
        put.map(|put| put.object.revision).map_err(|problem| problem.code)
    }

    async fn uplinks(&self, switch: &str) -> Vec<String> {
        let switch = self.policy.get_switch(ObjectRef::Name(switch.into())).await.unwrap();
        switch.spec.uplinks.into_iter().collect()
    }
}

#[tokio::test]
async fn the_default_switch_has_what_no_other_has_until_it_is_edited() {
    let mut host = Host::empty().await;
    assert_eq!(host.uplinks("default").await, ["eth0", "eth1"]);
    host.put_switch("prod", &["eth1"], None).await.unwrap();
    assert_eq!(
        (host.uplinks("default").await, host.uplinks("prod").await),
        (vec!["eth0".into()], vec!["eth1".into()])
    );
    assert_eq!(host.put_switch("other", &["eth1"], None).await, Err(ProblemCode::SwitchInUse));
    host.restart().await;
    assert_eq!(host.uplinks("default").await, ["eth0"]);
    host.policy.delete_switch(caller(), ObjectRef::Name("prod".into()), None).await.unwrap();
    assert_eq!(host.uplinks("default").await, ["eth0", "eth1"]);
    host.put_switch("default", &["eth1"], None).await.unwrap();
    host.restart().await;
    assert_eq!(host.uplinks("default").await, ["eth1"]);
    let problem = host.policy.delete_switch(caller(), ObjectRef::Name("default".into()), None).await;
    assert_eq!(problem.unwrap_err().code, ProblemCode::SwitchInUse);
}

#[tokio::test]
async fn a_distributed_switch_is_refused_by_name() {
    let host = Host::empty().await;
    let kind = netpolicy::SwitchKind::Distributed;
    let put = |name: &str, kind| {
        host.policy.put_switch(
            caller(),
            name.parse().unwrap(),
            SwitchSpec { kind, ..SwitchSpec::default() },
            None,
        )
    };
    let problem = put("prod", kind).await.unwrap_err();
    assert_eq!((problem.code, problem.field.as_deref()), (ProblemCode::InvalidRequest, Some("kind")));
    assert!(problem.detail.contains("distributed"), "{problem}");
    put("prod", netpolicy::SwitchKind::Standard).await.unwrap();
    // The kind of a switch never changes.
    assert_eq!(put("prod", kind).await.unwrap_err().code, ProblemCode::InvalidRequest);
}

#[tokio::test]
async fn a_port_group_has_a_switch_that_exists() {
    let host = Host::empty().await;
    let spec = PortGroupSpec {
        switch: "nowhere".parse().unwrap(),
        settings: netpolicy::Settings::default(),
        port_overrides: std::collections::BTreeSet::new(),
    };
    let put = host.policy.put_port_group(caller(), "web".parse().unwrap(), spec, None).await;
    let problem = put.unwrap_err();
    assert_eq!(problem.code, ProblemCode::SwitchNotFound);
    assert!(problem.detail.contains("nowhere"), "{problem}");
}

#[tokio::test]
async fn events_have_so_many_subscribers_and_no_more() {
    let host = Host::empty().await;
    let mut subscribers = Vec::new();
    let problem = loop {
        match host.policy.events(None).await {
            Ok(subscriber) => subscribers.push(subscriber),
            Err(problem) => break problem,
        }
    };
    assert_eq!((problem.code, subscribers.len()), (ProblemCode::Unavailable, 256));
    subscribers.pop();
    assert!(host.policy.events(None).await.is_ok());
}

#[tokio::test]
async fn an_uplink_whose_vfs_are_in_use_stays() {
    let host = Host::new("{}").await;
    assert_eq!(host.put_switch("prod", &["eth0"], None).await, Err(ProblemCode::SwitchInUse));
    assert_eq!(host.put_switch("default", &["eth1"], None).await, Err(ProblemCode::SwitchInUse));
    host.put_switch("default", &["eth0"], None).await.unwrap();
}

#[tokio::test]
async fn a_revision_is_compared_and_a_refused_edit_changes_nothing() {
    let host = Host::empty().await;
    let first = host.put_switch("prod", &["eth1"], None).await.unwrap();
    assert_eq!(host.put_switch("prod", &[], Some(first + 1)).await, Err(ProblemCode::RevisionMismatch));
    assert_eq!(host.uplinks("prod").await, ["eth1"]);
    let second = host.put_switch("prod", &[], Some(first)).await.unwrap();
    assert!(second > first);
    assert_eq!(host.put_switch("prod", &[], Some(first)).await, Err(ProblemCode::RevisionMismatch));
}

#[tokio::test]
async fn a_port_decides_what_its_group_lets_it_and_the_source_says_so() {
    let host = Host::new("{}").await;
    let port = host.port(1).await;
    let spec = PortSpec { settings: serde_json::from_str(r#"{"mtu": 1400}"#).unwrap() };
    let put = host.policy.put_port(caller(), ObjectRef::Id(port.id), spec.clone(), Some(port.revision)).await;
    let put = put.unwrap();
    assert_eq!(
        (put.status.policy.mtu.value.get(), put.status.policy.mtu.source),
        (1400, netpolicy::Source::Port)
    );
    assert!(put.revision > port.revision);
    host.attach(0, None).await.unwrap();
    let strict = host.policy.get_port(ObjectRef::Name("vm0/eth0".into())).await.unwrap();
    let refused = host.policy.put_port(caller(), ObjectRef::Id(strict.id), spec, None).await.unwrap_err();
    assert_eq!(refused.code, ProblemCode::InvalidRequest);
    assert!(refused.detail.contains("mtu"));
    assert!(host.switch.plan(vm(1)).await.unwrap()[0].pfs.contains(&"eth0".to_owned()));
}
