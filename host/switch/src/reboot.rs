// SPDX-License-Identifier: Apache-2.0

//! Reboots of guests: each port of the VM returns to its baseline.

use netpolicy::{Change, PortId, Request, Route, VmId};
use tokio::sync::oneshot;

use super::{
    actor::Actor,
    commit::Applied,
    made::name,
    port_queue::{Running, Task},
};

impl Actor {
    /// Queues the reboot of each port. `done` completes once the reboot is stored, or the store has failed.
    pub(super) fn rebooted(&mut self, vm: VmId, done: oneshot::Sender<()>) {
        let mut saved = Vec::new();
        for port in self.ports_of(vm) {
            if let Some(port_queue) = self.port_queues.get_mut(&port).filter(|port_queue| !port_queue.closing)
            {
                port_queue.rebooting = true;
                saved.extend(self.attachment(port).map(|attachment| self.journal.save(port, &attachment)));
                self.queue(port, Task::Reboot);
            }
        }
        tokio::spawn(async move {
            for saved in saved {
                // A database that fails must not make the vmm keep the event for ever.
                drop(saved.await);
            }
            let _ = done.send(());
        });
    }

    pub(super) fn begin_reboot(&mut self, id: PortId) {
        let Some(port) = self.state.port(id).filter(|port| port.vf.is_some()) else { return };
        let (has, initial) = (port.device.pf.clone(), port.initial_mac);
        let (Ok(all), Ok(baseline)) = (self.state.revocations_for_reboot(id), self.state.baseline(id)) else {
            return;
        };
        let messages: Vec<Change> =
            all.into_iter().filter(|c| c.route() == Route::Mailbox && *c != Change::Reset).collect();
        let settings: Vec<Change> = baseline
            .changes()
            .into_iter()
            .filter(|change| matches!(change, Change::SetMac(_)) || !has.changes().contains(change))
            .collect();
        // The device was reset. `messages` remove the state that the PF keeps across a reset.
        if let Err(error) = self.state.commit(id, &[Change::Reset]) {
            tracing::error!(port = %id, "Cannot record a reboot: {error}");
        }
        drop(self.state.note_answer(id, &Request::SetMac(initial), true));
        if let Err(error) = self.state.begin(id, &settings) {
            tracing::error!(port = %id, "Cannot begin a reboot: {error}");
            return self.reboot_over(id);
        }
        if let Some(port_queue) = self.port_queues.get_mut(&id) {
            port_queue.granted = None;
            port_queue.revert = None;
            port_queue.deferred.clear();
            port_queue.leftover.clone_from(&messages);
        }
        match self.tools(id) {
            Some(tools) => self.start(id, Running::other(), tools.reboot(settings, messages)),
            None => {
                drop(self.state.abort(id));
                self.reboot_over(id);
            }
        }
    }

    /// Notes that the reboot is over, so that the next agent does not repeat it. If the guest has rebooted again
    /// meanwhile, the mark stays.
    fn reboot_over(&mut self, port: PortId) {
        if let Some(port_queue) = self.port_queues.get_mut(&port) {
            port_queue.rebooting = port_queue.queue.iter().any(|work| matches!(work, Task::Reboot));
        }
        self.save(port);
    }

    pub(super) fn reboot_done(&mut self, port: PortId, made: Applied) {
        if let Err(error) = self.state.commit(port, &made.done) {
            drop(self.state.abort(port));
            tracing::error!(%port, "Cannot record a reboot: {error}");
        }
        for (change, why) in &made.failed {
            self.log.line(port, |suppressed| {
                tracing::warn!(%port, suppressed, "{} failed at a reboot: {why}", name(change));
            });
        }
        if let Some(port_queue) = self.port_queues.get_mut(&port) {
            port_queue.leftover.retain(|change| !made.done.contains(change));
            // No other changes are deferred: the reboot began by clearing that list.
            let _ = port_queue.defer(made.deferred);
            // The comparison retries the settings that the PF did not take; the rest is retried at the guest's reset.
            if !made.failed.is_empty() {
                port_queue.push(Task::Repair { all: false });
            }
        }
        self.time_deferral(port);
        self.reboot_over(port);
    }
}
