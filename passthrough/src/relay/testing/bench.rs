// SPDX-License-Identifier: Apache-2.0

//! A relay without its thread, in a time that advances only when the bench or the driver waits.

use std::{
    cell::RefCell,
    rc::Rc,
    sync::{Arc, Mutex},
    time::Duration,
};

use netpolicy::{MacAddress, Request};

use super::{
    driver::{Bus, Driver},
    fake_vf::{Double, FakeVf},
    igb::Igb,
};
use crate::{
    channel::mailbox::vf_mailbox::Clock,
    function::BarHandler,
    relay::{
        Authority, Config, Decision, GuestRequest, How, MailboxPage, Relay, RelayEvent, Unreachable, Verdict,
        state_machine::StateMachine,
    },
};

/// A clock that advances only during sleeps.
#[derive(Default)]
pub struct FakeClock(Mutex<Duration>);

impl Clock for FakeClock {
    fn now(&self) -> Duration {
        *self.0.lock().unwrap()
    }

    fn sleep(&self, time: Duration) {
        *self.0.lock().unwrap() += time;
    }
}

/// An authority that records everything. The bench answers for it.
#[derive(Default)]
pub struct ScriptedAuthority {
    pub away: Mutex<bool>,
    pub requests: Mutex<Vec<GuestRequest>>,
    pub events: Mutex<Vec<RelayEvent>>,
}

impl Authority for ScriptedAuthority {
    fn request(&self, guest_request: GuestRequest) -> Result<(), Unreachable> {
        if *self.away.lock().unwrap() {
            return Err(Unreachable);
        }
        self.requests.lock().unwrap().push(guest_request);
        Ok(())
    }

    fn event(&self, event: RelayEvent) {
        self.events.lock().unwrap().push(event);
    }
}

/// The delay and decision for a request; None for no answer.
pub type Policy = Box<dyn FnMut(&Request) -> Option<(Duration, Decision)>>;

/// The relay, both of its sides, and the clock.
pub struct World {
    pub relay: Relay,
    pub page: Arc<MailboxPage>,
    pub vf: Arc<FakeVf>,
    pub authority: Arc<ScriptedAuthority>,
    double: &'static dyn Double,
    pub clock: Arc<FakeClock>,
    machine: StateMachine,
    policy: Policy,
    answered: usize,
    pending: Vec<(Duration, Verdict)>,
    next_turn: Duration,
    /// Every request that was granted with [`How::Forward`].
    pub granted: Vec<Request>,
}

/// Handle to a [`World`]; the driver's bus.
#[derive(Clone)]
pub struct Bench(pub Rc<RefCell<World>>);

impl Bench {
    pub fn new(mac: MacAddress) -> Self {
        Self::with(mac, Config::default())
    }

    pub fn with(mac: MacAddress, config: Config) -> Self {
        Self::of(&Igb, mac, config)
    }

    /// A bench for another family than igb's.
    pub fn of(double: &'static dyn Double, mac: MacAddress, config: Config) -> Self {
        let clock = Arc::new(FakeClock::default());
        // The clock must not start at zero: no code may depend on it.
        clock.sleep(Duration::from_secs(1000));
        let vf = FakeVf::of(double, mac, clock.clone());
        let authority = Arc::new(ScriptedAuthority::default());
        let (relay, machine) =
            Relay::assemble(config, double.family(), vf.clone(), authority.clone(), clock.clone());
        let world = World {
            page: relay.page(),
            relay,
            vf,
            authority,
            double,
            clock,
            machine,
            policy: Box::new(|_| Some((Duration::ZERO, Decision::Grant { how: How::Local }))),
            answered: 0,
            pending: Vec::new(),
            next_turn: Duration::ZERO,
            granted: Vec::new(),
        };
        Self(Rc::new(RefCell::new(world)))
    }

    /// Sets the decisions on requests from now on (resets excepted, which are granted).
    pub fn policy(&self, decide: impl Fn(&Request) -> Option<Decision> + 'static) {
        self.slow_policy(move |request| decide(request).map(|decision| (Duration::ZERO, decision)));
    }

    /// Like [`policy`](Self::policy), with a delay.
    pub fn slow_policy(&self, decide: impl FnMut(&Request) -> Option<(Duration, Decision)> + 'static) {
        self.0.borrow_mut().policy = Box::new(decide);
    }

    pub fn driver(&self) -> Driver<Self> {
        let offsets = self.0.borrow().double.offsets();
        Driver::with(self.clone(), offsets)
    }

    pub fn vf(&self) -> Arc<FakeVf> {
        self.0.borrow().vf.clone()
    }

    /// Takes the events received so far.
    pub fn events(&self) -> Vec<RelayEvent> {
        std::mem::take(&mut self.0.borrow().authority.events.lock().unwrap())
    }

    /// All requests so far.
    pub fn requests(&self) -> Vec<Request> {
        self.0
            .borrow()
            .authority
            .requests
            .lock()
            .unwrap()
            .iter()
            .map(|guest_request| guest_request.request.clone())
            .collect()
    }

    pub fn set_away(&self, away: bool) {
        *self.0.borrow().authority.away.lock().unwrap() = away;
    }

    pub fn now(&self) -> Duration {
        self.0.borrow().clock.now()
    }

    pub fn wait(&self, time: Duration) {
        self.clone().delay(time);
    }
}

impl World {
    /// Runs the relay and the authority until both are idle.
    pub fn settle(&mut self) {
        loop {
            self.next_turn = self.machine.turn().unwrap_or(Duration::MAX);
            let requests = self.authority.requests.lock().unwrap();
            let new: Vec<GuestRequest> = requests[self.answered..].to_vec();
            self.answered = requests.len();
            drop(requests);
            for guest_request in new {
                self.decide(&guest_request);
            }
            let now = self.clock.now();
            let Some(due) = self.pending.iter().position(|(at, _)| *at <= now) else { return };
            let (_, mut verdict) = self.pending.remove(due);
            verdict.effective_mac = self.vf.pf().mac;
            self.relay.verdict(verdict);
        }
    }

    fn decide(&mut self, guest_request: &GuestRequest) {
        let reset = Some((Duration::ZERO, Decision::Grant { how: How::Local }));
        let decided = if guest_request.request == Request::Reset {
            reset
        } else {
            (self.policy)(&guest_request.request)
        };
        let Some((delay, decision)) = decided else { return };
        match (&guest_request.request, decision) {
            // Committed by netlink.
            (Request::SetMac(mac), Decision::Grant { how: How::Local }) => self.vf.set_admin_mac(*mac),
            (request, Decision::Grant { how: How::Forward }) => self.granted.push(request.clone()),
            _ => {}
        }
        let verdict = Verdict { seq: guest_request.seq, effective_mac: self.vf.pf().mac, decision };
        self.pending.push((self.clock.now() + delay, verdict));
    }

    fn next_event(&self) -> Duration {
        self.pending.iter().map(|(at, _)| *at).fold(self.next_turn, Duration::min)
    }
}

impl Bus for Bench {
    fn read(&mut self, offset: u64) -> u32 {
        let mut world = self.0.borrow_mut();
        let mut data = [0xee; 4];
        world.page.read(offset, &mut data);
        world.settle();
        u32::from_le_bytes(data)
    }

    fn write(&mut self, offset: u64, value: u32) {
        let mut world = self.0.borrow_mut();
        world.page.write(offset, &value.to_le_bytes());
        world.settle();
    }

    fn delay(&mut self, time: Duration) {
        let mut world = self.0.borrow_mut();
        let end = world.clock.now() + time;
        loop {
            let now = world.clock.now();
            let step = world.next_event().clamp(now, end);
            world.clock.sleep(step.saturating_sub(now).max(Duration::from_nanos(1)));
            world.settle();
            if world.clock.now() >= end {
                return;
            }
        }
    }
}
