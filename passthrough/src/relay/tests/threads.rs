// SPDX-License-Identifier: Apache-2.0

//! The relay with its real thread and the machine's clock.

use std::{
    sync::{
        Arc, Barrier, Mutex, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use netpolicy::Request;

use super::{FORWARD, LOCAL, NACK, mac};
use crate::{
    channel::mailbox::vf_mailbox::SystemClock,
    family::igb::{IGBVF, fuzz::assert_canonical},
    function::BarHandler,
    relay::{
        Authority, Cancelled, Config, GuestRequest, MailboxPage, Rate, Relay, RelayEvent, Unreachable,
        Verdict,
        testing::{Bus, Driver, FakeVf},
    },
    threads::ThreadStart,
};

/// Answers from the relay's own thread, or never.
#[derive(Default)]
struct Agent {
    relay: Mutex<Weak<Relay>>,
    vf: Mutex<Option<Arc<FakeVf>>>,
    mute: AtomicBool,
    events: Mutex<Vec<RelayEvent>>,
}

impl Authority for Agent {
    fn request(&self, guest_request: GuestRequest) -> Result<(), Unreachable> {
        if self.mute.load(Ordering::Relaxed) && guest_request.request != Request::Reset {
            return Ok(());
        }
        let vf = self.vf.lock().unwrap().clone().unwrap();
        let decision = match guest_request.request {
            Request::Reset => LOCAL,
            Request::SetMac(mac) if mac.bytes()[5] < 0x80 => {
                vf.set_admin_mac(mac);
                LOCAL
            }
            Request::SetMac(_) => NACK,
            _ => FORWARD,
        };
        if let Some(relay) = self.relay.lock().unwrap().upgrade() {
            relay.verdict(Verdict { seq: guest_request.seq, effective_mac: vf.pf().mac, decision });
        }
        Ok(())
    }

    fn event(&self, event: RelayEvent) {
        self.events.lock().unwrap().push(event);
    }
}

fn start(config: Config) -> (Arc<Relay>, Arc<FakeVf>, Arc<Agent>) {
    let vf = FakeVf::new(mac(0x11), Arc::new(SystemClock::default()));
    let agent = Arc::new(Agent::default());
    *agent.vf.lock().unwrap() = Some(vf.clone());
    let relay = Arc::new(
        Relay::start(config, &IGBVF, vf.clone(), agent.clone(), &ThreadStart::default()).expect("thread"),
    );
    *agent.relay.lock().unwrap() = Arc::downgrade(&relay);
    (relay, vf, agent)
}

/// The page, with real waiting.
struct Guest(Arc<MailboxPage>);

impl Bus for Guest {
    fn read(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.0.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&mut self, offset: u64, value: u32) {
        self.0.write(offset, &value.to_le_bytes());
    }

    fn delay(&mut self, time: Duration) {
        std::thread::sleep(time);
    }
}

#[test]
fn a_driver_changes_its_address_and_is_refused_another() {
    let (relay, vf, _) = start(Config::default());
    let mut driver = Driver::new(Guest(relay.page()));
    driver.probe();
    assert_eq!(driver.netdev, mac(0x11));
    assert!(driver.set_mac(mac(0x22)));
    assert!(!driver.set_mac(mac(0xf0)));
    driver.down_up();
    assert_eq!((driver.netdev, vf.pf().mac), (mac(0x22), mac(0x22)));
    assert_eq!(driver.call(&[0x1_0004, 100]), Ok(0xa001_0004));
    relay.stop();
}

#[test]
fn two_writers_get_one_message_at_a_time() {
    let messages = Rate { burst: 1_000_000, period: Duration::from_nanos(1) };
    let (relay, vf, _) = start(Config { messages, ..Config::default() });
    Driver::new(Guest(relay.page())).probe();
    let barrier = Arc::new(Barrier::new(2));
    let writers = [0x0222_0111u32, 0x0333_0333].map(|hashes| {
        let (page, barrier) = (relay.page(), barrier.clone());
        std::thread::spawn(move || {
            let mut guest = Guest(page);
            barrier.wait();
            let end = Instant::now() + Duration::from_millis(300);
            while Instant::now() < end {
                // Raw: no ownership, no waiting.
                for word in 1..16 {
                    guest.write(0x800 + 4 * word, hashes);
                }
                guest.write(0x800, 0x1e_0003);
                guest.write(0xc40, 1);
            }
        })
    });
    for writer in writers {
        writer.join().expect("no panic");
    }
    std::thread::sleep(Duration::from_millis(50));
    relay.stop();
    let received = vf.pf().received;
    assert!(received.len() > 10);
    received.iter().for_each(assert_canonical);
    let stats = relay.stats();
    assert!(stats.dropped_requests + stats.dropped_writes > 0, "they did meet: {stats:?}");
}

#[test]
fn a_vcpu_never_waits_for_the_authority_or_the_pf() {
    let (relay, vf, agent) = start(Config::default());
    let mut driver = Driver::new(Guest(relay.page()));
    driver.probe();
    agent.mute.store(true, Ordering::Relaxed);
    // A message without an answer, and then a device that holds the relay's thread in an exchange.
    driver.bus.write(0x800, 4);
    let mut slowest = Duration::ZERO;
    for round in 0..2 {
        driver.bus.write(0xc40, 1);
        let end = Instant::now() + Duration::from_millis(100);
        while Instant::now() < end {
            let start = Instant::now();
            driver.bus.read(0xc40);
            driver.bus.write(0x804, 1);
            slowest = slowest.max(start.elapsed());
            std::thread::sleep(Duration::from_micros(200));
        }
        if round == 0 {
            driver.bus.write(0, 1 << 26);
            vf.with_pf(|pf| pf.mute = true);
            driver.bus.write(0x800, 1);
        }
    }
    assert!(slowest < Duration::from_millis(50), "{slowest:?}");
    drop(relay);
}

#[test]
fn the_deadline_holds_in_real_time_and_stopping_cancels() {
    let config = Config { ask_limit: Duration::from_millis(50), ..Config::default() };
    let (relay, _, agent) = start(config);
    let mut driver = Driver::new(Guest(relay.page()));
    driver.probe();
    agent.mute.store(true, Ordering::Relaxed);
    let start = Instant::now();
    assert!(!driver.set_mac(mac(0x22)));
    assert!(start.elapsed() >= Duration::from_millis(50) && start.elapsed() < Duration::from_millis(500));
    driver.bus.write(0x800, 4);
    driver.bus.write(0xc40, 1);
    std::thread::sleep(Duration::from_millis(10));
    relay.stop();
    let events = agent.events.lock().unwrap();
    let why: Vec<_> = events
        .iter()
        .filter_map(|event| if let RelayEvent::Cancelled { why, .. } = event { Some(*why) } else { None })
        .collect();
    assert_eq!(why, [Cancelled::Deadline, Cancelled::Stopped]);
}
