// SPDX-License-Identifier: Apache-2.0

//! Loads the state at the agent's start, and adds the default switch.
//!
//! A host without definitions has the switch `default`, with every PF that no other switch has, and
//! its port group `default`, whose default policy denies all that guests may request. Both are
//! stored once they are edited.

use std::collections::{BTreeMap, BTreeSet};

use api::types::{PfState, PortCounters, Timestamp};
use netpolicy::{
    Change, Name, PfCapabilities, PortGroup, PortGroupId, PortId, Route, Settings, StateError, Switch,
    SwitchId, SwitchKind,
};
use sriov::VfSettings;
use store::{Expect, StoreError, Table};
use text::chain;
use uuid::Uuid;

use super::{
    actor::{Actor, Meta},
    command::KnownPf,
    error::SwitchError,
    guest_requests::adds,
    port_queue::{Granted, PortQueue, Running, Task},
    record::{Attachment, FirstStart},
};

/// The name of the default switch and of its port group.
pub(super) const DEFAULT: &str = "default";

/// Their ids, the same on every host and for ever.
pub(super) const DEFAULT_SWITCH: SwitchId =
    SwitchId(Uuid::from_u128(0x6465_6661_756c_4000_8000_7377_6974_6368));
pub(super) const DEFAULT_GROUP: PortGroupId =
    PortGroupId(Uuid::from_u128(0x6465_6661_756c_4000_8000_6772_6f75_7073));

pub(super) async fn load(
    actor: &mut Actor,
    attachments: Table<Attachment>,
    first_start: Table<FirstStart>,
    pfs: Vec<KnownPf>,
) -> Result<(), SwitchError> {
    let always = always_there_since(&first_start).await?;
    for entry in actor.switches.list().await? {
        actor.meta.insert(entry.id, Meta { created: entry.value.created, revision: entry.revision });
        actor.state.add_switch(entry.value.switch)?;
    }
    actor.ensure_default_switch(always)?;
    for entry in actor.groups.list().await? {
        actor.meta.insert(entry.id, Meta { created: entry.value.created, revision: entry.revision });
        actor.state.add_port_group(entry.value.group)?;
    }
    actor.ensure_default_group(always)?;
    // An unreadable attachment is an error, as with all other records. Without it, the port would
    // seem to have no VF, and the VF would go to the next tenant with all its leftovers.
    let attachments: BTreeMap<Uuid, Attachment> =
        attachments.list().await?.into_iter().map(|entry| (entry.id, entry.value)).collect();
    let ports = actor.ports.list().await?;
    // An agent died while it deleted these ports.
    for id in attachments.keys().filter(|id| !ports.iter().any(|port| port.id == **id)) {
        drop(actor.journal.forget(PortId(*id)));
    }
    let counted = actor.decisions.counters().await?;
    let mut bound = Vec::new();
    for entry in ports {
        let (id, attachment) = (PortId(entry.id), attachments.get(&entry.id));
        let meta = Meta { created: entry.value.created, revision: entry.revision };
        let port = entry.value.port(id, attachment);
        let (key, has_vf) = ((port.vm.id, port.adapter.clone()), port.vf.clone());
        // A PF with a bound VF of the default switch stays an uplink of that switch.
        if let Some(vf) = &has_vf {
            actor.adopt_uplink(port.group, &vf.pf);
        }
        if let Err(source) = actor.state.attach(port) {
            let error = SwitchError::Contradiction { port: entry.name, source };
            if has_vf.is_some() {
                // Without the port, the VF would go to the next tenant with its leftovers.
                return Err(error);
            }
            tracing::error!("{}", chain(&error));
            continue;
        }
        let port_queue = PortQueue {
            recovering: has_vf.is_some(),
            untold: has_vf.is_some(),
            rebooting: attachment.is_some_and(|attachment| has_vf.is_some() && attachment.rebooting),
            revert: attachment.filter(|_| has_vf.is_some()).and_then(|attachment| attachment.revert),
            counters: counters(attachment, counted.get(&id)),
            bdf: attachment.and_then(|attachment| attachment.bdf.clone()),
            ..PortQueue::default()
        };
        actor.meta.insert(entry.id, meta);
        actor.adapters.insert(key, id);
        actor.port_queues.insert(id, port_queue);
        bound.extend(has_vf.map(|_| id));
    }
    actor.know(pfs);
    for port in bound {
        actor.queue(port, Task::Recover);
    }
    Ok(())
}

/// The creation time of the default switch and group: the first start with this store.
async fn always_there_since(table: &Table<FirstStart>) -> Result<Timestamp, StoreError> {
    if let Some(entry) = table.list().await?.first() {
        return Ok(entry.value.at);
    }
    let now = FirstStart { at: Timestamp::now() };
    table.put(Uuid::nil(), "first_start", &now, Expect::Absent).await?;
    Ok(now.at)
}

/// The counters of a port. Each is the larger one of its own record and of the decisions' database,
/// which counts denials, too.
fn counters(attachment: Option<&Attachment>, counted: Option<&PortCounters>) -> PortCounters {
    let (saved, counted) = (attachment.map(|saved| saved.counters), counted.copied());
    let (saved, counted) = (saved.unwrap_or_default(), counted.unwrap_or_default());
    PortCounters {
        allowed: saved.allowed.max(counted.allowed),
        denied: saved.denied.max(counted.denied),
        taken_back: saved.taken_back.max(counted.taken_back),
        repaired: saved.repaired.max(counted.repaired),
    }
}

impl Actor {
    fn ensure_default_switch(&mut self, created: Timestamp) -> Result<(), StateError> {
        if self.state.switches().any(|switch| switch.name.as_str() == DEFAULT) {
            return Ok(());
        }
        let Ok(name) = Name::new(DEFAULT) else { return Ok(()) };
        self.meta.insert(DEFAULT_SWITCH.0, Meta { created, revision: 0 });
        self.state.add_switch(Switch {
            id: DEFAULT_SWITCH,
            name,
            kind: SwitchKind::Standard,
            uplinks: BTreeSet::new(),
            settings: Settings::default(),
        })
    }

    fn ensure_default_group(&mut self, created: Timestamp) -> Result<(), StateError> {
        if self.state.port_groups().any(|group| group.name.as_str() == DEFAULT) {
            return Ok(());
        }
        let switch = self.state.switches().find(|switch| switch.name.as_str() == DEFAULT);
        let (Ok(name), Some(switch)) = (Name::new(DEFAULT), switch.map(|switch| switch.id)) else {
            return Ok(());
        };
        self.meta.insert(DEFAULT_GROUP.0, Meta { created, revision: 0 });
        self.state.add_port_group(PortGroup {
            id: DEFAULT_GROUP,
            name,
            switch,
            settings: Settings::default(),
            port_overrides: BTreeSet::new(),
        })
    }

    /// Whether the default switch takes all PFs that no other switch has, because it was never
    /// edited.
    pub(super) fn default_is_implicit(&self) -> bool {
        self.meta.get(&DEFAULT_SWITCH.0).is_some_and(|meta| meta.revision == 0)
    }

    fn adopt_uplink(&mut self, group: PortGroupId, pf: &str) {
        let on_default = self.state.port_group(group).is_some_and(|group| group.switch == DEFAULT_SWITCH);
        if on_default && self.default_is_implicit() {
            self.pfs.insert(pf.to_owned());
            self.refresh_uplinks();
        }
    }

    /// Adopts the capabilities of a PF.
    pub(super) fn set_capabilities(&mut self, pf: String, capabilities: PfCapabilities) {
        self.state.set_reset_clears(&pf, capabilities.reset_clears);
        self.capabilities.insert(pf, capabilities);
    }

    /// Adopts the host's PFs as they are now.
    pub(super) fn know(&mut self, pfs: Vec<KnownPf>) {
        self.pfs = pfs.iter().map(|known| known.pf.name.clone()).collect();
        for known in pfs {
            if let Some(capabilities) = known.capabilities {
                self.set_capabilities(known.pf.name, capabilities);
            }
        }
        self.capabilities.retain(|name, _| self.pfs.contains(name));
        self.refresh_uplinks();
    }

    /// Adopts the host's PFs after a possible change, and publishes the differences.
    pub(super) fn pfs_known(&mut self, pfs: Vec<KnownPf>) {
        let before = self.pfs.clone();
        let are_up: Vec<(String, bool)> =
            pfs.iter().map(|known| (known.pf.name.clone(), known.pf.up)).collect();
        self.know(pfs);
        // Publish only present names of interfaces: ports may still have a former name of a PF.
        for (name, up) in are_up.iter().filter(|(name, _)| before.contains(name)) {
            self.pf_is(name, *up);
        }
        for pf in before.difference(&self.pfs) {
            self.tell_pf(pf, PfState::Removed);
        }
        for pf in self.pfs.difference(&before) {
            self.tell_pf(pf, PfState::Added);
        }
    }

    /// Gives the default switch, while it is implicit, all PFs that no other switch has.
    pub(super) fn refresh_uplinks(&mut self) {
        if !self.default_is_implicit() {
            return;
        }
        let Some(mut switch) = self.state.switch(DEFAULT_SWITCH).cloned() else { return };
        let others = self.state.switches().filter(|switch| switch.id != DEFAULT_SWITCH);
        let taken: BTreeSet<&String> = others.flat_map(|switch| &switch.uplinks).collect();
        // A PF with bound ports stays an uplink, even while it is missing.
        let used = self.state.ports().filter_map(|port| port.vf.as_ref()).map(|vf| &vf.pf);
        let used = used.filter(|pf| switch.uplinks.contains(*pf));
        let all = self.pfs.iter().chain(used).filter(|pf| !taken.contains(pf)).cloned().collect();
        if switch.uplinks != all {
            switch.uplinks = all;
            if let Err(error) = self.state.update_switch(switch) {
                tracing::error!("Cannot update the uplinks of the default switch: {error}");
            }
        }
    }

    // ---- changes that were under way ----

    pub(super) fn begin_recover(&mut self, port: PortId) {
        if let Some(tools) = self.tools(port) {
            self.start(port, Running::other(), tools.recover());
        }
    }

    /// Completes changes that were under way when the former agent ended. A pending address that
    /// the PF shows was set; it stays unless the vmm reports that its guest got no response. The
    /// results of mailbox messages are unknown: additions count as made, removals do not.
    pub(super) fn recovered(&mut self, id: PortId, shown: Option<VfSettings>) {
        let Some(port) = self.state.port(id) else { return };
        let given_up = self.port_queues.get_mut(&id).and_then(|port_queue| {
            port_queue.recovering = false;
            port_queue.given_up.take()
        });
        let revert = self.port_queues.get(&id).and_then(|port_queue| port_queue.revert);
        let (old, guest, pending) = (port.effective_mac(), port.guest_mac, port.pending.clone());
        let mut made = Vec::new();
        for change in pending {
            match &change {
                Change::SetMac(mac) if shown.as_ref().is_some_and(|shown| shown.mac == Some(*mac)) => {
                    if let Some(port_queue) = self.port_queues.get_mut(&id) {
                        let request = netpolicy::Request::SetMac(*mac);
                        port_queue.granted = Some(Granted { seq: None, request, old, guest });
                    }
                    made.push(change);
                }
                _ if change.route() == Route::Mailbox && adds(&change) => made.push(change),
                _ => {}
            }
        }
        if let Err(error) = self.state.commit(id, &made).map(drop) {
            tracing::error!(port = %id, "Cannot record the changes that were under way: {}", chain(&error));
        }
        match (revert, given_up) {
            // The address was set. Perhaps it was also rolled back, without a record.
            (Some(revert), _) if [old, self.effective(id)].iter().any(|mac| *mac != revert.old) => {
                self.queue_revert(id, revert);
            }
            // The address was not set.
            (Some(_), _) => {
                if let Some(port_queue) = self.port_queues.get_mut(&id) {
                    port_queue.revert = None;
                }
            }
            (None, Some((request, why))) => self.revert_granted(id, None, &request, why),
            (None, None) => {}
        }
        self.save(id);
        // The reboot goes first: the comparison would otherwise restore settings that the guest no
        // longer has.
        if self.port_queues.get(&id).is_some_and(|port_queue| port_queue.rebooting) {
            self.queue(id, Task::Reboot);
        }
        self.queue(id, Task::Correct);
        self.queue(id, Task::Repair { all: false });
    }
}
