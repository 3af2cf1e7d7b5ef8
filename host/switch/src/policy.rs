// SPDX-License-Identifier: Apache-2.0

//! The switch behind the API's routes.

use api::{
    Caller, Missing, PolicyBackend, Put,
    problem::{Problem, ProblemCode},
    types::{
        Decision, DecisionFilter, Event, Listed, Name, ObjectRef, Port, PortGroup, PortGroupSpec, PortSpec,
        Switch, SwitchSpec,
    },
};
use async_trait::async_trait;
use services::{
    decisions::{DecisionLog, events::EventHub},
    problem::ToProblem,
};
use tokio::sync::mpsc;

use super::{SwitchHandle, command::Command};

/// The backend of the API's routes of switches.
#[derive(Clone)]
pub struct Policy {
    /// The switch.
    pub switch: SwitchHandle,
    /// The log of decisions.
    pub decisions: DecisionLog,
    /// The hub of events.
    pub events: EventHub,
}

impl Policy {
    async fn call<T>(&self, command: impl FnOnce(super::command::Reply<T>) -> Command) -> Result<T, Problem> {
        self.switch.call(command).await.map_err(|error| error.problem())
    }
}

fn one<T: Listed>(
    mut all: Vec<T>,
    what: &'static str,
    name: &ObjectRef,
    means: impl Fn(&T) -> bool,
) -> Result<T, Problem> {
    match all.iter().position(means) {
        Some(found) => Ok(all.swap_remove(found)),
        None => Err(Problem::not_found(&Missing::among(what, name.text(), all.iter().map(Listed::key)))),
    }
}

#[async_trait]
impl PolicyBackend for Policy {
    async fn list_switches(&self) -> Result<Vec<Switch>, Problem> {
        self.call(|reply| Command::ListSwitches { reply }).await
    }

    async fn get_switch(&self, switch: ObjectRef) -> Result<Switch, Problem> {
        let means = |found: &Switch| switch.means(found.id, found.name.as_str());
        one(self.list_switches().await?, "switch", &switch, means)
    }

    async fn put_switch(
        &self,
        caller: Caller,
        name: Name,
        spec: SwitchSpec,
        expect: Option<u64>,
    ) -> Result<Put<Switch>, Problem> {
        let by = caller.to_string();
        self.call(|reply| Command::PutSwitch { name, spec, expect, by, reply }).await
    }

    async fn delete_switch(
        &self,
        caller: Caller,
        switch: ObjectRef,
        expect: Option<u64>,
    ) -> Result<(), Problem> {
        let by = caller.to_string();
        self.call(|reply| Command::DeleteSwitch { switch, expect, by, reply }).await
    }

    async fn list_port_groups(&self) -> Result<Vec<PortGroup>, Problem> {
        self.call(|reply| Command::ListGroups { reply }).await
    }

    async fn get_port_group(&self, group: ObjectRef) -> Result<PortGroup, Problem> {
        let means = |found: &PortGroup| group.means(found.id, found.name.as_str());
        one(self.list_port_groups().await?, "port group", &group, means)
    }

    async fn put_port_group(
        &self,
        caller: Caller,
        name: Name,
        spec: PortGroupSpec,
        expect: Option<u64>,
    ) -> Result<Put<PortGroup>, Problem> {
        let by = caller.to_string();
        self.call(|reply| Command::PutGroup { name, spec, expect, by, reply }).await
    }

    async fn delete_port_group(
        &self,
        caller: Caller,
        group: ObjectRef,
        expect: Option<u64>,
    ) -> Result<(), Problem> {
        let by = caller.to_string();
        self.call(|reply| Command::DeleteGroup { group, expect, by, reply }).await
    }

    async fn list_ports(&self) -> Result<Vec<Port>, Problem> {
        self.call(|reply| Command::ListPorts { reply }).await
    }

    async fn get_port(&self, port: ObjectRef) -> Result<Port, Problem> {
        let means = |found: &Port| port.means(found.id, &found.name);
        one(self.list_ports().await?, "port", &port, means)
    }

    async fn put_port(
        &self,
        caller: Caller,
        port: ObjectRef,
        spec: PortSpec,
        expect: Option<u64>,
    ) -> Result<Port, Problem> {
        let by = caller.to_string();
        self.call(|reply| Command::PutPort { port, spec, expect, by, reply }).await
    }

    async fn decisions(&self, mut filter: DecisionFilter) -> Result<Vec<Decision>, Problem> {
        // VMs may reuse a name. The filter takes the id of its present owner, so that decisions of
        // earlier owners stay out.
        if let Some(name) = &mut filter.vm
            && let Some(port) =
                self.list_ports().await?.iter().find(|port| port.status.owner.name.eq_ignore_ascii_case(name))
        {
            *name = port.status.owner.vm.to_string();
        }
        let found = self.decisions.query(filter).await.map_err(|error| error.problem())?;
        Ok(found.into_iter().map(Decision::from).collect())
    }

    async fn events(&self, after: Option<u64>) -> Result<mpsc::Receiver<Event>, Problem> {
        self.events.subscribe(after).ok_or_else(|| {
            Problem::new(ProblemCode::Unavailable, "Too many clients follow events: end one of them.")
        })
    }
}
