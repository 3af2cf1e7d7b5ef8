// SPDX-License-Identifier: Apache-2.0

//! The [tables](super::table) on any VF: a simulated one, or one of an adapter with the real PF driver. The VF's ids
//! select the family.
//!
//! Real time passes. The PF must have set [`EFFECTIVE`] as the VF's address and must not trust it. The result
//! lists all differences in words: a run of the lab is too expensive to stop at the first one.

use std::{
    io,
    sync::{Arc, Mutex, Weak},
    time::Duration,
};

use devices::memory::HostMemory;
use netpolicy::{MacAddress, Request};
use vmm_sys_util::eventfd::EventFd;

use super::{
    driver::{Bus, Driver},
    ixgbe_table::IXGBE,
    table::{EFFECTIVE, IGB, PfCase, RelayCase, Tables},
};
use crate::{
    channel::mailbox::{
        layout::Register,
        message::BUFFER_WORDS,
        register_bits::{CONTROL_RST, REQ},
    },
    family::Family,
    function::BarHandler,
    hardware::{BarInfo, IrqKind, VfHardware},
    relay::{
        Authority, Config, Decision, GuestRequest, How, MailboxPage, Rate, Relay, RelayEvent, Unreachable,
        Verdict,
    },
    threads::ThreadStart,
};

/// Long enough for a PF's answer to arrive.
const SILENCE: Duration = Duration::from_millis(50);

/// The tables of a VF's family.
fn tables(vf: &dyn VfHardware) -> &'static Tables {
    let mut ids = [0xff; 4];
    vf.config_read(0, &mut ids);
    let [a, b, c, d] = ids;
    let id = (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]));
    [&IGB, &IXGBE].into_iter().find(|tables| tables.double.family().ids.contains(&id)).unwrap_or(&IGB)
}

/// Differences between the behaviour of a relay in front of `vf` and the relay's table.
pub fn relay_differences(vf: Arc<dyn VfHardware>) -> Vec<String> {
    let tables = tables(&*vf);
    let family = tables.double.family();
    let witness = Arc::new(Witness { hardware: vf, family, words: Mutex::default(), sent: Mutex::default() });
    // The table is longer than a guest's burst of messages.
    let unthrottled = Rate { burst: 100_000, period: Duration::from_nanos(1) };
    let config = Config { messages: unthrottled, resets: unthrottled, ..Config::default() };
    let (relay, agent) = Agent::of_family(family, config, witness.clone());
    tables.relay.iter().flat_map(|case| relay_case(tables, case, &relay, &witness, &agent)).collect()
}

fn relay_case(
    tables: &Tables,
    case: &RelayCase,
    relay: &Relay,
    witness: &Witness,
    agent: &Agent,
) -> Vec<String> {
    let mut driver = Driver::with(Page(relay.page()), tables.double.offsets());
    driver.probe();
    let before = tables.before.iter().find_map(|words| driver.call(words).err());
    *agent.decision.lock().unwrap() = case.decision;
    *agent.asked.lock().unwrap() = false;
    witness.sent.lock().unwrap().clear();

    let mut words = [0xdead_beef; BUFFER_WORDS];
    words[..case.words.len()].copy_from_slice(case.words);
    let posted = driver.post(&words);
    let reply = driver.has_reply().then(|| driver.words(1 + case.data.len()));
    let asked = *agent.asked.lock().unwrap();
    let forwarded = std::mem::take(&mut *witness.sent.lock().unwrap());
    let expected: Vec<Vec<u32>> = case.forwarded.iter().map(|words| words.to_vec()).collect();

    let mut differences = Vec::new();
    let mut differs = |holds: bool, what: String| {
        if !holds {
            differences.push(format!("{}: {what}", case.name));
        }
    };
    differs(driver.netdev == MacAddress::new(EFFECTIVE), format!("probed with {}", driver.netdev));
    differs(before.is_none() && posted.is_ok(), format!("{before:?}, {posted:?}"));
    let answer = case.reply.map(|word| [&[word], case.data].concat());
    differs(reply == answer, format!("{reply:x?} is answered, not {answer:x?}"));
    differs(asked == case.decision.is_some(), format!("the authority was asked: {asked}"));
    differs(forwarded == expected, format!("{forwarded:x?} was forwarded, not {expected:x?}"));
    differences
}

/// Differences between the answers of `vf`'s PF and the PF's table, and its answer to a message after VTCTRL.RST.
pub fn pf_differences(vf: Arc<dyn VfHardware>) -> Vec<String> {
    let mut differences = Vec::new();
    let tables = tables(&*vf);
    let mut driver = Driver::with(Direct(vf), tables.double.offsets());
    for case in tables.pf {
        let ready = driver
            .reset_hw()
            .and_then(|()| tables.before.iter().try_for_each(|words| driver.call(words).map(drop)));
        if let Err(error) = ready {
            differences.push(format!("{}: the reset before it: {error:?}", case.name));
            continue;
        }
        if driver.perm != MacAddress::new(EFFECTIVE) {
            differences.push(format!("{}: the reset reply before it has {}", case.name, driver.perm));
        }
        let reply = exchange(&mut driver, case);
        let expected = Ok(case.reply.map(|word| [&[word], case.data].concat()));
        if reply != expected {
            differences.push(format!("{}: {reply:x?} is answered, not {expected:x?}", case.name));
        }
    }
    let control = tables.double.family().layout.control;
    driver.bus.write(control.into(), CONTROL_RST);
    let case = PfCase { name: "", words: &[5, 1518], reply: tables.after_rst, data: &[] };
    let reply = exchange(&mut driver, &case);
    let expected = Ok(case.reply.map(|word| vec![word]));
    if reply != expected {
        differences
            .push(format!("after a reset without its message: {reply:x?} is answered, not {expected:x?}"));
    }
    differences
}

/// The answer. An expected answer may take its time.
fn exchange(driver: &mut Driver<Direct>, case: &PfCase) -> Result<Option<Vec<u32>>, String> {
    driver.post(case.words).map_err(|error| format!("{error:?}"))?;
    if case.reply.is_none() {
        driver.bus.delay(SILENCE);
        return Ok(driver.has_reply().then(|| driver.words(1)));
    }
    let [_] = driver.reply::<1>().map_err(|error| format!("{error:?}"))?;
    Ok(Some(driver.words(1 + case.data.len())))
}

/// Answers at once, always with the same decision except for resets, which it grants.
pub struct Agent {
    relay: Mutex<Weak<Relay>>,
    /// The decision; None for no answer.
    pub decision: Mutex<Option<Decision>>,
    /// The VF's address.
    pub effective: Mutex<MacAddress>,
    asked: Mutex<bool>,
}

impl Agent {
    /// Puts a relay in front of this VF of igb's, with an agent that answers it.
    pub fn with_relay(config: Config, vf: Arc<dyn VfHardware>) -> (Arc<Relay>, Arc<Self>) {
        Self::of_family(IGB.double.family(), config, vf)
    }

    fn of_family(
        family: &'static Family,
        config: Config,
        vf: Arc<dyn VfHardware>,
    ) -> (Arc<Relay>, Arc<Self>) {
        let agent = Arc::new(Self {
            relay: Mutex::default(),
            decision: Mutex::default(),
            effective: Mutex::new(MacAddress::new(EFFECTIVE)),
            asked: Mutex::default(),
        });
        let relay =
            Arc::new(Relay::start(config, family, vf, agent.clone(), &ThreadStart::default()).unwrap());
        *agent.relay.lock().unwrap() = Arc::downgrade(&relay);
        (relay, agent)
    }
}

impl Authority for Agent {
    fn request(&self, guest_request: GuestRequest) -> Result<(), Unreachable> {
        let decision = if guest_request.request == Request::Reset {
            Some(Decision::Grant { how: How::Local })
        } else {
            *self.asked.lock().unwrap() = true;
            *self.decision.lock().unwrap()
        };
        if let (Some(relay), Some(decision)) = (self.relay.lock().unwrap().upgrade(), decision) {
            let effective_mac = *self.effective.lock().unwrap();
            relay.verdict(Verdict { seq: guest_request.seq, effective_mac, decision });
        }
        Ok(())
    }

    fn event(&self, _event: RelayEvent) {}
}

/// The page as the guest reaches it.
pub struct Page(pub Arc<MailboxPage>);

impl Bus for Page {
    fn read(&mut self, offset: u64) -> u32 {
        let mut data = [0xee; 4];
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

/// The registers without a relay in between.
pub struct Direct(pub Arc<dyn VfHardware>);

impl Bus for Direct {
    fn read(&mut self, offset: u64) -> u32 {
        let mut data = [0xee; 4];
        self.0.bar_read(0, offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&mut self, offset: u64, value: u32) {
        self.0.bar_write(0, offset, &value.to_le_bytes());
    }

    fn delay(&mut self, time: Duration) {
        std::thread::sleep(time);
    }
}

/// A VF, and the messages sent by its mailbox: each up to its last word that is not zero.
struct Witness {
    hardware: Arc<dyn VfHardware>,
    family: &'static Family,
    words: Mutex<[u32; BUFFER_WORDS]>,
    sent: Mutex<Vec<Vec<u32>>>,
}

impl VfHardware for Witness {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.hardware.config_read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        self.hardware.config_write(offset, data);
    }

    fn bar(&self, index: usize) -> BarInfo {
        self.hardware.bar(index)
    }

    fn bar_read(&self, index: usize, offset: u64, data: &mut [u8]) {
        self.hardware.bar_read(index, offset, data);
    }

    fn bar_write(&self, index: usize, offset: u64, data: &[u8]) {
        if let (0, Ok(value)) = (index, data.try_into().map(u32::from_le_bytes)) {
            let mut words = self.words.lock().unwrap();
            match self.family.layout.register(offset) {
                Register::Buffer(word) => words[word] = value,
                Register::Mailbox if value & REQ != 0 => {
                    let len = words.iter().rposition(|word| *word != 0).map_or(0, |last| last + 1);
                    self.sent.lock().unwrap().push(words[..len].to_vec());
                }
                _ => {}
            }
        }
        self.hardware.bar_write(index, offset, data);
    }

    fn map_bar(&self, index: usize, offset: u64, len: u64) -> io::Result<Arc<dyn HostMemory>> {
        self.hardware.map_bar(index, offset, len)
    }

    fn irq_count(&self, kind: IrqKind) -> u32 {
        self.hardware.irq_count(kind)
    }

    fn enable_irqs(&self, kind: IrqKind, triggers: &[EventFd]) -> io::Result<()> {
        self.hardware.enable_irqs(kind, triggers)
    }

    fn disable_irqs(&self, kind: IrqKind) -> io::Result<()> {
        self.hardware.disable_irqs(kind)
    }

    fn reset(&self) -> io::Result<()> {
        self.hardware.reset()
    }
}
