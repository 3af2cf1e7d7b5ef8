// SPDX-License-Identifier: Apache-2.0

//! Switches, port groups and ports as the API edits them.
//!
//! An edit is tried on a copy first. An edit that the tables do not allow, or that a PF could not enforce for a running port,
//! is refused before anything is stored.

use api::{
    Missing,
    types::{Name, ObjectKind, ObjectRef, PortGroupSpec, PortSpec, SwitchSpec, Timestamp},
};
use netpolicy::{
    Corrections, Entity, PortGroup, PortGroupId, PortId, Setting, Switch, SwitchId, SwitchKind, SwitchState,
};
use store::Expect;
use uuid::Uuid;

use super::{
    actor::{Actor, Meta},
    error::SwitchError,
    port_queue::Task,
    record::{GroupRecord, PortRecord, SwitchRecord, port_name},
    startup::{DEFAULT, DEFAULT_GROUP, DEFAULT_SWITCH},
};

impl Actor {
    pub(super) async fn put_switch(
        &mut self,
        name: Name,
        spec: SwitchSpec,
        expect: Option<u64>,
        by: String,
    ) -> Result<api::Put<api::types::Switch>, SwitchError> {
        let found = self.state.switches().find(|switch| switch.name.as_str() == name.as_str());
        let id = found.map(|switch| switch.id);
        let meta = self.expect(id.map(|id| id.0), expect)?;
        // Releases before 0.2.0 stored the kind `distributed` without a meaning. Switches of that time keep it.
        if id.is_none() && spec.kind == SwitchKind::Distributed {
            return Err(SwitchError::Distributed);
        }
        let mut trial = self.state.clone();
        // The implicit default switch has the PFs that no other switch names: remove the ones that this switch
        // names.
        if self.default_is_implicit()
            && id != Some(DEFAULT_SWITCH)
            && let Some(mut default) = trial.switch(DEFAULT_SWITCH).cloned()
        {
            default.uplinks.retain(|pf| !spec.uplinks.contains(pf));
            drop(trial.update_switch(default)?);
        }
        let switch = Switch {
            id: id.unwrap_or_else(|| SwitchId(Uuid::new_v4())),
            name: netpolicy::Name::new(name.as_str())?,
            kind: spec.kind,
            uplinks: spec.uplinks,
            settings: spec.settings,
        };
        let (id, created) = (switch.id, meta.is_none());
        let corrections = match trial.switch(id) {
            Some(_) => trial.update_switch(switch.clone())?,
            None => {
                trial.add_switch(switch.clone())?;
                Vec::new()
            }
        };
        self.check_enforceable(&trial)?;
        let meta = meta.unwrap_or_else(|| Meta { created: Timestamp::now(), revision: 0 });
        let record = SwitchRecord { created: meta.created, switch };
        let revision = self.switches.put(id.0, name.as_str(), &record, revision(meta)).await?;
        self.meta.insert(id.0, Meta { revision, ..meta });
        self.adopt(trial, corrections, &by);
        self.refresh_uplinks();
        self.put(ObjectKind::Switch, id.0, name.as_str(), created, Some(by));
        Ok(api::Put { object: self.view_switch(id)?, created })
    }

    pub(super) async fn delete_switch(
        &mut self,
        switch: &ObjectRef,
        expect: Option<u64>,
        by: String,
    ) -> Result<(), SwitchError> {
        let found = self.state.switches().find(|found| switch.means(found.id.0, found.name.as_str()));
        let (id, name) = found.map(|switch| (switch.id, switch.name.to_string())).ok_or_else(|| {
            let names = self.state.switches().map(|switch| switch.name.as_str());
            SwitchError::NotFound(Missing::among("switch", switch.text(), names))
        })?;
        self.expect(Some(id.0), expect)?;
        if name == DEFAULT {
            return Err(SwitchError::Permanent(Entity::Switch));
        }
        let mut trial = self.state.clone();
        trial.remove_switch(id)?;
        self.switches.remove(id.0).await?;
        self.meta.remove(&id.0);
        self.adopt(trial, Vec::new(), &by);
        self.refresh_uplinks();
        self.deleted(ObjectKind::Switch, id.0, &name, Some(by));
        Ok(())
    }

    pub(super) async fn put_group(
        &mut self,
        name: Name,
        spec: PortGroupSpec,
        expect: Option<u64>,
        by: String,
    ) -> Result<api::Put<api::types::PortGroup>, SwitchError> {
        let found = self.state.port_groups().find(|group| group.name.as_str() == name.as_str());
        let id = found.map(|group| group.id);
        let meta = self.expect(id.map(|id| id.0), expect)?;
        let switch = self.state.switches().find(|switch| switch.name.as_str() == spec.switch.as_str());
        let switch = switch.map(|switch| switch.id).ok_or_else(|| {
            let names = self.state.switches().map(|switch| switch.name.as_str());
            SwitchError::NoSwitch(Missing::among("switch", &spec.switch, names))
        })?;
        let group = PortGroup {
            id: id.unwrap_or_else(|| PortGroupId(Uuid::new_v4())),
            name: netpolicy::Name::new(name.as_str())?,
            switch,
            settings: spec.settings,
            port_overrides: spec.port_overrides,
        };
        let (id, created) = (group.id, meta.is_none());
        let mut trial = self.state.clone();
        let corrections = match trial.port_group(id) {
            Some(_) => trial.update_port_group(group.clone())?,
            None => {
                trial.add_port_group(group.clone())?;
                Vec::new()
            }
        };
        self.check_enforceable(&trial)?;
        let meta = meta.unwrap_or_else(|| Meta { created: Timestamp::now(), revision: 0 });
        let record = GroupRecord { created: meta.created, group };
        let revision = self.groups.put(id.0, name.as_str(), &record, revision(meta)).await?;
        self.meta.insert(id.0, Meta { revision, ..meta });
        self.adopt(trial, corrections, &by);
        self.put(ObjectKind::PortGroup, id.0, name.as_str(), created, Some(by));
        Ok(api::Put { object: self.view_group(id)?, created })
    }

    pub(super) async fn delete_group(
        &mut self,
        group: &ObjectRef,
        expect: Option<u64>,
        by: String,
    ) -> Result<(), SwitchError> {
        let found = self.state.port_groups().find(|found| group.means(found.id.0, found.name.as_str()));
        let (id, name) = found.map(|group| (group.id, group.name.to_string())).ok_or_else(|| {
            let names = self.state.port_groups().map(|group| group.name.as_str());
            SwitchError::NotFound(Missing::among("port group", group.text(), names))
        })?;
        self.expect(Some(id.0), expect)?;
        if id == DEFAULT_GROUP || name == DEFAULT {
            return Err(SwitchError::Permanent(Entity::PortGroup));
        }
        let mut trial = self.state.clone();
        trial.remove_port_group(id)?;
        self.groups.remove(id.0).await?;
        self.meta.remove(&id.0);
        self.adopt(trial, Vec::new(), &by);
        self.deleted(ObjectKind::PortGroup, id.0, &name, Some(by));
        Ok(())
    }

    pub(super) async fn put_port(
        &mut self,
        port: &ObjectRef,
        spec: PortSpec,
        expect: Option<u64>,
        by: String,
    ) -> Result<api::types::Port, SwitchError> {
        let id = self.find_port(port)?;
        let meta = self.expect(Some(id.0), expect)?;
        let mut trial = self.state.clone();
        let corrections = trial.update_port(id, spec.settings)?;
        self.check_enforceable(&trial)?;
        if let (Some(meta), Some(port)) = (meta, trial.port(id)) {
            let (name, record) = (port_name(port), PortRecord::of(port, meta.created));
            let revision = self.ports.put(id.0, &name, &record, revision(meta)).await?;
            self.meta.insert(id.0, Meta { revision, ..meta });
            self.put(ObjectKind::Port, id.0, &name, false, Some(by.clone()));
        }
        self.adopt(trial, vec![corrections], &by);
        self.view_port(id)
    }

    pub(super) fn find_port(&self, port: &ObjectRef) -> Result<PortId, SwitchError> {
        let found = self.state.ports().find(|found| port.means(found.id.0, &port_name(found)));
        found.map(|port| port.id).ok_or_else(|| {
            SwitchError::NotFound(Missing::among("port", port.text(), self.state.ports().map(port_name)))
        })
    }

    /// The data about an object, provided that `expect` is its revision or None.
    fn expect(&self, id: Option<Uuid>, expect: Option<u64>) -> Result<Option<Meta>, SwitchError> {
        let meta = id.and_then(|id| self.meta.get(&id)).copied();
        let actual = meta.map_or(0, |meta| meta.revision);
        match expect {
            Some(expected) if expected != actual => Err(SwitchError::Revision { expected, actual }),
            _ => Ok(meta),
        }
    }

    /// Checks that the PF of each bound port can enforce the port's new policy, if the edit changes that policy.
    /// The error has the first port in the order of names, and the number of the others.
    fn check_enforceable(&self, trial: &SwitchState) -> Result<(), SwitchError> {
        let mut refused = Vec::new();
        for port in trial.ports() {
            let Some(vf) = &port.vf else { continue };
            let Some(capabilities) = self.capabilities.get(&vf.pf) else { continue };
            let policy = trial.effective_policy(port.id)?;
            let old = self.state.effective_policy(port.id).ok();
            if old.as_ref() == Some(&policy) {
                continue;
            }
            if let Err(source) = capabilities.check(&policy) {
                // Earlier releases accepted any rate. An unchanged rate of that time must not block an edit of
                // another setting.
                if source.setting == Setting::Rate
                    && old.is_some_and(|old| old.rate.value == policy.rate.value)
                {
                    continue;
                }
                refused.push((port_name(port), vf.pf.clone(), source));
            }
        }
        let others = refused.len().saturating_sub(1);
        match refused.into_iter().min_by(|(one, ..), (other, ..)| one.cmp(other)) {
            None => Ok(()),
            Some((port, pf, source)) => Err(SwitchError::Unenforceable { port, pf, others, source }),
        }
    }

    /// Puts the new policy in force, and revokes changes that it no longer allows.
    fn adopt(&mut self, trial: SwitchState, corrections: Vec<Corrections>, by: &str) {
        self.state = trial;
        // Set the standing denial of all ports. The connection sends only those that have changed.
        let ports: Vec<PortId> = self.state.ports().map(|port| port.id).collect();
        for port in ports {
            self.tell_standing(port);
        }
        for corrections in corrections.into_iter().filter(|corrections| !corrections.list.is_empty()) {
            if let Some(port_queue) = self.port_queues.get_mut(&corrections.port) {
                port_queue.edited_by = Some(by.to_owned());
            }
            self.queue(corrections.port, Task::Correct);
        }
    }
}

/// The revision that the store must have before a write.
fn revision(meta: Meta) -> Expect {
    if meta.revision == 0 { Expect::Absent } else { Expect::Revision(meta.revision) }
}
