// SPDX-License-Identifier: Apache-2.0

//! The switches' part of the backend in memory.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard},
};

use api::{Caller, Missing, PolicyBackend, Problem, ProblemCode, Put, types::*};
use async_trait::async_trait;
use netpolicy as np;
use tokio::sync::mpsc;
use uuid::Uuid;

#[derive(Default)]
pub(crate) struct State {
    pub(crate) switches: BTreeMap<Name, Switch>,
    pub(crate) groups: BTreeMap<Name, PortGroup>,
    pub(crate) ports: Vec<Port>,
    pub(crate) filters: Vec<DecisionFilter>,
    pub(crate) decisions: Vec<Decision>,
    pub(crate) subscribers: Vec<(Option<u64>, mpsc::Sender<Event>)>,
    /// The number of puts that lose to a concurrent change.
    pub(crate) races: u32,
}

#[derive(Clone, Default)]
pub(crate) struct FakePolicy(Arc<Mutex<State>>);

impl FakePolicy {
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// Attaches a port, with a real policy behind it.
    pub(crate) fn attach(&self, vm: &str) -> Port {
        let mut table = np::SwitchState::new();
        let mac: np::MacAddress = "02:00:00:00:00:11".parse().unwrap();
        let name = |text: &str| np::Name::new(text).unwrap();
        let (switch, group, id) = (Uuid::new_v4().into(), Uuid::new_v4().into(), Uuid::new_v4());
        table
            .add_switch(np::Switch {
                id: switch,
                name: name("lan"),
                kind: np::SwitchKind::Standard,
                uplinks: ["eth0".to_owned()].into(),
                settings: np::Settings::default(),
            })
            .unwrap();
        table
            .add_port_group(np::PortGroup {
                id: group,
                name: name("web"),
                switch,
                settings: np::Settings::default(),
                port_overrides: [].into(),
            })
            .unwrap();
        let owner = np::VmRef { id: Uuid::new_v4().into(), name: name(vm) };
        table.attach(np::Port::new(id.into(), owner.clone(), "eth0", group, mac)).unwrap();
        let status = PortStatus {
            owner: Owner { vm: owner.id.0, name: vm.into(), adapter: Some("eth0".into()) },
            switch: "lan".parse().unwrap(),
            port_group: "web".parse().unwrap(),
            pf: None,
            vf: None,
            vf_index: None,
            initial_mac: mac,
            effective_mac: mac,
            guest_mac: mac,
            policy: table.effective_policy(id.into()).unwrap(),
            unchecked: None,
            pending: None,
            unmade: Vec::new(),
            counters: PortCounters::default(),
        };
        let (created, spec) = (Timestamp::from_unix_ms(0), PortSpec::default());
        let port = Port { id, name: format!("{vm}/eth0"), revision: 0, created, spec, status };
        self.state().ports.push(port.clone());
        port
    }
}

fn at(expect: Option<u64>, revision: u64) -> Result<(), Problem> {
    match expect {
        Some(expect) if expect != revision => Err(Problem::revision_mismatch(expect, revision)),
        _ => Ok(()),
    }
}

#[async_trait]
impl PolicyBackend for FakePolicy {
    async fn list_switches(&self) -> Result<Vec<Switch>, Problem> {
        Ok(self.state().switches.values().cloned().collect())
    }

    async fn get_switch(&self, switch: ObjectRef) -> Result<Switch, Problem> {
        let found = self.state().switches.values().find(|s| switch.means(s.id, s.name.as_str())).cloned();
        found.ok_or_else(|| Problem::not_found(&Missing::new("switch", &switch)))
    }

    async fn put_switch(
        &self,
        _: Caller,
        name: Name,
        spec: SwitchSpec,
        expect: Option<u64>,
    ) -> Result<Put<Switch>, Problem> {
        let mut state = self.state();
        let old = state.switches.get(&name).cloned();
        let (id, revision) = old.as_ref().map_or((Uuid::new_v4(), 0), |old| (old.id, old.revision));
        at(expect, revision)?;
        let created = Timestamp::from_unix_ms(0);
        let status = SwitchStatus::default();
        let object = Switch { id, name: name.clone(), revision: revision + 1, created, spec, status };
        state.switches.insert(name, object.clone());
        Ok(Put { object, created: old.is_none() })
    }

    async fn delete_switch(&self, _: Caller, switch: ObjectRef, expect: Option<u64>) -> Result<(), Problem> {
        let switch = self.get_switch(switch).await?;
        at(expect, switch.revision)?;
        let mut state = self.state();
        if state.groups.values().any(|group| group.spec.switch == switch.name) {
            return Err(Problem::new(ProblemCode::SwitchInUse, "A port group uses it."));
        }
        state.switches.remove(&switch.name);
        Ok(())
    }

    async fn list_port_groups(&self) -> Result<Vec<PortGroup>, Problem> {
        Ok(self.state().groups.values().cloned().collect())
    }

    async fn get_port_group(&self, group: ObjectRef) -> Result<PortGroup, Problem> {
        let found = self.state().groups.values().find(|g| group.means(g.id, g.name.as_str())).cloned();
        found.ok_or_else(|| Problem::not_found(&Missing::new("port group", &group)))
    }

    async fn put_port_group(
        &self,
        _: Caller,
        name: Name,
        spec: PortGroupSpec,
        expect: Option<u64>,
    ) -> Result<Put<PortGroup>, Problem> {
        let policy = self.attach("schema").status.policy;
        let mut state = self.state();
        state.ports.pop();
        if state.races > 0 {
            state.races -= 1;
            if let Some(group) = state.groups.get_mut(&name) {
                group.revision += 1;
            }
        }
        let old = state.groups.get(&name).cloned();
        let (id, revision) = old.as_ref().map_or((Uuid::new_v4(), 0), |old| (old.id, old.revision));
        at(expect, revision)?;
        let (created, status) = (Timestamp::from_unix_ms(0), PortGroupStatus { ports: 0, policy });
        let object = PortGroup { id, name: name.clone(), revision: revision + 1, created, spec, status };
        state.groups.insert(name, object.clone());
        Ok(Put { object, created: old.is_none() })
    }

    async fn delete_port_group(
        &self,
        _: Caller,
        group: ObjectRef,
        expect: Option<u64>,
    ) -> Result<(), Problem> {
        let group = self.get_port_group(group).await?;
        at(expect, group.revision)?;
        self.state().groups.remove(&group.name);
        Ok(())
    }

    async fn list_ports(&self) -> Result<Vec<Port>, Problem> {
        Ok(self.state().ports.clone())
    }

    async fn get_port(&self, port: ObjectRef) -> Result<Port, Problem> {
        let found = self.state().ports.iter().find(|p| port.means(p.id, &p.name)).cloned();
        found.ok_or_else(|| Problem::not_found(&Missing::new("port", &port)))
    }

    async fn put_port(
        &self,
        _: Caller,
        port: ObjectRef,
        spec: PortSpec,
        expect: Option<u64>,
    ) -> Result<Port, Problem> {
        let mut state = self.state();
        let found = state.ports.iter_mut().find(|p| port.means(p.id, &p.name));
        let found = found.ok_or_else(|| Problem::not_found(&Missing::new("port", &port)))?;
        at(expect, found.revision)?;
        (found.spec, found.revision) = (spec, found.revision + 1);
        Ok(found.clone())
    }

    async fn decisions(&self, filter: DecisionFilter) -> Result<Vec<Decision>, Problem> {
        let mut state = self.state();
        state.filters.push(filter);
        Ok(state.decisions.clone())
    }

    async fn events(&self, after: Option<u64>) -> Result<mpsc::Receiver<Event>, Problem> {
        let (sender, receiver) = mpsc::channel(4);
        self.state().subscribers.push((after, sender));
        Ok(receiver)
    }
}
