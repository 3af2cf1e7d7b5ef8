// SPDX-License-Identifier: Apache-2.0

//! Events that relays report on their own.

use netpolicy::{Decision, Outcome, PortId, Reason, Request, VmId, Weight};
use passthrough::relay::{Cancelled, RelayEvent};
use tokio::sync::oneshot;

use super::{
    actor::Actor,
    guest_requests::describe,
    port_queue::{Revert, Task},
};

impl Actor {
    pub(super) fn relay_event(
        &mut self,
        vm: VmId,
        adapter: String,
        event: RelayEvent,
        done: oneshot::Sender<()>,
    ) {
        let Some(port) = self.port_of(vm, &adapter) else {
            tracing::debug!(%vm, "A vmm sent an event of an adapter that its VM does not have");
            let _ = done.send(());
            return;
        };
        let mut saved = None;
        let mut recorded = match event {
            RelayEvent::Cancelled { seq, request, why } => {
                let recorded = self.cancelled(port, seq, request, why);
                // Save this before the vmm forgets the event. Otherwise the next agent would
                // believe that the guest has the address.
                let reverts =
                    self.port_queues.get(&port).is_some_and(|port_queue| port_queue.revert.is_some());
                saved = self.attachment(port).filter(|_| reverts);
                recorded
            }
            RelayEvent::Forwarded { seq, outcome } => {
                let busy = self.port_queues.get_mut(&port).and_then(|port_queue| port_queue.busy.as_mut());
                let job = busy.filter(|busy| busy.seq == Some(seq)).and_then(|busy| busy.forwarded.take());
                // A request of a former agent has no job: its changes counted as made when this
                // agent started.
                if let Some(job) = job {
                    let _ = job.send(outcome);
                }
                None
            }
            RelayEvent::Refused { request, word, reason, count } => {
                self.refused(port, request, word, reason, count)
            }
            RelayEvent::Declined { mac, reason, silent } => self.declined(port, mac, reason, silent),
            RelayEvent::GuestMac { mac } => {
                drop(self.state.note_answer(port, &Request::SetMac(mac), true));
                self.save(port);
                None
            }
            RelayEvent::PfReset => {
                self.queue(port, Task::Repair { all: true });
                None
            }
            RelayEvent::Revoked { failed, deferred: false, .. } => {
                self.deferred_done(port, &failed);
                None
            }
            // This event completes a command. The command's completion reports its result.
            RelayEvent::Revoked { .. } => None,
        };
        let saved = saved.map(|attachment| self.journal.save(port, &attachment));
        // A guest can cause such records at will, so they share transactions and nothing waits for
        // the disk. An agent that crashes in between loses the last ones, as it does for answered
        // requests.
        if recorded.as_ref().is_some_and(|decision| decision.weight() == Weight::Light) {
            self.record(recorded.take());
        }
        if let Some(decision) = &recorded {
            self.count(decision);
            self.metrics.decision(decision);
        }
        if recorded.is_none() && saved.is_none() {
            let _ = done.send(());
            return;
        }
        let log = self.decisions.clone();
        tokio::spawn(async move {
            // A failing database must not make the vmm keep events for ever. The log has the line.
            if let Some(saved) = saved {
                drop(saved.await);
            }
            if let Some(decision) = recorded {
                drop(log.record(decision).await);
            }
            let _ = done.send(());
        });
    }

    /// A relay cancelled a request.
    fn cancelled(&mut self, port: PortId, seq: u64, request: Request, why: Cancelled) -> Option<Decision> {
        let now = self.state.port(port).map(|port| (port.effective_mac(), port.guest_mac));
        if let Some(port_queue) = self.port_queues.get_mut(&port)
            && !port_queue.withdraw(seq)
        {
            match &mut port_queue.busy {
                Some(busy) if busy.seq == Some(seq) => {
                    busy.cancelled = Some(why);
                    // The message is not sent, so no event about it will come.
                    busy.forwarded = None;
                    if let (Request::SetMac(_), Some((old, guest))) = (&request, now) {
                        port_queue.revert = Some(Revert { old, guest, why });
                    }
                }
                _ if port_queue.recovering => port_queue.given_up = Some((request.clone(), why)),
                _ => self.revert_granted(port, Some(seq), &request, why),
            }
        }
        if why != Cancelled::Deadline {
            return None;
        }
        let decision = self.decision(port, request.name(), Outcome::Denied)?;
        Some(Decision {
            reason: Some(Reason::AuthorityUnreachable),
            requested: describe(&request),
            old: matches!(request, Request::SetMac(_)).then(|| self.effective(port).to_string()),
            detail: Some("The agent did not respond in time".into()),
            ..decision
        })
    }

    /// Rolls back an address that was granted to a cancelled request.
    pub(super) fn revert_granted(
        &mut self,
        port: PortId,
        seq: Option<u64>,
        request: &Request,
        why: Cancelled,
    ) {
        let Some(port_queue) = self.port_queues.get_mut(&port) else { return };
        let same = |granted: &super::port_queue::Granted| {
            (granted.seq.is_none() || granted.seq == seq) && granted.request == *request
        };
        let Some(granted) = port_queue.granted.take_if(|granted| same(granted)) else { return };
        self.queue_revert(port, Revert { old: granted.old, guest: granted.guest, why });
        self.go_on(port);
    }

    fn refused(
        &mut self,
        port: PortId,
        request: Option<Request>,
        word: u32,
        reason: Reason,
        count: u64,
    ) -> Option<Decision> {
        let name = request.as_ref().map_or("unknown", Request::name);
        let decision = self.decision(port, name, Outcome::Denied)?;
        let asked = request.as_ref().and_then(describe);
        Some(Decision {
            reason: Some(reason),
            requested: asked.or_else(|| Some(format!("message {word:#010x}"))),
            // A taken-over vmm may report any count.
            count: count.clamp(1, 1_000_000),
            detail: Some("Rejected by the VM's relay".into()),
            ..decision
        })
    }
}
