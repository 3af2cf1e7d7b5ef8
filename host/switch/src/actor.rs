// SPDX-License-Identifier: Apache-2.0

//! The switch's task: its state, its loop, and the progress of port queues.

use std::{
    collections::{BTreeSet, HashMap},
    future::Future,
    sync::Arc,
};

use api::types::{EventKind, ObjectKind, PfState, Subject, Timestamp};
use futures_util::stream::{FuturesUnordered, StreamExt};
use netpolicy::{Decision, MacAddress, Outcome, PfCapabilities, PortId, SwitchId, SwitchState, VmId};
use services::{
    decisions::{DecisionLog, events::EventHub},
    line_rate::PortLog,
    metrics::Metrics,
    pf::PfHandle,
};
use sriov::Hint;
use store::{BoxFuture, Table};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, MissedTickBehavior, interval, sleep_until},
};
use tracing::{Instrument as _, Span};
use uuid::Uuid;

use super::{
    Parts, Timing, UncheckedPorts,
    command::{Command, KnownPf},
    commit::{CommitContext, End},
    error::SwitchError,
    intake::LinkId,
    journal::Journal,
    port_queue::{PortQueue, Running, Task},
    record::{Attachment, GroupRecord, PortRecord, SwitchRecord},
    startup,
    verdict_source::VerdictSource,
    vmm_client::Vmm,
};

/// The data that the API shows of every object.
#[derive(Clone, Copy, Debug)]
pub(super) struct Meta {
    pub(super) created: Timestamp,
    pub(super) revision: u64,
}

/// The connection to a VM's process.
pub(super) struct Link {
    pub(super) id: LinkId,
    pub(super) vmm: Arc<dyn Vmm>,
    pub(super) online: bool,
}

/// A port's job.
type Job = BoxFuture<'static, (PortId, End)>;

/// The state that the task owns.
pub(super) struct Actor {
    pub(super) state: SwitchState,
    pub(super) meta: HashMap<Uuid, Meta>,
    pub(super) port_queues: HashMap<PortId, PortQueue>,
    /// One entry for each port of `state`.
    pub(super) adapters: HashMap<(VmId, String), PortId>,
    pub(super) links: HashMap<VmId, Link>,
    /// The host's PFs.
    pub(super) pfs: BTreeSet<String>,
    pub(super) capabilities: HashMap<String, PfCapabilities>,
    /// PFs with an interface that is down.
    pub(super) down: BTreeSet<String>,
    pub(super) switches: Table<SwitchRecord>,
    pub(super) groups: Table<GroupRecord>,
    pub(super) ports: Table<PortRecord>,
    pub(super) journal: Journal,
    pub(super) pf: PfHandle,
    pub(super) decisions: DecisionLog,
    pub(super) events: EventHub,
    pub(super) timing: Timing,
    pub(super) metrics: Metrics,
    pub(super) log: PortLog,
    pub(super) verdict_source: VerdictSource,
    /// The ports that cannot be compared with their PF.
    pub(super) unchecked: watch::Sender<UncheckedPorts>,
    /// New jobs for the loop, at most one for each port.
    jobs: mpsc::UnboundedSender<Job>,
    /// A sender to the task itself.
    pub(super) own: mpsc::WeakSender<(Span, Command)>,
    /// The time at which a hint makes the task compare all ports with the PFs.
    pub(super) compare_at: Option<Instant>,
    /// Addresses that other ports wait for, with the times at which their ports gave them up.
    freed: HashMap<(SwitchId, MacAddress), Instant>,
    /// The time at which the first address of `freed` is offered.
    offer_at: Option<Instant>,
    #[cfg(test)]
    settling: Vec<tokio::sync::oneshot::Sender<()>>,
}

pub(super) async fn start(
    parts: Parts,
    pfs: Vec<KnownPf>,
    inbox: mpsc::Receiver<(Span, Command)>,
    own: mpsc::WeakSender<(Span, Command)>,
    unchecked: watch::Sender<UncheckedPorts>,
) -> Result<(), SwitchError> {
    let Parts { store, pf, decisions, events, hints, timing, metrics, verdict_source } = parts;
    let (jobs, new_jobs) = mpsc::unbounded_channel();
    let log = PortLog::default();
    let mut actor = Actor {
        state: SwitchState::new(),
        meta: HashMap::new(),
        port_queues: HashMap::new(),
        adapters: HashMap::new(),
        links: HashMap::new(),
        pfs: BTreeSet::new(),
        capabilities: HashMap::new(),
        down: BTreeSet::new(),
        switches: Table::new(&store),
        groups: Table::new(&store),
        ports: Table::new(&store),
        journal: Journal::new(Table::new(&store), log.clone()),
        pf,
        decisions,
        events,
        timing,
        metrics,
        log,
        verdict_source,
        unchecked,
        jobs,
        own,
        compare_at: None,
        freed: HashMap::new(),
        offer_at: None,
        #[cfg(test)]
        settling: Vec::new(),
    };
    startup::load(&mut actor, Table::new(&store), Table::new(&store), pfs).await?;
    tokio::spawn(run(actor, inbox, new_jobs, hints));
    Ok(())
}

async fn run(
    mut actor: Actor,
    mut inbox: mpsc::Receiver<(Span, Command)>,
    mut new_jobs: mpsc::UnboundedReceiver<Job>,
    mut hints: Option<mpsc::Receiver<Hint>>,
) {
    // The loop polls the jobs itself: a task for each would cost further wake-ups.
    let mut jobs = FuturesUnordered::new();
    let mut compare = interval(actor.timing.compare);
    compare.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        while let Ok(job) = new_jobs.try_recv() {
            jobs.push(job);
        }
        let (hinted, offered) = (actor.compare_at, actor.offer_at);
        tokio::select! {
            command = inbox.recv() => match command {
                // Log lines of the command belong to the span of its API request, if there is one.
                Some((span, command)) => {
                    let ended = beside(actor.obey(command).instrument(span), &mut jobs, &mut new_jobs).await;
                    for (port, end) in ended {
                        actor.on_end(port, end);
                    }
                }
                None => return,
            },
            Some((port, end)) = jobs.next() => actor.on_end(port, end),
            hint = next(&mut hints) => match hint {
                Some(hint) => actor.on_hint(hint),
                None => {
                    tracing::warn!("Interface events ended: only the periodic comparison finds changes");
                    hints = None;
                }
            },
            _ = compare.tick() => actor.compare_all(),
            () = at(hinted) => actor.compare_all(),
            () = at(offered) => actor.offer_freed(),
        }
        actor.note_freed();
        #[cfg(test)]
        actor.say_settled();
    }
}

/// Carries out a command, which may wait for the store. Polls the jobs meanwhile, because they have deadlines.
/// Returns the results of the jobs that ended.
async fn beside(
    command: impl Future<Output = ()>,
    jobs: &mut FuturesUnordered<Job>,
    new_jobs: &mut mpsc::UnboundedReceiver<Job>,
) -> Vec<(PortId, End)> {
    let mut command = std::pin::pin!(command);
    let mut ended = Vec::new();
    loop {
        tokio::select! {
            () = &mut command => return ended,
            Some(end) = jobs.next() => ended.push(end),
            Some(job) = new_jobs.recv() => jobs.push(job),
        }
    }
}

async fn next(hints: &mut Option<mpsc::Receiver<Hint>>) -> Option<Hint> {
    match hints {
        Some(hints) => hints.recv().await,
        None => std::future::pending().await,
    }
}

async fn at(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

impl Actor {
    async fn obey(&mut self, command: Command) {
        // If the client has gone away, only the response is lost.
        match command {
            Command::ListSwitches { reply } => drop(reply.send(self.view_switches())),
            Command::PutSwitch { name, spec, expect, by, reply } => {
                drop(reply.send(self.put_switch(name, spec, expect, by).await));
            }
            Command::DeleteSwitch { switch, expect, by, reply } => {
                drop(reply.send(self.delete_switch(&switch, expect, by).await));
            }
            Command::ListGroups { reply } => drop(reply.send(self.view_groups())),
            Command::PutGroup { name, spec, expect, by, reply } => {
                drop(reply.send(self.put_group(name, spec, expect, by).await));
            }
            Command::DeleteGroup { group, expect, by, reply } => {
                drop(reply.send(self.delete_group(&group, expect, by).await));
            }
            Command::ListPorts { reply } => drop(reply.send(self.view_ports())),
            Command::PutPort { port, spec, expect, by, reply } => {
                drop(reply.send(self.put_port(&port, spec, expect, by).await));
            }
            Command::Attach { vm, adapters, reply } => drop(reply.send(self.attach(&vm, adapters).await)),
            Command::Detach { vm, reply } => drop(reply.send(self.detach(vm).await)),
            Command::Plan { vm, pfs, reply } => {
                self.know(pfs);
                drop(reply.send(self.plan(vm)));
            }
            Command::Bind { vm, adapter, vf, bdf, capabilities, reply } => {
                drop(reply.send(self.bind(vm, &adapter, vf, bdf, capabilities).await));
            }
            Command::Programmed { vf } => self.programmed(&vf),
            Command::Connected { vm, vmm, link } => self.connected(vm, vmm, link),
            Command::Disconnected { vm } => self.disconnected(vm),
            Command::Release { vm, adapter, reply } => self.release(vm, adapter, reply),
            Command::Released { vm, adapter, reply } => drop(reply.send(self.released(vm, &adapter).await)),
            Command::Rebooted { vm, link, .. }
            | Command::Request { vm, link, .. }
            | Command::RelayEvent { vm, link, .. }
                if !self.is_current(vm, link) => {}
            Command::Rebooted { vm, done, .. } => self.rebooted(vm, done),
            Command::Request { vm, adapter, id, guest_request, .. } => {
                self.request(vm, adapter, id, guest_request)
            }
            Command::RelayEvent { vm, adapter, event, done, .. } => {
                self.relay_event(vm, adapter, event, done)
            }
            Command::PfsKnown { pfs } => self.pfs_known(pfs),
            Command::Overdue { port } => self.overdue(port),
            Command::DeferredTooLong { port, since } => self.deferred_too_long(port, since),
            #[cfg(test)]
            Command::Settle { reply } => self.settling.push(reply),
        }
    }

    #[cfg(test)]
    fn say_settled(&mut self) {
        if self.port_queues.values().all(PortQueue::is_idle) && self.compare_at.is_none() {
            for settled in self.settling.drain(..) {
                let _ = settled.send(());
            }
        }
    }

    // ---- port queues ----

    /// Queues work for a port, and starts it if the queue is free.
    pub(super) fn queue(&mut self, port: PortId, work: Task) {
        if let Some(port_queue) = self.port_queues.get_mut(&port) {
            port_queue.push(work);
            self.go_on(port);
        }
    }

    /// Notes addresses that became free, and that the policy denied to other guests before.
    fn note_freed(&mut self) {
        let now = Instant::now();
        for freed in self.state.take_freed() {
            self.freed.insert(freed, now);
        }
        let first = self.freed.values().min();
        self.offer_at = first.and_then(|at| at.checked_add(self.timing.offer));
    }

    /// Offers addresses that have been free for a while to the ports whose guests requested them.
    fn offer_freed(&mut self) {
        let (now, wait) = (Instant::now(), self.timing.offer);
        let due: Vec<_> = self.freed.extract_if(|_, at| now.saturating_duration_since(*at) >= wait).collect();
        for ((switch, mac), _) in due {
            for port in self.state.offer(switch, mac) {
                self.queue(port, Task::Correct);
            }
        }
    }

    /// Takes tasks from a port's queue until one of them starts a job.
    pub(super) fn go_on(&mut self, port: PortId) {
        while let Some(port_queue) = self.port_queues.get_mut(&port) {
            if port_queue.busy.is_some() {
                return;
            }
            let Some(work) = port_queue.queue.pop_front() else { return };
            match work {
                Task::Recover => self.begin_recover(port),
                Task::Request { id, guest_request } => self.begin_request(port, id, guest_request),
                Task::Revert(revert) => self.begin_revert(port, revert),
                Task::Correct => self.begin_correct(port),
                Task::Repair { all } => self.begin_repair(port, all),
                Task::Reboot => self.begin_reboot(port),
                Task::Tell => self.begin_tell(port),
                Task::Confirmed { done, failed } => self.confirmed(port, &done, &failed),
                Task::Release { reply } => drop(reply.send(self.leftover(port))),
            }
        }
    }

    /// Starts a job of a port.
    pub(super) fn start<F>(&mut self, port: PortId, busy: Running, job: F)
    where
        F: Future<Output = End> + Send + 'static,
    {
        if let Some(port_queue) = self.port_queues.get_mut(&port) {
            port_queue.busy = Some(busy);
        }
        // The loop takes the new job before it waits again.
        drop(self.jobs.send(Box::pin(async move { (port, job.await) })));
    }

    /// The context of a port's job; None if the port has no VF.
    pub(super) fn tools(&self, id: PortId) -> Option<CommitContext> {
        let port = self.state.port(id)?;
        let vf = port.vf.clone()?;
        let link = self.links.get(&port.vm.id).filter(|link| link.online);
        Some(CommitContext {
            pf: self.pf.clone(),
            journal: self.journal.clone(),
            vmm: link.map(|link| Arc::clone(&link.vmm)),
            timing: self.timing,
            metrics: self.metrics.clone(),
            log: self.log.clone(),
            port: id,
            adapter: port.adapter.clone(),
            capabilities: self.capabilities.get(&vf.pf).cloned(),
            vf,
            before: self.attachment(id)?,
        })
    }

    fn on_end(&mut self, port: PortId, end: End) {
        let busy = self.port_queues.get_mut(&port).and_then(|port_queue| port_queue.busy.take());
        match end {
            End::Request(end) => self.request_ended(port, end, busy.and_then(|busy| busy.cancelled)),
            End::Reverted { revert, from, error } => self.reverted(port, &revert, from, error),
            End::Corrected { corrections, leftover, made } => {
                self.corrected(port, &corrections, &leftover, made);
            }
            End::Repaired { found } => {
                self.compared(port, found.as_ref().err());
                self.repaired(port, found.unwrap_or_default());
            }
            End::Rebooted { made } => self.reboot_done(port, made),
            End::Told => {}
            End::Recovered { shown } => self.recovered(port, shown),
        }
        self.go_on(port);
    }

    // ---- state, decisions and events ----

    pub(super) fn attachment(&self, id: PortId) -> Option<Attachment> {
        let (port, port_queue) = (self.state.port(id)?, self.port_queues.get(&id)?);
        Some(Attachment::of(port, port_queue))
    }

    /// Saves a port, without waiting for the durable write.
    pub(super) fn save(&self, port: PortId) {
        if let Some(attachment) = self.attachment(port) {
            drop(self.journal.save(port, &attachment));
        }
    }

    /// A decision about a port, to be filled in.
    pub(super) fn decision(&self, port: PortId, request: &str, outcome: Outcome) -> Option<Decision> {
        let port = self.state.port(port)?;
        Some(Decision::new(Uuid::new_v4(), port, request, outcome, Timestamp::now().unix_ms()))
    }

    /// Records a decision.
    pub(super) fn record(&mut self, decision: Option<Decision>) {
        if let Some(decision) = decision {
            self.count(&decision);
            self.metrics.decision(&decision);
            self.decisions.note(decision);
        }
    }

    pub(super) fn count(&mut self, decision: &Decision) {
        let Some(port_queue) = self.port_queues.get_mut(&decision.port) else { return };
        let counters = &mut port_queue.counters;
        let counter = match decision.outcome {
            Outcome::Allowed => &mut counters.allowed,
            Outcome::Denied => &mut counters.denied,
            Outcome::Revoked | Outcome::Reverted => &mut counters.taken_back,
            Outcome::Repaired => &mut counters.repaired,
        };
        *counter = counter.saturating_add(decision.count);
    }

    /// Publishes that an object was created or changed, with the author of the change.
    pub(super) fn put(&self, kind: ObjectKind, id: Uuid, name: &str, created: bool, by: Option<String>) {
        let revision = self.meta.get(&id).map_or(0, |meta| meta.revision);
        let object = Subject { kind, id, name: name.to_owned() };
        if let Some(by) = &by {
            tracing::info!(%object, revision, "policy {} by {by}", if created { "made" } else { "changed" });
        }
        self.events.publish(match created {
            true => EventKind::Created { object, revision, by },
            false => EventKind::Changed { object, revision, by },
        });
    }

    pub(super) fn deleted(&self, kind: ObjectKind, id: Uuid, name: &str, by: Option<String>) {
        let object = Subject { kind, id, name: name.to_owned() };
        if let Some(by) = &by {
            tracing::info!(%object, "policy deleted by {by}");
        }
        self.events.publish(EventKind::Deleted { object, by });
    }

    pub(super) fn tell_pf(&self, pf: &str, state: PfState) {
        self.events.publish(EventKind::PfState { pf: pf.to_owned(), state });
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::{sync::oneshot, time::timeout};

    use super::*;

    #[tokio::test]
    async fn jobs_go_on_while_a_command_waits() {
        let (send_new, mut new_jobs) = mpsc::unbounded_channel::<Job>();
        let mut jobs = FuturesUnordered::<Job>::new();
        let (first, second) = (oneshot::channel::<()>(), oneshot::channel::<()>());
        let job = |done: oneshot::Sender<()>| -> Job {
            Box::pin(async move {
                let _ = done.send(());
                (PortId(Uuid::nil()), End::Told)
            })
        };
        jobs.push(job(first.0));
        // A disk that hangs for as long as the jobs do.
        let command = async {
            first.1.await.unwrap();
            drop(send_new.send(job(second.0)));
            second.1.await.unwrap();
        };
        let ended = timeout(Duration::from_secs(5), beside(command, &mut jobs, &mut new_jobs)).await;
        assert!(!ended.expect("the jobs are polled").is_empty());
    }
}
