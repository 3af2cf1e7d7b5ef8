// SPDX-License-Identifier: Apache-2.0

//! Decides the requests of guests by the switch's own data. A request belongs to the VM of its connection.

use failpoints::{Point, reach};
use netpolicy::{
    Change, Committed, Decision, Denial, MacAddress, OnDenied, Outcome, PortId, Reason, Request, Route, VmId,
};
use passthrough::relay::{self, Cancelled, GuestRequest, How};
use protocol::AgentResponse;
use tokio::{sync::oneshot, time::Instant};

use super::{
    actor::Actor,
    commit::{RequestEnd, RequestOutcome},
    port_queue::{Granted, Revert, Running, Task},
    verdict_source::Evaluated,
};

impl Running {
    /// A job that no request caused.
    pub(super) fn other() -> Self {
        Self { seq: None, cancelled: None, forwarded: None }
    }
}

impl Actor {
    /// The port of a VM's adapter; None for a name that the VM does not have.
    pub(super) fn port_of(&self, vm: VmId, adapter: &str) -> Option<PortId> {
        // The lookup copies the name: do not copy a long one from a vmm.
        let found = (adapter.len() <= 64).then(|| self.adapters.get(&(vm, adapter.to_owned())).copied());
        found.flatten()
    }

    pub(super) fn request(&mut self, vm: VmId, adapter: String, id: u64, guest_request: GuestRequest) {
        let Some(port) = self.port_of(vm, &adapter) else {
            tracing::debug!(%vm, "A vmm sent a request for an adapter that its VM does not have");
            return;
        };
        if self.port_queues.get(&port).is_none_or(|port_queue| port_queue.closing) {
            return;
        }
        reach(Point::AskReceived);
        if let Some(port_queue) = self.port_queues.get_mut(&port) {
            port_queue.received = Some((guest_request.seq, Instant::now()));
        }
        // A reset has already happened: queue it like a request that needs changes, to keep the order. Do not grant
        // a no-op while work is queued: a rebooting guest may request the very address that the pending reboot
        // revokes.
        let settled = self
            .port_queues
            .get(&port)
            .is_none_or(|port_queue| port_queue.busy.is_none() && port_queue.queue.is_empty());
        if guest_request.request == Request::Reset || !self.respond_now(port, id, &guest_request, settled) {
            self.queue(port, Task::Request { id, guest_request });
        }
    }

    /// Denies the request, or grants it if it needs no change and the port is settled. Returns false if the request
    /// must wait.
    fn respond_now(&mut self, port: PortId, id: u64, guest_request: &GuestRequest, settled: bool) -> bool {
        match self.evaluate(port, &guest_request.request) {
            Evaluated::Unknown => true,
            Evaluated::Changes(changes) if changes.is_empty() && settled => {
                self.grant(port, id, guest_request);
                self.note_address(port, &guest_request.request);
                let decision = self.allowed(port, &guest_request.request, &[]);
                self.record(decision);
                true
            }
            Evaluated::Changes(_) => false,
            Evaluated::Denied(denial, on_denied) => {
                self.refuse(port, id, guest_request, denial, on_denied);
                true
            }
        }
    }

    fn evaluate(&self, port: PortId, request: &Request) -> Evaluated {
        self.verdict_source.evaluate(&self.state, port, request)
    }

    pub(super) fn begin_request(&mut self, port: PortId, id: u64, guest_request: GuestRequest) {
        if guest_request.request == Request::Reset {
            return self.reset(port, id, &guest_request);
        }
        // The policy may have changed while the request waited.
        let changes = match self.evaluate(port, &guest_request.request) {
            Evaluated::Changes(changes) if !changes.is_empty() => changes,
            _ => {
                self.respond_now(port, id, &guest_request, true);
                return;
            }
        };
        if let Err(error) = self.state.begin(port, &changes) {
            return self.not_committed(port, id, &guest_request, Some(id), &error.to_string());
        }
        reach(Point::AskEvaluated);
        let Some(tools) = self.tools(port) else {
            drop(self.state.abort(port));
            return self.not_committed(port, id, &guest_request, Some(id), "The port has no VF");
        };
        let (forwarded, heard) = oneshot::channel();
        let busy = Running { seq: Some(guest_request.seq), cancelled: None, forwarded: Some(forwarded) };
        let mac = self.effective(port);
        self.start(port, busy, tools.request(id, guest_request, changes, mac, heard));
    }

    /// Notes the guest's reset, which was carried out already.
    fn reset(&mut self, port: PortId, id: u64, guest_request: &GuestRequest) {
        match self.state.commit(port, &[Change::Reset]) {
            Ok(corrections) if !corrections.list.is_empty() => {
                if let Some(port_queue) = self.port_queues.get_mut(&port) {
                    port_queue.push(Task::Correct);
                }
            }
            Ok(_) => {}
            Err(error) => tracing::error!(%port, "Cannot record a reset: {error}"),
        }
        if let Some(port_queue) = self.port_queues.get_mut(&port) {
            port_queue.granted = None;
        }
        self.save(port);
        self.grant(port, id, guest_request);
    }

    /// Handles the completion of a request's job.
    pub(super) fn request_ended(&mut self, port: PortId, end: RequestEnd, cancelled: Option<Cancelled>) {
        let RequestEnd { id, guest_request, changes, forward, outcome } = end;
        let request = &guest_request.request;
        let (made, failure) = match outcome {
            RequestOutcome::Applied => (changes.clone(), None),
            RequestOutcome::RefusedByPf { made } => {
                (made, Some((None, "The PF refused the message".to_owned())))
            }
            RequestOutcome::Unanswered { made } => {
                // The PF may have carried out the message. Count additions as made, and removals as not made.
                let adds = |change: &&Change| adds(change) && !made.contains(change);
                let added: Vec<Change> = changes.iter().filter(adds).cloned().collect();
                let why = "The PF did not respond: it may have made the change".to_owned();
                ([made, added].concat(), Some((None, why)))
            }
            RequestOutcome::Withdrawn { made } => (made, Some((None, String::new()))),
            RequestOutcome::Failed { made, why } => (made, Some((Some(id), why))),
        };
        let old = self.effective(port);
        let guest = self.state.port(port).map_or(old, |port| port.guest_mac);
        let corrections = match self.state.commit(port, &made) {
            Ok(corrections) => corrections.list,
            Err(error) => {
                drop(self.state.abort(port));
                tracing::error!(%port, "Cannot record a change: {error}");
                Vec::new()
            }
        };
        reach(Point::AskCommitted);
        match (failure, cancelled) {
            (None, None) => {
                if forward {
                    self.decided(port, guest_request.seq, Outcome::Allowed);
                } else {
                    self.grant(port, id, &guest_request);
                    reach(Point::AskAnswered);
                }
                self.note_address(port, request);
                let mut decision = self.allowed(port, request, &changes);
                if let (Some(decision), Request::SetMac(_)) = (&mut decision, request) {
                    decision.old = Some(old.to_string());
                }
                self.record(decision);
                if let (Request::SetMac(_), Some(port_queue)) = (request, self.port_queues.get_mut(&port)) {
                    port_queue.granted =
                        Some(Granted { seq: Some(guest_request.seq), request: request.clone(), old, guest });
                }
            }
            (None, Some(why)) if matches!(request, Request::SetMac(_)) => {
                self.queue_revert(port, Revert { old, guest, why });
            }
            // The PF acknowledged the message before the cancellation, and the state has the change.
            (None, Some(_)) => {}
            // The event of the cancellation has been recorded already, where it needs a record.
            (Some(_), Some(_)) => {}
            (Some((answer, why)), None) => self.not_committed(port, id, &guest_request, answer, &why),
        }
        if let Some(port_queue) = self.port_queues.get_mut(&port)
            && !port_queue.queue.iter().any(|work| matches!(work, Task::Revert(_)))
        {
            // No rollback is queued, so the change of a cancelled request was not made.
            port_queue.revert = None;
        }
        reach(Point::AskRecorded);
        self.save(port);
        if !corrections.is_empty()
            && let Some(port_queue) = self.port_queues.get_mut(&port)
        {
            port_queue.push(Task::Correct);
        }
    }

    /// Queues a rollback before all other work of the port.
    pub(super) fn queue_revert(&mut self, port: PortId, revert: Revert) {
        if let Some(port_queue) = self.port_queues.get_mut(&port) {
            port_queue.revert = Some(revert);
            port_queue.granted = None;
            port_queue.queue.push_front(Task::Revert(revert));
        }
    }

    pub(super) fn begin_revert(&mut self, port: PortId, mut revert: Revert) {
        let from = self.effective(port);
        let change = |mac| [Change::SetMac(mac)];
        if self.state.begin(port, &change(revert.old)).is_err() {
            // Another port has taken the old address. The initial one is always reserved for its port.
            let Some(initial) = self.state.port(port).map(|port| port.initial_mac) else { return };
            revert.old = initial;
            if let Err(error) = self.state.begin(port, &change(initial)) {
                tracing::error!(%port, "Cannot roll back a late change: {error}");
                if let Some(port_queue) = self.port_queues.get_mut(&port) {
                    port_queue.revert = None;
                }
                return;
            }
        }
        match self.tools(port) {
            Some(tools) => self.start(port, Running::other(), tools.revert(revert, from)),
            None => drop(self.state.abort(port)),
        }
    }

    pub(super) fn reverted(
        &mut self,
        port: PortId,
        revert: &Revert,
        from: MacAddress,
        error: Option<String>,
    ) {
        let change = [Change::SetMac(revert.old)];
        let result =
            if error.is_none() { self.state.commit(port, &change).map(drop) } else { self.state.abort(port) };
        if let Err(error) = result {
            tracing::error!(%port, "Cannot record a change that was rolled back: {error}");
        }
        drop(self.state.note_answer(port, &Request::SetMac(revert.guest), true));
        if let Some(port_queue) = self.port_queues.get_mut(&port) {
            port_queue.revert = None;
        }
        let (reason, detail) = given_up(revert.why);
        let decision = self.decision(port, "set_mac", Outcome::Reverted).map(|decision| Decision {
            reason,
            old: Some(from.to_string()),
            requested: Some(revert.old.to_string()),
            committed: if error.is_some() { Committed::Failed } else { Committed::Pf },
            detail: Some(error.unwrap_or_else(|| detail.to_owned())),
            ..decision
        });
        self.record(decision);
        self.save(port);
    }

    // ---- responses ----

    /// Sends the relay of a port its standing denial, if its vmm is connected.
    pub(super) fn tell_standing(&self, id: PortId) {
        let Some(port) = self.state.port(id) else { return };
        let Some(link) = self.links.get(&port.vm.id).filter(|link| link.online) else { return };
        let refusal = self.verdict_source.standing_refusal(&self.state, id);
        link.vmm.set_standing_refusal(&port.adapter, refusal);
    }

    /// The decision about a change of the address that the relay denied by its standing denial.
    pub(super) fn declined(
        &self,
        port: PortId,
        mac: MacAddress,
        reason: Reason,
        silent: bool,
    ) -> Option<Decision> {
        let request = Request::SetMac(mac);
        let decision = self.decision(port, request.name(), Outcome::Denied)?;
        let denied_now = match self.evaluate(port, &request) {
            Evaluated::Denied(denial, _) if denial.reason == reason => Some(denial),
            _ => None,
        };
        let crossed = denied_now.is_none().then_some(CROSSED);
        let denial = denied_now.unwrap_or_else(|| Denial {
            reason,
            decided_by: None,
            old: Some(self.effective(port).to_string()),
            requested: mac.to_string(),
            detail: None,
        });
        Some(denied(decision, denial, crossed.into_iter().chain(silent.then_some(TOLD))))
    }

    pub(super) fn effective(&self, port: PortId) -> MacAddress {
        self.state.port(port).map_or(MacAddress::ZERO, netpolicy::Port::effective_mac)
    }

    /// Adds the time from a request to its verdict to the metrics.
    fn decided(&self, port: PortId, seq: u64, outcome: Outcome) {
        let received = self
            .port_queues
            .get(&port)
            .and_then(|port_queue| port_queue.received)
            .filter(|(of, _)| *of == seq);
        if let Some((_, at)) = received {
            self.metrics.decided(outcome, at.elapsed());
        }
    }

    fn respond(&self, port: PortId, id: u64, seq: u64, decision: relay::Decision) {
        let granted = matches!(decision, relay::Decision::Grant { .. });
        self.decided(port, seq, if granted { Outcome::Allowed } else { Outcome::Denied });
        let Some(port) = self.state.port(port) else { return };
        let Some(link) = self.links.get(&port.vm.id).filter(|link| link.online) else { return };
        let verdict = relay::Verdict { seq, effective_mac: port.effective_mac(), decision };
        let response = AgentResponse::Mailbox { adapter: port.adapter.clone(), verdict };
        link.vmm.respond(id, response);
    }

    fn grant(&self, port: PortId, id: u64, guest_request: &GuestRequest) {
        self.respond(port, id, guest_request.seq, relay::Decision::Grant { how: How::Local });
    }

    fn refuse(
        &mut self,
        port: PortId,
        id: u64,
        guest_request: &GuestRequest,
        denial: Denial,
        tell: OnDenied,
    ) {
        self.respond(port, id, guest_request.seq, relay::Decision::Refuse { tell, reason: denial.reason });
        // Store changes only: the guest may repeat the request without bound.
        let before = self.wanted(port);
        drop(self.state.note_refusal(port, &guest_request.request, denial.reason));
        if self.wanted(port) != before {
            self.save(port);
        }
        let told = (tell == OnDenied::Silent).then_some(TOLD);
        let decision = self.decision(port, guest_request.request.name(), Outcome::Denied);
        self.record(decision.map(|decision| denied(decision, denial, told)));
    }

    /// Records a request that was granted and not committed. With `answer`, the guest still waits for a response.
    fn not_committed(
        &mut self,
        port: PortId,
        id: u64,
        guest_request: &GuestRequest,
        answer: Option<u64>,
        why: &str,
    ) {
        if answer.is_some() {
            let reason = Reason::CommitFailed;
            self.respond(
                port,
                id,
                guest_request.seq,
                relay::Decision::Refuse { tell: OnDenied::Nack, reason },
            );
        } else if why.is_empty() {
            // The request was cancelled. The relay's event causes the record.
            return;
        }
        let decision =
            self.decision(port, guest_request.request.name(), Outcome::Denied).map(|decision| Decision {
                reason: Some(Reason::CommitFailed),
                requested: describe(&guest_request.request),
                committed: Committed::Failed,
                detail: Some(why.to_owned()),
                ..decision
            });
        self.record(decision);
    }

    fn note_address(&mut self, port: PortId, request: &Request) {
        let before = self.wanted(port);
        drop(self.state.note_answer(port, request, true));
        // Otherwise the next agent would add an address that the guest no longer wants.
        if self.wanted(port) != before {
            self.save(port);
        }
    }

    /// The number of addresses that a port waits for.
    fn wanted(&self, port: PortId) -> usize {
        self.state.port(port).map_or(0, |port| port.device.wanted_unicast.len())
    }

    fn allowed(&self, port: PortId, request: &Request, changes: &[Change]) -> Option<Decision> {
        let by = |route| changes.iter().any(|change| change.route() == route);
        let committed = match (by(Route::Pf), by(Route::Mailbox)) {
            (false, false) => Committed::Nothing,
            (true, false) => Committed::Pf,
            (false, true) => Committed::Mailbox,
            (true, true) => Committed::Both,
        };
        let decision = self.decision(port, request.name(), Outcome::Allowed)?;
        Some(Decision { requested: describe(request), committed, ..decision })
    }
}

/// The detail of a silent denial.
const TOLD: &str = "The response to the guest reports success";
/// The detail of a relay's denial by a policy that an edit has just replaced.
const CROSSED: &str = "Denied by the policy before its last change";

/// Fills in the decision of a denial. `more` adds to the denial's own detail.
fn denied(decision: Decision, denial: Denial, more: impl IntoIterator<Item = &'static str>) -> Decision {
    let Denial { reason, decided_by, old, requested, detail } = denial;
    let details: Vec<String> = detail.into_iter().chain(more.into_iter().map(str::to_owned)).collect();
    let detail = (!details.is_empty()).then(|| details.join(". "));
    Decision { reason: Some(reason), decided_by, old, requested: Some(requested), detail, ..decision }
}

/// The reason to roll back a granted address, for the record.
fn given_up(why: Cancelled) -> (Option<Reason>, &'static str) {
    match why {
        Cancelled::Deadline => {
            (Some(Reason::AuthorityUnreachable), "The guest's request was denied before the change was made")
        }
        Cancelled::GuestReset => (None, "The guest reset its VF before the response"),
        Cancelled::Withdrawn => (None, "The relay withdrew the request"),
        Cancelled::Stopped => (None, "The VM ended before the response"),
    }
}

/// Whether the change lets the adapter receive more frames.
pub(super) fn adds(change: &Change) -> bool {
    match change {
        Change::AddUnicast(_) | Change::JoinVlan(_) | Change::SetMaxFrame(_) => true,
        Change::SetMulticast(hashes) => !hashes.is_empty(),
        Change::SetPromiscuous(mode) => mode.multicast || mode.unicast,
        _ => false,
    }
}

/// The value in a request, for users.
pub(super) fn describe(request: &Request) -> Option<String> {
    match request {
        Request::SetMac(mac) | Request::AddUnicastFilter(mac) => Some(mac.to_string()),
        Request::SetMulticast { count, .. } => Some(format!("{count} hashes")),
        Request::SetVlan { vid, add } => Some(if *add { vid.to_string() } else { format!("leave {vid}") }),
        Request::SetMaxFrame(bytes) => Some(format!("{bytes} bytes")),
        Request::SetPromiscuous(mode) => Some(mode.to_string()),
        Request::Unknown { opcode } => Some(format!("opcode {opcode:#06x}")),
        Request::Reset | Request::ClearUnicastFilters => None,
    }
}
