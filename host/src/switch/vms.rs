//! Ports of VMs: made, given VFs, and taken from them.

use api::types::{ObjectKind, PortCounters, Timestamp};
use netpolicy::{Change, PfCapabilities, Port, PortId, VfRef, VmId, VmRef};
use passthrough::{
    fail::{Point, reach},
    host::VfChange,
};
use uuid::Uuid;

use super::{
    actor::{Actor, Meta},
    command::{Adapter, Leftover, Reply, Uplinks},
    error::SwitchError,
    lane::{Lane, Work},
    load::DEFAULT,
    record::{PortRecord, port_name},
};
use crate::store::{Expect, StoreError};

impl Actor {
    pub(super) async fn attach(&mut self, vm: &VmRef, adapters: Vec<Adapter>) -> Result<(), SwitchError> {
        let mut trial = self.state.clone();
        let mut made = Vec::new();
        for Adapter { id, group, mac } in adapters {
            if self.adapters.contains_key(&(vm.id, id.clone())) {
                continue;
            }
            let name = group.as_deref().unwrap_or(DEFAULT);
            let found = trial.port_groups().find(|group| group.name.as_str() == name);
            let group =
                found.map(|group| group.id).ok_or_else(|| SwitchError::NoPortGroup(name.to_owned()))?;
            let port = Port::new(PortId(Uuid::new_v4()), vm.clone(), id, group, mac);
            trial.attach(port.clone())?;
            made.push(port);
        }
        let created = Timestamp::now();
        let mut stored: Vec<(PortId, u64)> = Vec::new();
        for port in &made {
            let record = PortRecord::of(port, created);
            match self.ports.put(port.id.0, &port_name(port), &record, Expect::Absent).await {
                Ok(revision) => stored.push((port.id, revision)),
                Err(error) => {
                    for (id, _) in stored {
                        drop(self.ports.remove(id.0).await);
                    }
                    return Err(error.into());
                }
            }
        }
        self.state = trial;
        for (port, (id, revision)) in made.iter().zip(stored) {
            self.meta.insert(id.0, Meta { created, revision });
            self.adapters.insert((vm.id, port.adapter.clone()), id);
            self.lanes.insert(id, Lane::default());
            self.put(ObjectKind::Port, id.0, &port_name(port), true, None);
        }
        Ok(())
    }

    pub(super) async fn detach(&mut self, vm: VmId) -> Result<(), SwitchError> {
        for id in self.ports_of(vm) {
            let port = self.state.detach(id)?;
            self.adapters.remove(&(vm, port.adapter.clone()));
            self.lanes.remove(&id);
            self.meta.remove(&id.0);
            // The port itself first: what is left of it without that is nothing to anybody.
            self.ports.remove(id.0).await?;
            reach(Point::DeletePort);
            drop(self.writer.forget(id).await);
            self.deleted(ObjectKind::Port, id.0, &port_name(&port), None);
        }
        self.links.remove(&vm);
        Ok(())
    }

    pub(super) fn plan(&self, vm: VmId) -> Result<Vec<Uplinks>, SwitchError> {
        let mut plan = Vec::new();
        for id in self.ports_of(vm) {
            let Some(port) = self.state.port(id) else { continue };
            let group = self.state.port_group(port.group);
            let Some(switch) = group.and_then(|group| self.state.switch(group.switch)) else { continue };
            let policy = self.state.effective_policy(id)?;
            let (mut pfs, mut unfit) = (Vec::new(), Vec::new());
            for pf in switch.uplinks.iter().filter(|pf| self.pfs.contains(*pf)) {
                match self.capabilities.get(pf).map(|capabilities| capabilities.check(&policy)) {
                    Some(Ok(())) => pfs.push(pf.clone()),
                    Some(Err(why)) => unfit.push((pf.clone(), why.to_string())),
                    None => unfit.push((pf.clone(), "its driver cannot be asked what it can do".into())),
                }
            }
            let (adapter, switch) = (port.adapter.clone(), switch.name.to_string());
            plan.push(Uplinks { adapter, switch, pfs, unfit });
        }
        Ok(plan)
    }

    pub(super) async fn bind(
        &mut self,
        vm: VmId,
        adapter: &str,
        vf: VfRef,
        bdf: String,
        capabilities: PfCapabilities,
    ) -> Result<Vec<VfChange>, SwitchError> {
        let id = self.adapter(vm, adapter)?;
        let policy = self.state.effective_policy(id)?;
        if let (Err(source), Some(port)) = (capabilities.check(&policy), self.state.port(id)) {
            return Err(SwitchError::Unenforceable { port: port_name(port), pf: vf.pf, source });
        }
        let pf = vf.pf.clone();
        let baseline = self.state.bind(id, vf)?;
        let counters = self.lanes.get(&id).map(|lane| lane.counters).unwrap_or_default();
        self.lanes.insert(id, fresh(counters, Some(bdf)));
        self.store_attachment(id).await?;
        let wanted = baseline.changes().into_iter().filter(|change| capabilities.can_make(change));
        let changes = wanted.filter_map(|change| VfChange::of(&change)).collect();
        self.capabilities.insert(pf, capabilities);
        Ok(changes)
    }

    pub(super) fn release(&mut self, vm: VmId, adapter: String, reply: Reply<Option<Leftover>>) {
        let bound = |id: &PortId| self.state.port(*id).is_some_and(|port| port.vf.is_some());
        let Some(port) = self.port_of(vm, &adapter).filter(bound) else {
            return drop(reply.send(Ok(None)));
        };
        if let Some(lane) = self.lanes.get_mut(&port) {
            lane.closing = true;
            lane.queue.retain(|work| matches!(work, Work::Release { .. }));
            if let Some(busy) = &mut lane.busy {
                busy.forwarded = None;
            }
        }
        self.queue(port, Work::Release { reply });
    }

    /// What is on the VF of a port for which nothing is under way.
    pub(super) fn leftover(&self, id: PortId) -> Result<Option<Leftover>, SwitchError> {
        let Some((port, vf)) = self.state.port(id).and_then(|port| Some((port, port.vf.clone()?))) else {
            return Ok(None);
        };
        let mut changes = self.state.take_back_all(id)?;
        let earlier = self.lanes.get(&id).map(|lane| lane.leftover.as_slice()).unwrap_or_default();
        let missing: Vec<Change> =
            earlier.iter().filter(|change| !changes.contains(change)).cloned().collect();
        changes.extend(missing);
        let (adapter, effective_mac) = (port.adapter.clone(), port.effective_mac());
        Ok(Some(Leftover { adapter, vf, effective_mac, changes }))
    }

    pub(super) async fn released(&mut self, vm: VmId, adapter: &str) -> Result<(), SwitchError> {
        let id = self.adapter(vm, adapter)?;
        if self.state.port(id).is_some_and(|port| port.vf.is_some()) {
            self.state.unbind(id)?;
        }
        let counters = self.lanes.get(&id).map(|lane| lane.counters).unwrap_or_default();
        self.lanes.insert(id, fresh(counters, None));
        self.refresh_uplinks();
        self.store_attachment(id).await
    }

    fn adapter(&self, vm: VmId, adapter: &str) -> Result<PortId, SwitchError> {
        let missing = || SwitchError::NotFound { what: "port of adapter", name: adapter.to_owned() };
        self.port_of(vm, adapter).ok_or_else(missing)
    }

    /// Durable when it returns.
    async fn store_attachment(&self, id: PortId) -> Result<(), SwitchError> {
        let Some(attachment) = self.attachment(id) else { return Ok(()) };
        match self.writer.save(id, attachment).await {
            Ok(true) => Ok(()),
            _ => Err(SwitchError::Store(StoreError::Closed)),
        }
    }
}

fn fresh(counters: PortCounters, bdf: Option<String>) -> Lane {
    Lane { counters, bdf, ..Lane::default() }
}
