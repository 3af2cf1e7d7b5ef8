// SPDX-License-Identifier: Apache-2.0

//! A VF in front of a PF driver. The driver's messages, registers and habits are those of a [`Double`]; its habits are
//! those of Linux' igb (6.12) if the double has no others: "clear to send" ends with every reset, and messages before a
//! reset message are dropped for 2 s.

use std::{
    collections::BTreeSet,
    io,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use devices::memory::HostMemory;
use netpolicy::MacAddress;
use vmm_sys_util::eventfd::EventFd;

use super::{driver::Offsets, igb::Igb, ixgbe};
use crate::{
    channel::mailbox::{
        layout::Register,
        message::BUFFER_WORDS,
        register_bits::{
            ACK, ACK_MESSAGE, CONTROL_RST, CTS, NACK_MESSAGE, PF_CONTROL, PFACK, PFSTS, PFU, READ_TO_CLEAR,
            REQ, RSTD, RSTI, VFU,
        },
        vf_mailbox::Clock,
    },
    family::Family,
    hardware::{BarInfo, IrqKind, VfHardware},
};

/// A family as doubles of its drivers play it. Written from the drivers' sources, without the family's codec.
pub trait Double: Sync {
    /// The family.
    fn family(&self) -> &'static Family;

    /// The VF driver's offsets.
    fn offsets(&self) -> Offsets;

    /// Carries out a reset message, and returns the PF's reply. From then on the PF listens.
    fn reset_message(&self, pf: &mut Pf) -> Vec<u32>;

    /// Carries out any other message, and returns the PF's reply. The PF has seen the VF's reset.
    fn handle(&self, pf: &mut Pf, words: &[u32; BUFFER_WORDS]) -> Vec<u32>;

    /// Notes VTCTRL.RST, or a reset of the function.
    fn vf_reset(&self, pf: &mut Pf, now: Duration) {
        pf.clear_to_send = false;
        pf.last_nack = Some(now);
        pf.forget_own_mac();
    }

    /// Notes that a reset of the PF has begun.
    fn pf_reset(&self, pf: &mut Pf) {
        pf.clear_to_send = false;
        pf.forget_own_mac();
    }

    /// The PF's response to a message while it does not listen.
    fn unheard(&self, pf: &mut Pf, word: u32, now: Duration) -> Option<Vec<u32>> {
        let speaks = pf.last_nack.is_none_or(|last| now > last + Duration::from_secs(2));
        speaks.then(|| {
            pf.last_nack = Some(now);
            vec![word | NACK_MESSAGE]
        })
    }

    /// The PF's response to an acknowledgement while it does not listen.
    fn acknowledged(&self) -> Option<Vec<u32>> {
        None
    }
}

impl Pf {
    fn forget_own_mac(&mut self) {
        if !self.mac_latched {
            self.mac = MacAddress::ZERO;
        }
    }
}

/// The most messages to keep.
const MAX_RECEIVED: usize = 100_000;

/// The PF's state of this VF, and its record of events.
#[derive(Clone, Debug, Default)]
pub struct Pf {
    /// Programmed address; zero for none.
    pub mac: MacAddress,
    /// Set by the administrator: the VF may not change it.
    pub mac_latched: bool,
    pub trusted: bool,
    pub port_vlan: bool,
    pub vlans: BTreeSet<u32>,
    pub filters: Vec<MacAddress>,
    pub multicast: Vec<u16>,
    pub all_multicast: bool,
    pub max_frame: u32,
    pub clear_to_send: bool,
    /// Every message, as the PF read it.
    pub received: Vec<[u32; BUFFER_WORDS]>,
    /// "Unhandled Msg" in the host's log.
    pub unhandled: u64,
    /// Warnings in the host's log.
    pub warnings: u64,
    /// VTCTRL.RST writes.
    pub vf_resets: u64,
    /// The masks by which mailbox interrupts were triggered in VTEICS.
    pub triggered: Vec<u32>,
    /// Writes to passed registers.
    pub passed: Vec<(u64, u32)>,
    /// The interface is down: no message is taken.
    pub down: bool,
    /// Takes messages, and responds to none.
    pub mute: bool,
    /// Holds the buffer (PFU).
    pub busy: bool,
    /// Pings the VF between a message and its reply.
    pub pings_first: bool,
    /// Writes a ping at the same time as the VF's next message, and so loses that message.
    pub collides: bool,
    /// Acknowledgements by the VF.
    pub acknowledgements: u64,
    /// State that only ixgbe has.
    pub ixgbe: ixgbe::IxgbePf,
    last_nack: Option<Duration>,
}

#[derive(Default)]
struct State {
    pf: Pf,
    words: [u32; BUFFER_WORDS],
    vfu: bool,
    bits: u32,
    rsti: bool,
    removed: bool,
    /// A reply that waits for the VF to acknowledge a ping.
    after_ping: Option<Vec<u32>>,
    /// Messages that wait for [`FakeVf::answer_late`].
    held: Option<Vec<[u32; BUFFER_WORDS]>>,
}

/// The VF.
pub struct FakeVf {
    double: &'static dyn Double,
    state: Mutex<State>,
    clock: Arc<dyn Clock>,
}

impl FakeVf {
    /// A VF of igb with the address `mac` set by the administrator, as the agent always does.
    pub fn new(mac: MacAddress, clock: Arc<dyn Clock>) -> Arc<Self> {
        Self::of(&Igb, mac, clock)
    }

    /// The same for another family.
    pub fn of(double: &'static dyn Double, mac: MacAddress, clock: Arc<dyn Clock>) -> Arc<Self> {
        let vf = Self { double, state: Mutex::default(), clock };
        vf.set_admin_mac(mac);
        Arc::new(vf)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// A copy of the PF's state.
    pub fn pf(&self) -> Pf {
        self.lock().pf.clone()
    }

    /// Changes the PF's state.
    pub fn with_pf(&self, change: impl FnOnce(&mut Pf)) {
        change(&mut self.lock().pf);
    }

    /// IFLA_VF_MAC: the address is programmed at once, without an event for the VF.
    pub fn set_admin_mac(&self, mac: MacAddress) {
        self.with_pf(|pf| (pf.mac, pf.mac_latched) = (mac, !mac.is_zero()));
    }

    /// A ping, as at every link change.
    pub fn ping(&self) {
        let mut state = self.lock();
        state.words[0] = PF_CONTROL | if state.pf.clear_to_send { CTS } else { 0 };
        state.bits |= PFSTS;
    }

    /// The PF's reset begins, as `ip link set … down` or a transmit hang cause it.
    pub fn pf_reset_begins(&self) {
        let mut state = self.lock();
        self.double.pf_reset(&mut state.pf);
        state.pf.down = true;
        state.rsti = true;
        drop(state);
        self.ping();
    }

    /// A reset of the PF that ends before the next poll, with a lost ping.
    pub fn pf_reset_at_once(&self) {
        self.pf_reset_begins();
        self.lock().bits &= !PFSTS;
        self.pf_reset_ends();
    }

    /// Whether the VF owns the buffer: the PF's driver would wait for it.
    pub fn holds_buffer(&self) -> bool {
        self.lock().vfu
    }

    /// The PF's reset ends.
    pub fn pf_reset_ends(&self) {
        let mut state = self.lock();
        state.pf.down = false;
        state.rsti = false;
        state.bits |= RSTD;
    }

    /// From now on the PF takes messages, and responds to them in [`answer_late`](Self::answer_late).
    pub fn hold(&self) {
        self.lock().held = Some(Vec::new());
    }

    /// Responds to the held messages, and holds no more.
    pub fn answer_late(&self) {
        let mut state = self.lock();
        for words in state.held.take().unwrap_or_default() {
            let now = self.clock.now();
            state.answer(self.double, words, now);
        }
    }

    /// The host removes the VF: all-ones.
    pub fn remove(&self) {
        self.lock().removed = true;
    }
}

impl State {
    fn take_message(&mut self, double: &dyn Double, now: Duration) {
        if self.pf.down {
            return;
        }
        if std::mem::take(&mut self.pf.collides) {
            self.words[0] = PF_CONTROL | if self.pf.clear_to_send { CTS } else { 0 };
            self.bits |= PFSTS;
            return;
        }
        let words = self.words;
        if self.pf.received.len() < MAX_RECEIVED {
            self.pf.received.push(words);
        }
        self.bits |= PFACK;
        match &mut self.held {
            Some(held) => held.push(words),
            None => self.answer(double, words, now),
        }
    }

    fn answer(&mut self, double: &dyn Double, words: [u32; BUFFER_WORDS], now: Duration) {
        let word = words[0];
        if word & (ACK_MESSAGE | NACK_MESSAGE) != 0 || self.pf.mute {
            return;
        }
        if word == 1 {
            self.pf.clear_to_send = true;
            let reply = double.reset_message(&mut self.pf);
            self.reply(&reply);
            return;
        }
        if !self.pf.clear_to_send {
            if let Some(reply) = double.unheard(&mut self.pf, word, now) {
                self.reply(&reply);
            }
            return;
        }
        let reply = double.handle(&mut self.pf, &words);
        self.reply(&reply);
    }

    fn reply(&mut self, words: &[u32]) {
        if std::mem::take(&mut self.pf.pings_first) {
            self.after_ping = Some(words.to_vec());
            self.words[0] = PF_CONTROL | CTS;
            self.bits |= PFSTS;
            return;
        }
        self.words[..words.len()].copy_from_slice(words);
        self.bits |= PFSTS;
    }
}

impl VfHardware for FakeVf {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0);
        let (vendor, device) = self.double.family().ids[0];
        let ids = u32::from(vendor) | u32::from(device) << 16;
        if offset == 0 && data.len() == 4 {
            data.copy_from_slice(&ids.to_le_bytes());
        }
    }

    fn config_write(&self, _offset: u16, _data: &[u8]) {}

    fn bar(&self, index: usize) -> BarInfo {
        let size = if index == self.double.family().layout.bar { 0x4000 } else { 0 };
        BarInfo { size, ..BarInfo::default() }
    }

    fn bar_read(&self, index: usize, offset: u64, data: &mut [u8]) {
        let layout = &self.double.family().layout;
        let mut state = self.lock();
        if state.removed || index != layout.bar || data.len() != 4 {
            data.fill(0xff);
            return;
        }
        let value = match layout.register(offset) {
            Register::Mailbox => {
                let bits = state.bits;
                state.bits &= !READ_TO_CLEAR;
                bits | if state.vfu { VFU } else { 0 }
                    | if state.pf.busy { PFU } else { 0 }
                    | if state.rsti { RSTI } else { 0 }
            }
            Register::Buffer(word) => state.words[word],
            // STATUS: link up, full duplex, 1000 Mbit/s.
            Register::Passed { .. } if offset == 8 => 0x83,
            // The value identifies the offset of the read.
            Register::Passed { .. } if offset != u64::from(layout.mailbox_vector) => {
                0x5a5a_0000 | u32::try_from(offset).unwrap()
            }
            // VTIVAR_MISC: vector 2.
            _ if offset == u64::from(layout.mailbox_vector) => 0x82,
            _ => 0,
        };
        data.copy_from_slice(&value.to_le_bytes());
    }

    fn bar_write(&self, index: usize, offset: u64, data: &[u8]) {
        let layout = &self.double.family().layout;
        let mut state = self.lock();
        let Ok(value) = data.try_into().map(u32::from_le_bytes) else { return };
        if state.removed || index != layout.bar {
            return;
        }
        match layout.register(offset) {
            Register::Control if value & CONTROL_RST != 0 => {
                state.pf.vf_resets += 1;
                self.double.vf_reset(&mut state.pf, self.clock.now());
                state.vfu = false;
            }
            Register::Mailbox => {
                state.vfu = value & VFU != 0 && !state.pf.busy;
                if value & ACK != 0 {
                    state.pf.acknowledgements += 1;
                    let unheard = if state.pf.clear_to_send { None } else { self.double.acknowledged() };
                    if let Some(words) = state.after_ping.take().or(unheard) {
                        state.reply(&words);
                    }
                }
                if value & REQ != 0 {
                    let now = self.clock.now();
                    state.take_message(self.double, now);
                }
            }
            Register::Buffer(word) => state.words[word] = value,
            Register::Passed { .. } if offset != u64::from(layout.trigger) => {
                state.pf.passed.push((offset, value));
            }
            _ if offset == u64::from(layout.trigger) => state.pf.triggered.push(value),
            _ => {}
        }
    }

    fn map_bar(&self, _index: usize, _offset: u64, _len: u64) -> io::Result<Arc<dyn HostMemory>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn irq_count(&self, kind: IrqKind) -> u32 {
        if kind == IrqKind::Msix { 3 } else { 0 }
    }

    fn enable_irqs(&self, _kind: IrqKind, _triggers: &[EventFd]) -> io::Result<()> {
        Ok(())
    }

    fn disable_irqs(&self, _kind: IrqKind) -> io::Result<()> {
        Ok(())
    }

    fn reset(&self) -> io::Result<()> {
        let mut state = self.lock();
        self.double.vf_reset(&mut state.pf, self.clock.now());
        (state.vfu, state.bits, state.words) = (false, 0, [0; BUFFER_WORDS]);
        Ok(())
    }
}
