// SPDX-License-Identifier: Apache-2.0

//! Brings PF and guest back to the policy: corrections after an edit, and of drift.

use api::types::{ObjectKind, PfState, Timestamp, Unchecked};
use netpolicy::{Change, Correction, Corrections, Outcome, PortId, Route, clipped};
use sriov::Hint;
use text::printable;
use tokio::time::Instant;
use tracing::Span;

use super::{
    UncheckedPorts,
    actor::Actor,
    command::Command,
    commit::{Applied, Drift},
    known,
    made::{MadeChange, committed, name},
    port_queue::{Deferral, PortQueue, Running, Task},
    record::port_name,
};

/// The most characters of the reason why a port cannot be compared: some reasons come from the process of a
/// simulated PF.
const DETAIL: usize = 500;

impl Actor {
    // ---- corrections ----

    pub(super) fn begin_correct(&mut self, port: PortId) {
        let Some(corrections) = self.verdict_source.corrections(&self.state, port) else { return };
        let leftover =
            self.port_queues.get(&port).map(|port_queue| port_queue.leftover.clone()).unwrap_or_default();
        if corrections.list.is_empty() && leftover.is_empty() {
            if let Some(port_queue) = self.port_queues.get_mut(&port) {
                port_queue.owed = false;
                port_queue.unmade.clear();
                port_queue.edited_by = None;
            }
            return self.time_deferral(port);
        }
        if let Err(error) = self.state.begin(port, &corrections.changes()) {
            tracing::error!(%port, "Cannot begin corrections: {error}");
            return self.owe(port);
        }
        match self.tools(port) {
            Some(tools) => self.start(port, Running::other(), tools.correct(corrections, leftover)),
            None => drop(self.state.abort(port)),
        }
    }

    pub(super) fn corrected(
        &mut self,
        port: PortId,
        corrections: &Corrections,
        leftover: &[Change],
        made: Applied,
    ) {
        if let Err(error) = self.state.commit(port, &made.done) {
            drop(self.state.abort(port));
            tracing::error!(%port, "Cannot record corrections: {error}");
        }
        for (change, _) in made.failed.iter().filter(|_| !made.offline) {
            if let Change::AddUnicast(mac) = change {
                drop(self.state.forget_wanted(port, *mac));
            }
        }
        for correction in &corrections.list {
            let failed = made.failed.iter().find(|(change, _)| *change == correction.change);
            if made.done.contains(&correction.change) || failed.is_some() {
                self.record_correction(port, correction, failed.map(|(_, why)| why.clone()));
            }
        }
        let must = |change: &Change| {
            leftover.contains(change)
                || corrections
                    .list
                    .iter()
                    .any(|correction| correction.revokes && correction.change == *change)
        };
        let unconfirmed =
            made.failed.iter().find(|(change, _)| must(change) && change.route() == Route::Mailbox);
        if let (Some((change, why)), false) = (unconfirmed, made.offline) {
            let why = format!("{} could not be revoked: {why}", name(change));
            self.stop(port, &why);
        }
        let unmade = !made.failed.is_empty();
        // Changes that revoke nothing may wait until the vmm reconnects: the switch corrects the port then.
        let can_wait = made.offline && !made.failed.iter().any(|(change, _)| must(change));
        let (mut credible, mut is_news) = (true, false);
        if let Some(port_queue) = self.port_queues.get_mut(&port) {
            port_queue.owed = unmade;
            is_news = port_queue.note_unmade(&made.failed);
            port_queue.leftover.retain(|change| !made.done.contains(change));
            if !unmade && made.deferred.is_empty() {
                port_queue.edited_by = None;
            }
            if !made.deferred.is_empty() && port_queue.deferred.is_empty() {
                self.log.line(port, |suppressed| {
                    tracing::info!(%port, suppressed, "Changes wait for the guest to reset its VF");
                });
            }
            credible = port_queue.defer(made.deferred);
        }
        if !credible {
            self.stop(port, "Its process reports more deferred changes than its relay allows");
        }
        self.time_deferral(port);
        self.save(port);
        if is_news && let Some(of) = self.state.port(port) {
            self.put(ObjectKind::Port, port.0, &port_name(of), false, None);
        }
        if unmade && !can_wait {
            self.owe(port);
        }
    }

    /// Notes that a correction is pending. After `timing.confirm` the switch tries it again, or stops the VM if its
    /// vmm has disconnected.
    fn owe(&mut self, port: PortId) {
        if let Some(port_queue) = self.port_queues.get_mut(&port) {
            port_queue.owed = true;
        }
        let (own, wait) = (self.own.clone(), self.timing.confirm);
        tokio::spawn(async move {
            tokio::time::sleep(wait).await;
            if let Some(own) = own.upgrade() {
                drop(own.send((Span::none(), Command::Overdue { port })).await);
            }
        });
    }

    pub(super) fn overdue(&mut self, port: PortId) {
        if !self.port_queues.get(&port).is_some_and(|port_queue| port_queue.owed && !port_queue.closing) {
            return;
        }
        let vm = self.state.port(port).map(|port| port.vm.id);
        match vm.and_then(|vm| self.links.get(&vm)) {
            Some(link) if !link.online => {
                let why = "A right must be revoked, and the VM's process is not connected";
                self.stop(port, why);
            }
            Some(_) => self.queue(port, Task::Correct),
            // A VM of a former agent: its correction waits for the connection, or for the end of its process.
            None => {}
        }
    }

    fn stop(&self, port: PortId, why: &str) {
        let Some(port) = self.state.port(port) else { return };
        tracing::error!(vm = %port.vm.name, adapter = port.adapter, "The VM is stopped: {why}");
        if let Some(link) = self.links.get(&port.vm.id) {
            link.vmm.stop(why);
        }
    }

    /// The relay has made the changes that waited for the guest's reset, except for the `failed` ones.
    pub(super) fn deferred_done(&mut self, port: PortId, failed: &[Change]) {
        let Some(port_queue) = self.port_queues.get_mut(&port) else { return };
        let Some(sent) = port_queue.deferred.pop_front() else { return };
        // Only changes that were commanded count, because the vmm may lie.
        let (failed, done) = sent.into_iter().partition(|change| failed.contains(change));
        self.queue(port, Task::Confirmed { done, failed });
    }

    fn corrections(&self, port: PortId) -> Vec<Correction> {
        let corrections = self.verdict_source.corrections(&self.state, port);
        corrections.map(|corrections| corrections.list).unwrap_or_default()
    }

    pub(super) fn confirmed(&mut self, port: PortId, done: &[Change], failed: &[Change]) {
        let wanted = self.corrections(port);
        if let Err(error) = self.state.commit(port, done) {
            tracing::error!(%port, "Cannot record the revoked rights: {error}");
        }
        for correction in wanted.iter().filter(|correction| done.contains(&correction.change)) {
            self.record_correction(port, correction, None);
        }
        if let Some(port_queue) = self.port_queues.get_mut(&port) {
            port_queue.leftover.retain(|change| !done.contains(change));
            if !failed.is_empty() {
                // The PF takes messages now: correct again before the response to the guest's reset, and with trust if
                // it is needed.
                port_queue.queue.push_front(Task::Correct);
            } else if port_queue.deferred.is_empty() {
                port_queue.edited_by = None;
            }
        }
        self.time_deferral(port);
        self.save(port);
    }

    /// Starts or ends the time limit of the vmm's deferred revocations, if there is one.
    pub(super) fn time_deferral(&mut self, port: PortId) {
        let Some(limit) = self.timing.deferred else { return };
        let revokes = self
            .corrections(port)
            .iter()
            .any(|correction| correction.revokes && correction.change.route() == Route::Mailbox);
        let Some(port_queue) = self.port_queues.get_mut(&port) else { return };
        if !revokes && port_queue.deferred.is_empty() && port_queue.leftover.is_empty() {
            port_queue.revoking_since = None;
            return;
        }
        if port_queue.deferred.is_empty() || port_queue.revoking_since.is_some() {
            return;
        }
        let (own, since) = (self.own.clone(), Instant::now());
        let timer = tokio::spawn(async move {
            tokio::time::sleep(limit).await;
            if let Some(own) = own.upgrade() {
                drop(own.send((Span::none(), Command::DeferredTooLong { port, since })).await);
            }
        });
        port_queue.revoking_since = Some(Deferral { since, timer: timer.abort_handle() });
    }

    pub(super) fn deferred_too_long(&mut self, port: PortId, since: Instant) {
        let waits = |port_queue: &PortQueue| {
            let deferral = port_queue.revoking_since.as_ref();
            !port_queue.closing && deferral.is_some_and(|deferral| deferral.since == since)
        };
        if self.port_queues.get(&port).is_some_and(waits) {
            let limit = self.timing.deferred.unwrap_or_default();
            self.stop(
                port,
                &format!("Rights were not revoked within {limit:?}: its guest has not reset the VF"),
            );
        }
    }

    // ---- drift ----

    pub(super) fn on_hint(&mut self, hint: Hint) {
        match hint {
            Hint::Changed { name: Some(name), up, .. } if self.pfs.contains(&name) => {
                self.pf_is(&name, up);
            }
            Hint::Changed { name: Some(_), .. } if self.pfs.is_empty() => {}
            _ => {
                // The hint may mean a PF that is new, gone, or has another name.
                let (pf, own) = (self.pf.clone(), self.own.clone());
                tokio::spawn(async move {
                    if let (Ok(pfs), Some(own)) = (known(&pf).await, own.upgrade()) {
                        drop(own.send((Span::none(), Command::PfsKnown { pfs })).await);
                    }
                });
            }
        }
        self.compare_at = self.compare_at.or(Instant::now().checked_add(self.timing.gather));
    }

    /// Notes whether the interface of a PF is up.
    pub(super) fn pf_is(&mut self, name: &str, up: bool) {
        if up && self.down.remove(name) {
            self.tell_pf(name, PfState::Up);
            // The PF's driver has started again, without the settings that it does not remember.
            let of = |port: &&netpolicy::Port| port.vf.as_ref().is_some_and(|vf| vf.pf == name);
            let ports: Vec<PortId> = self.state.ports().filter(of).map(|port| port.id).collect();
            for port in ports {
                self.queue(port, Task::Repair { all: true });
            }
        } else if !up && self.down.insert(name.to_owned()) {
            self.tell_pf(name, PfState::Down);
        }
    }

    /// Queues a comparison of every port with its PF, behind the other work for that port.
    pub(super) fn compare_all(&mut self) {
        self.compare_at = None;
        let bound: Vec<PortId> =
            self.state.ports().filter(|port| port.vf.is_some()).map(|port| port.id).collect();
        for port in bound {
            if self.port_queues.get(&port).is_some_and(|port_queue| !port_queue.closing) {
                self.queue(port, Task::Repair { all: false });
            }
        }
    }

    pub(super) fn begin_repair(&mut self, port: PortId, all: bool) {
        if self
            .port_queues
            .get(&port)
            .is_none_or(|port_queue: &PortQueue| port_queue.closing || port_queue.binding)
        {
            return;
        }
        let (Ok(expected), Some(tools)) = (self.state.expected(port), self.tools(port)) else { return };
        self.start(port, Running::other(), tools.repair(expected.changes(), all));
    }

    /// Notes the result of a port's comparison with its PF. Logs and publishes it only if it has changed.
    pub(super) fn compared(&mut self, id: PortId, error: Option<&String>) {
        let Some(port_queue) = self.port_queues.get_mut(&id) else { return };
        let before = port_queue.unchecked.take();
        port_queue.unchecked = error.map(|why| Unchecked {
            since: before.as_ref().map_or_else(Timestamp::now, |unchecked| unchecked.since),
            detail: printable(&clipped(why, DETAIL)),
        });
        if before == port_queue.unchecked {
            return;
        }
        let is_news = before.is_some() != port_queue.unchecked.is_some();
        self.publish_unchecked();
        if !is_news {
            return;
        }
        let Some(port) = self.state.port(id) else { return };
        match error {
            Some(why) => tracing::warn!(port = %id, "The port cannot be compared with its PF: {why}"),
            None => tracing::info!(port = %id, "The port can be compared with its PF again"),
        }
        self.put(ObjectKind::Port, id.0, &port_name(port), false, None);
    }

    /// Shows the ports that cannot be compared, in metrics and in the status of their VMs.
    pub(super) fn publish_unchecked(&self) {
        let of = |port: &netpolicy::Port| {
            let unchecked = self.port_queues.get(&port.id)?.unchecked.clone()?;
            Some(((port.vm.id, port.adapter.clone()), unchecked))
        };
        let ports: UncheckedPorts = self.state.ports().filter_map(of).collect();
        self.metrics.unchecked(ports.len());
        self.unchecked.send_replace(ports);
    }

    pub(super) fn repaired(&mut self, port: PortId, found: Vec<Drift>) {
        let mut made = Vec::new();
        for Drift { wanted, old, error } in found {
            let committed = committed(&wanted, error.is_some());
            self.metrics.repaired(name(&wanted), error.is_none());
            if error.is_none() {
                made.push(wanted.clone());
            }
            let repaired =
                MadeChange { change: &wanted, decided_by: None, old: Some(old), committed, detail: error };
            self.record_made(port, Outcome::Repaired, None, repaired);
        }
        if made.is_empty() {
            return;
        }
        if let Err(error) = self.state.commit(port, &made) {
            tracing::error!(%port, "Cannot record a correction of drift: {error}");
        }
        self.save(port);
    }
}
