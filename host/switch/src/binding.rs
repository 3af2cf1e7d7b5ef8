// SPDX-License-Identifier: Apache-2.0

//! The ports of VMs: creating them, binding them to VFs, releasing the VFs, deleting the ports.

use std::collections::BTreeMap;

use api::{
    Missing,
    types::{ObjectKind, PortCounters, Timestamp},
};
use failpoints::{Point, reach};
use netpolicy::{Change, PfCapabilities, Port, PortId, VfRef, VmId, VmRef};
use sriov::VfChange;
use store::{Expect, StoreError};
use uuid::Uuid;

use super::{
    actor::{Actor, Meta},
    command::{Adapter, Leftover, Reply, Uplinks},
    error::SwitchError,
    port_queue::{PortQueue, Task},
    record::{PortRecord, port_name},
    startup::DEFAULT,
};

impl Actor {
    /// Makes the VM's ports match its adapters. An adapter that stays keeps its port, even if the VM has a new
    /// name. The port's overrides end when its group changes.
    pub(super) async fn attach(&mut self, vm: &VmRef, adapters: Vec<Adapter>) -> Result<(), SwitchError> {
        let mut trial = self.state.clone();
        let of_vm = self.ports_of(vm.id);
        let mut old: BTreeMap<String, Port> = of_vm
            .into_iter()
            .filter_map(|id| self.state.port(id))
            .map(|port| (port.adapter.clone(), port.clone()))
            .collect();
        // (the port before, the port after)
        let mut changed: Vec<(Option<Port>, Port)> = Vec::new();
        for Adapter { id, group, mac } in adapters {
            let name = group.as_deref().unwrap_or(DEFAULT);
            let found = trial.port_groups().find(|group| group.name.as_str() == name);
            let group = found.map(|group| group.id).ok_or_else(|| {
                let names = trial.port_groups().map(|group| group.name.as_str());
                SwitchError::NoPortGroup(Missing::among("port group", name, names))
            })?;
            let old = old.remove(&id);
            if old.as_ref().is_some_and(|old| (old.group, old.initial_mac, &old.vm) == (group, mac, vm)) {
                continue;
            }
            let port = old.as_ref().map_or_else(|| PortId(Uuid::new_v4()), |old| old.id);
            let mut port = Port::new(port, vm.clone(), id, group, mac);
            if let Some(old) = old.as_ref().filter(|old| old.group == group) {
                port.overrides = old.overrides.clone();
            }
            changed.push((old, port));
        }
        let gone: Vec<PortId> = old.values().map(|port| port.id).collect();
        // Make all removals first: new ports may have the addresses of old ones.
        for id in gone.iter().copied().chain(changed.iter().filter_map(|(old, _)| Some(old.as_ref()?.id))) {
            trial.detach(id)?;
        }
        for (_, port) in &changed {
            trial.attach(port.clone())?;
        }
        let revisions = self.store_ports(&changed).await?;
        self.state = trial;
        for ((old, port), (created, revision)) in changed.iter().zip(revisions) {
            self.meta.insert(port.id.0, Meta { created, revision });
            self.adapters.insert((vm.id, port.adapter.clone()), port.id);
            self.port_queues.entry(port.id).or_default();
            if old.is_some() {
                self.save(port.id);
            }
            self.put(ObjectKind::Port, port.id.0, &port_name(port), old.is_none(), None);
        }
        for port in old.values() {
            self.forget_port(port).await?;
        }
        Ok(())
    }

    /// Stores ports, all or none. Returns the time of each port's creation, and its revision.
    async fn store_ports(
        &self,
        changed: &[(Option<Port>, Port)],
    ) -> Result<Vec<(Timestamp, u64)>, SwitchError> {
        let mut stored = Vec::new();
        for (old, port) in changed {
            let created = self.meta.get(&port.id.0).map_or_else(Timestamp::now, |meta| meta.created);
            let expect = if old.is_some() { Expect::Any } else { Expect::Absent };
            let put =
                self.ports.put(port.id.0, &port_name(port), &PortRecord::of(port, created), expect).await;
            match put {
                Ok(revision) => stored.push((created, revision)),
                Err(error) => {
                    for ((old, port), (created, _)) in changed.iter().zip(stored) {
                        match old {
                            Some(old) => {
                                let record = PortRecord::of(old, created);
                                drop(self.ports.put(old.id.0, &port_name(old), &record, Expect::Any).await);
                            }
                            None => drop(self.ports.remove(port.id.0).await),
                        }
                    }
                    return Err(error.into());
                }
            }
        }
        Ok(stored)
    }

    pub(super) async fn detach(&mut self, vm: VmId) -> Result<(), SwitchError> {
        for id in self.ports_of(vm) {
            let port = self.state.detach(id)?;
            self.forget_port(&port).await?;
        }
        self.links.remove(&vm);
        Ok(())
    }

    /// Forgets a port that is no longer in the state.
    async fn forget_port(&mut self, port: &Port) -> Result<(), SwitchError> {
        let id = port.id;
        self.adapters.remove(&(port.vm.id, port.adapter.clone()));
        self.port_queues.remove(&id);
        self.publish_unchecked();
        self.meta.remove(&id.0);
        // Remove the port itself first: without it, the other records have no effect.
        self.ports.remove(id.0).await?;
        reach(Point::DeletePort);
        drop(self.journal.forget(id).await);
        self.decisions.forget(id).await;
        self.deleted(ObjectKind::Port, id.0, &port_name(port), None);
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
                    None => unfit.push((pf.clone(), "the abilities of its driver cannot be read".into())),
                }
            }
            let (adapter, switch) = (port.adapter.clone(), switch.name.to_string());
            let mtu = policy.mtu.value.get();
            plan.push(Uplinks { adapter, switch, pfs, mtu, unfit });
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
            return Err(SwitchError::Unenforceable { port: port_name(port), pf: vf.pf, others: 0, source });
        }
        let pf = vf.pf.clone();
        let baseline = self.state.bind(id, vf)?;
        let counters = self.port_queues.get(&id).map(|port_queue| port_queue.counters).unwrap_or_default();
        self.port_queues.insert(id, PortQueue { binding: true, ..fresh(counters, Some(bdf)) });
        self.store_attachment(id).await?;
        let wanted = baseline.changes().into_iter().filter(|change| capabilities.can_make(change));
        let changes = wanted.filter_map(|change| VfChange::of(&change)).collect();
        self.set_capabilities(pf, capabilities);
        Ok(changes)
    }

    /// Notes that the PF has the VF's baseline. From now on the port is compared with the PF.
    pub(super) fn programmed(&mut self, vf: &VfRef) {
        let port = self.state.ports().find(|port| port.vf.as_ref() == Some(vf)).map(|port| port.id);
        if let Some(port_queue) = port.and_then(|port| self.port_queues.get_mut(&port)) {
            port_queue.binding = false;
        }
    }

    pub(super) fn release(&mut self, vm: VmId, adapter: String, reply: Reply<Option<Leftover>>) {
        let bound = |id: &PortId| self.state.port(*id).is_some_and(|port| port.vf.is_some());
        let Some(port) = self.port_of(vm, &adapter).filter(bound) else {
            return drop(reply.send(Ok(None)));
        };
        if let Some(port_queue) = self.port_queues.get_mut(&port) {
            port_queue.closing = true;
            port_queue.queue.retain(|work| matches!(work, Task::Release { .. }));
            if let Some(busy) = &mut port_queue.busy {
                busy.forwarded = None;
            }
        }
        self.queue(port, Task::Release { reply });
    }

    /// The leftovers on the VF of a port without work under way.
    pub(super) fn leftover(&self, id: PortId) -> Result<Option<Leftover>, SwitchError> {
        let Some((port, vf)) = self.state.port(id).and_then(|port| Some((port, port.vf.clone()?))) else {
            return Ok(None);
        };
        let mut changes = self.state.revocations_for_release(id)?;
        let earlier =
            self.port_queues.get(&id).map(|port_queue| port_queue.leftover.as_slice()).unwrap_or_default();
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
        let counters = self.port_queues.get(&id).map(|port_queue| port_queue.counters).unwrap_or_default();
        self.port_queues.insert(id, fresh(counters, None));
        self.publish_unchecked();
        self.refresh_uplinks();
        self.store_attachment(id).await
    }

    fn adapter(&self, vm: VmId, adapter: &str) -> Result<PortId, SwitchError> {
        let missing = || SwitchError::NotFound(Missing::new("port of adapter", adapter));
        self.port_of(vm, adapter).ok_or_else(missing)
    }

    /// Stores the port's attachment, durably when it returns.
    async fn store_attachment(&self, id: PortId) -> Result<(), SwitchError> {
        let Some(attachment) = self.attachment(id) else { return Ok(()) };
        match self.journal.save(id, &attachment).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(why)) => Err(SwitchError::Store(StoreError::NotWritten(why))),
            Err(_) => Err(SwitchError::Store(StoreError::Closed)),
        }
    }
}

fn fresh(counters: PortCounters, bdf: Option<String>) -> PortQueue {
    PortQueue { counters, bdf, ..PortQueue::default() }
}
