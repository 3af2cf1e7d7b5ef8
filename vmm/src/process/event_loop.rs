// SPDX-License-Identifier: Apache-2.0

//! The event loop's one subscriber: it reads the sockets and eventfds, and hands commands to the machine and events to
//! the agent; relays send their requests themselves. It owns all of the process's mutable state.

use std::{
    collections::BTreeMap,
    os::fd::{AsRawFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use netpolicy::StandingRefusal;
use protocol::{
    Channel, ChannelError, End, Failure, Listener, Outcome, SPOKEN, State, ToAgent, ToVmm, VmmEvent,
};
use uuid::Uuid;

use failpoints::{Point, reach};
use passthrough::relay::RelayEvent;

use super::{commands::Growth, event_queue::EventQueue, resets::Resets};
use crate::{
    agent_client::{RelayMessage, RelayReceiver},
    machine::{Machine, Signals, chain},
    sandbox::NewNamespaces,
};

const LISTENER: u32 = 0;
const CHANNEL: u32 = 1;
const VCPUS: u32 = 2;
const CONSOLE: u32 = 3;
const RELAYS: u32 = 4;
/// The first number of passthrough devices: each has two, for its request and its error eventfd.
const DEVICES: u32 = 16;

/// The most messages read before the loop serves its other sources again.
const BATCH: usize = 32;
/// The longest time that an ended process stays, for the agent to read the cause of the end.
const LINGER: Duration = Duration::from_secs(600);
/// The most commands that may wait for console output.
const CONSOLE_WAITERS: usize = 16;

/// The state of the whole process.
pub(super) struct Process {
    pub(super) vm: Uuid,
    pub(super) started: Instant,
    listener: Listener,
    /// The user id that may control this process: its own.
    owner: u32,
    channel: Option<Connection>,
    /// Connections that have ended, but are still registered with epoll.
    closed: Vec<Connection>,
    pub(super) machine: Option<Machine>,
    signals: Option<Signals>,
    pub(super) state: State,
    pub(super) boots: u64,
    events: EventQueue,
    /// Commands that wait for console output: their id, and the offset that the output must pass.
    console_waiters: Vec<(u64, u64)>,
    /// Ids of [`VmmCommand::Revoke`](protocol::VmmCommand::Revoke) that a relay works on.
    revocations: Vec<u64>,
    /// Commands that wait for the growth of a disk.
    pub(super) growths: Vec<Growth>,
    /// The number of the last growth.
    pub(super) last_growth: u64,
    /// Standing denials by the agent, by adapter.
    pub(super) standing: BTreeMap<String, StandingRefusal>,
    /// The namespaces that a thread is making for the machine's sandbox. None once a machine has been configured.
    pub(super) namespaces: Option<NewNamespaces>,
    /// Receives the relays' messages, and has the connection by which relays send their requests.
    pub(super) relays: RelayReceiver,
    pub(super) resets: Resets,
    /// The time at which to make a delayed reset of the guest. The vCPUs are parked until then.
    pub(super) reset_due: Option<Instant>,
    /// The beginning of the current reset, or of the last one.
    pub(super) reset_began: Instant,
    /// A full disk for which the machine is to be paused, and when to try.
    pub(super) full: Option<(String, Instant)>,
    ended: Option<Instant>,
    /// The agent has commanded the end, so the process need not wait until the agent has read the last event.
    pub(super) stop_commanded: bool,
}

struct Connection {
    channel: Arc<Channel>,
    greeted: bool,
    /// The version of the protocol, once the agent has greeted.
    version: u32,
}

impl Process {
    pub(super) fn new(listener: Listener, vm: Uuid, started: Instant) -> std::io::Result<Self> {
        let relays = RelayReceiver::new()?;
        Ok(Self {
            vm,
            started,
            listener,
            owner: rustix::process::getuid().as_raw(),
            channel: None,
            closed: Vec::new(),
            machine: None,
            signals: None,
            state: State::Empty,
            boots: 0,
            events: EventQueue::default(),
            console_waiters: Vec::new(),
            revocations: Vec::new(),
            growths: Vec::new(),
            last_growth: 0,
            standing: BTreeMap::new(),
            namespaces: Some(NewNamespaces::begin()?),
            relays,
            resets: Resets::new(Instant::now()),
            reset_due: None,
            reset_began: Instant::now(),
            full: None,
            ended: None,
            stop_commanded: false,
        })
    }

    /// Whether the process may exit: the machine has ended, and the agent has noted that or [`LINGER`] has passed.
    pub(super) fn finished(&self) -> bool {
        self.ended.is_some_and(|at| self.stop_commanded || self.events.is_empty() || at.elapsed() > LINGER)
    }

    pub(super) fn wake_after_ms(&self) -> i32 {
        if self.ended.is_some() {
            return 1000;
        }
        // A paused machine keeps its delayed reset until it runs again.
        let reset = self.reset_due.filter(|_| matches!(self.state, State::Running | State::Rebooting));
        let full = self.full.as_ref().map(|(_, due)| *due);
        reset.into_iter().chain(full).min().map_or(-1, |due| {
            let left = due.saturating_duration_since(Instant::now()).as_millis();
            i32::try_from(left).unwrap_or(i32::MAX).saturating_add(1)
        })
    }

    pub(super) fn take_down(&mut self) {
        self.machine = None;
    }

    /// Changes the state and reports it to the agent.
    pub(super) fn enter(&mut self, state: State) {
        self.state = state;
        self.emit(VmmEvent::State { state, boots: self.boots });
    }

    pub(super) fn emit(&mut self, event: VmmEvent) {
        let seq = self.events.push(event.clone());
        // An older agent does not know newer events, but it knows all states.
        let since = event.since();
        if self.channel.as_ref().is_some_and(|agent| agent.greeted && agent.version >= since) {
            self.send(&ToAgent::Event { seq, event });
        }
    }

    /// Ends the machine for good.
    pub(super) fn end(&mut self, end: End) {
        if self.ended.is_some() {
            return;
        }
        match &end {
            End::Failed { detail } => tracing::error!(vm = %self.vm, "The machine failed: {detail}"),
            End::PoweredOff => tracing::info!(vm = %self.vm, "The guest powered off"),
            End::Stopped => tracing::info!(vm = %self.vm, "Stopped"),
        }
        self.machine = None;
        self.reset_due = None;
        self.full = None;
        self.state = State::Ended;
        self.ended = Some(Instant::now());
        reach(Point::VmmStopped);
        self.emit(VmmEvent::Ended { end });
        for (id, _) in std::mem::take(&mut self.console_waiters) {
            self.done(id, Ok(Outcome::Done));
        }
        self.cancel_growths();
    }

    pub(super) fn done(&mut self, id: u64, result: Result<Outcome, Failure>) {
        self.send(&ToAgent::Done { id, result });
    }

    fn send(&mut self, message: &ToAgent) {
        let Some(connection) = &self.channel else { return };
        if let Err(error) = connection.channel.send(message, &[]) {
            self.drop_agent(&error);
        }
    }

    /// Drops an agent that does not read. It gets the events when it connects again.
    fn drop_agent(&mut self, error: &ChannelError) {
        tracing::warn!(vm = %self.vm, "The control connection is dropped: {}", chain(error));
        self.disconnect();
    }

    /// Ends the connection, if there is one, and drops the state that belongs to it.
    fn disconnect(&mut self) {
        self.relays.set_agent(None);
        self.console_waiters.clear();
        self.revocations.clear();
        self.growths.clear();
        self.forget_standing();
        self.closed.extend(self.channel.take());
    }

    /// Unregisters ended connections before the kernel reuses their descriptors' numbers.
    fn forget_closed_connections(&mut self, ops: &mut EventOps<'_>) {
        for connection in self.closed.drain(..) {
            let _ = ops.remove(Events::empty(&*connection.channel));
        }
    }

    /// Registers the `signals` of a new machine.
    pub(super) fn listen_to(&mut self, signals: Signals, ops: &mut EventOps<'_>) {
        let console = signals.console.event().as_raw_fd();
        let sources = [(signals.vcpu_signal.as_raw_fd(), VCPUS), (console, CONSOLE)];
        let devices = self.machine.iter().flat_map(|machine| machine.devices.loss_signals());
        let devices =
            devices.filter_map(|(number, fd)| Some((fd, DEVICES.checked_add(u32::try_from(number).ok()?)?)));
        for (fd, token) in sources.into_iter().chain(devices) {
            if let Err(error) = ops.add(Events::with_data_raw(fd, token, EventSet::IN)) {
                tracing::error!(vm = %self.vm, "Cannot listen to an event source: {error:?}");
            }
        }
        self.signals = Some(signals);
    }

    pub(super) fn wait_for_console(&mut self, id: u64, offset: u64) {
        let Some(signals) = &self.signals else {
            return self.done(id, Ok(Outcome::Done));
        };
        signals.console.want();
        // Check only after `want`: output between the two would be missed.
        if signals.console.written() > offset || self.console_waiters.len() >= CONSOLE_WAITERS {
            return self.done(id, Ok(Outcome::Done));
        }
        self.console_waiters.push((id, offset));
    }

    fn on_console(&mut self) {
        let Some(signals) = &self.signals else { return };
        let _ = signals.console.event().read();
        let written = signals.console.written();
        let (ready, rest) =
            std::mem::take(&mut self.console_waiters).into_iter().partition(|(_, offset)| written > *offset);
        self.console_waiters = rest;
        if !self.console_waiters.is_empty()
            && let Some(signals) = &self.signals
        {
            signals.console.want();
        }
        let ready: Vec<(u64, u64)> = ready;
        for (id, _) in ready {
            self.done(id, Ok(Outcome::Done));
        }
    }

    fn on_vcpus(&mut self) {
        let Some(signals) = &self.signals else { return };
        let _ = signals.vcpu_signal.read();
        let event = signals.vcpu_events.try_recv();
        // At any event, since a reset drops those that came before.
        self.complete_growths();
        let (Some(signals), Ok(event)) = (&self.signals, event) else { return };
        // Handle one event at a time, and leave the rest for the next turn: this one may make them void, and a vCPU
        // that raises one after another must not starve the other sources.
        let _ = signals.vcpu_signal.write(1);
        self.on_vcpu_event(event);
    }

    /// Drops the events that vCPUs raised before they were parked for a reset. They must not end or reset the next
    /// boot.
    pub(super) fn forget_vcpu_events(&mut self) {
        if let Some(signals) = &self.signals {
            signals.vcpu_events.try_iter().for_each(drop);
        }
    }

    pub(super) fn await_revocation(&mut self, id: u64) {
        self.revocations.push(id);
    }

    fn on_relays(&mut self) {
        self.pass_on_relay_messages();
        // A message that came meanwhile has already signalled the loop again.
        let _ = self.relays.sent();
    }

    fn pass_on_relay_messages(&mut self) {
        for (adapter, message) in self.relays.drain() {
            match message {
                RelayMessage::Request(guest_request) => {
                    // Drop a request whose connection has ended, if the next agent has not greeted yet: the relay
                    // denies it at its deadline.
                    let greeted = self.channel.as_ref().is_some_and(|connection| connection.greeted);
                    if greeted && let Err(error) = self.relays.request(&adapter, &guest_request) {
                        self.drop_agent(&error);
                    }
                }
                RelayMessage::Event(RelayEvent::Revoked { id, failed, deferred })
                    if self.revocations.contains(&id) =>
                {
                    self.revocations.retain(|waiting| *waiting != id);
                    self.done(id, Ok(Outcome::Revoked { failed, deferred }));
                }
                RelayMessage::Event(event) => self.emit(VmmEvent::Relay { adapter, event }),
            }
        }
    }

    fn on_connection(&mut self, ops: &mut EventOps<'_>) {
        let channel = match self.listener.accept() {
            Ok(channel) => channel,
            Err(ChannelError::WouldBlock) => return,
            Err(error) => {
                tracing::warn!(vm = %self.vm, "Cannot accept a control connection: {}", chain(&error));
                return;
            }
        };
        if !channel.peer().is_ok_and(|peer| peer.uid.as_raw() == self.owner) {
            tracing::warn!(vm = %self.vm, "Refused a control connection of a foreign user");
            return;
        }
        self.disconnect();
        self.forget_closed_connections(ops);
        if let Err(error) = ops.add(Events::with_data_raw(channel.as_raw_fd(), CHANNEL, EventSet::IN)) {
            tracing::error!(vm = %self.vm, "Cannot listen to the control connection: {error:?}");
            return;
        }
        self.channel = Some(Connection { channel: Arc::new(channel), greeted: false, version: 0 });
    }

    fn on_messages(&mut self, ops: &mut EventOps<'_>) {
        for _ in 0..BATCH {
            let Some(connection) = &self.channel else { return };
            match connection.channel.receive::<ToVmm>() {
                Ok((message, fds)) => self.on_message(message, fds, ops),
                Err(ChannelError::WouldBlock) => return,
                Err(error) => {
                    if !matches!(error, ChannelError::Closed) {
                        tracing::warn!(vm = %self.vm, "The control connection is dropped: {}", chain(&error));
                    }
                    self.disconnect();
                }
            }
        }
    }

    fn on_message(&mut self, message: ToVmm, fds: Vec<OwnedFd>, ops: &mut EventOps<'_>) {
        let greeted = self.channel.as_ref().is_some_and(|connection| connection.greeted);
        match message {
            ToVmm::Hello { oldest, newest, vm } => self.greet(oldest, newest, vm),
            _ if !greeted => {
                tracing::warn!(vm = %self.vm, "The control connection is dropped: it began without a hello");
                self.disconnect();
            }
            ToVmm::Command { id, command } => self.handle_command(id, command, fds, ops),
            ToVmm::Response { response, .. } => self.on_response(response),
            ToVmm::Standing { adapter, refusal } => self.on_standing(adapter, refusal),
            ToVmm::Noted { upto } => self.events.noted(upto),
        }
    }

    fn greet(&mut self, oldest: u32, newest: u32, vm: Uuid) {
        let version = newest.min(*SPOKEN.end());
        let reason = if vm != self.vm {
            Some(format!("this is the process of VM {}", self.vm))
        } else if version < oldest.max(*SPOKEN.start()) {
            Some(format!(
                "the agent speaks versions {oldest} to {newest} of the control protocol, this process {} to {}",
                SPOKEN.start(),
                SPOKEN.end()
            ))
        } else {
            None
        };
        if let Some(reason) = reason {
            self.send(&ToAgent::Refused { reason });
            self.disconnect();
            return;
        }
        self.send(&ToAgent::Hello { version, state: self.state, boots: self.boots });
        reach(Point::VmmGreeted);
        let known = |(_, event): &&(u64, VmmEvent)| event.since() <= version;
        let pending: Vec<_> = self.events.pending().filter(known).cloned().collect();
        for (seq, event) in pending {
            self.send(&ToAgent::Event { seq, event });
        }
        // From now on relays send requests themselves. Allow this only after the events, which requests must not
        // overtake.
        if let Some(connection) = &mut self.channel {
            connection.greeted = true;
            connection.version = version;
            self.relays.set_agent(Some(Arc::clone(&connection.channel)));
        }
    }

    fn on_device_signal(&mut self, index: usize, ops: &mut EventOps<'_>) {
        let Some(machine) = &mut self.machine else { return };
        let Some(loss) = machine.devices.lost(index) else { return };
        for signal in loss.signals.iter().flatten() {
            // Unregister before `loss` closes it, or the event manager keeps its number.
            let _ = ops.remove(Events::empty(signal));
        }
        if let Some(slot) = loss.slot {
            machine.board.pci.remove(slot);
        }
        tracing::warn!(vm = %self.vm, device = %loss.bdf, why = ?loss.why, "The VM lost a device");
        self.emit(VmmEvent::DeviceLost { bdf: loss.bdf, why: loss.why });
    }
}

impl MutEventSubscriber for Process {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let sources = [(self.listener.as_raw_fd(), LISTENER), (self.relays.signal().as_raw_fd(), RELAYS)];
        for (fd, token) in sources {
            if let Err(error) = ops.add(Events::with_data_raw(fd, token, EventSet::IN)) {
                tracing::error!(vm = %self.vm, "Cannot listen to the control socket: {error:?}");
                self.ended = Some(self.started);
                self.stop_commanded = true;
            }
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        match events.data() {
            LISTENER => self.on_connection(ops),
            CHANNEL => self.on_messages(ops),
            VCPUS => self.on_vcpus(),
            CONSOLE => self.on_console(),
            RELAYS => self.on_relays(),
            token => {
                if let Ok(index) = usize::try_from(token.saturating_sub(DEVICES)) {
                    self.on_device_signal(index, ops);
                }
            }
        }
        self.forget_closed_connections(ops);
    }
}
