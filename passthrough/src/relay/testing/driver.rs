// SPDX-License-Identifier: Apache-2.0

//! The mailbox code of the stock igbvf driver, step by step (Linux 6.12): its writes, polls and conclusions. Drivers of
//! other families do the same at other [`Offsets`].

use std::time::Duration;

use netpolicy::MacAddress;

/// The registers that a driver's mailbox code uses.
#[derive(Clone, Copy, Debug)]
pub struct Offsets {
    pub control: u64,
    pub status: u64,
    pub buffer: u64,
    pub mailbox: u64,
}

impl Offsets {
    /// VTCTRL, STATUS, VMBMEM and V2PMAILBOX.
    pub const IGBVF: Self = Self { control: 0x0000, status: 0x0008, buffer: 0x0800, mailbox: 0x0c40 };
    /// VFCTRL, VFSTATUS, VFMBMEM and VFMAILBOX.
    pub const IXGBEVF: Self = Self { control: 0x0000, status: 0x0008, buffer: 0x0200, mailbox: 0x02fc };
}

const RST: u32 = 0x0400_0000;
const R2C: u32 = 0xb0;
const CTS: u32 = 0x2000_0000;
const NACK: u32 = 0x4000_0000;
const ACK: u32 = 0x8000_0000;

/// The driver's access to its VF.
pub trait Bus {
    fn read(&mut self, offset: u64) -> u32;
    fn write(&mut self, offset: u64, value: u32);
    /// udelay, msleep.
    fn delay(&mut self, time: Duration);
}

/// The reason why a mailbox operation failed (`-E1000_ERR_MBX`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failed {
    /// The driver did not get the buffer: it sent nothing and reports nothing.
    NotSent,
    /// No PFACK within 1 s: the mailbox is dead until the next reset.
    NoAck,
    /// No PFSTS within 1 s: the mailbox is dead until the next reset.
    NoReply,
    /// "PF still resetting".
    StillResetting,
}

/// The driver's state.
pub struct Driver<B> {
    pub bus: B,
    at: Offsets,
    /// `hw.mac.addr`: the address that it last requested.
    pub mac: MacAddress,
    /// `hw.mac.perm_addr`: the address in the last reset reply.
    pub perm: MacAddress,
    /// The address that `ip link` shows.
    pub netdev: MacAddress,
    cached: u32,
    timeout: u32,
    link_wanted: bool,
}

impl<B: Bus> Driver<B> {
    pub fn new(bus: B) -> Self {
        Self::with(bus, Offsets::IGBVF)
    }

    pub fn with(bus: B, at: Offsets) -> Self {
        let zero = MacAddress::ZERO;
        Self { bus, at, mac: zero, perm: zero, netdev: zero, cached: 0, timeout: 0, link_wanted: true }
    }

    fn status(&mut self) -> u32 {
        let value = self.bus.read(self.at.mailbox) | self.cached;
        self.cached |= value & R2C;
        value
    }

    fn check(&mut self, mask: u32) -> bool {
        let set = self.status() & mask != 0;
        self.cached &= !mask;
        set
    }

    /// Whether there is an unread reply.
    pub fn has_reply(&mut self) -> bool {
        self.check(0x10)
    }

    /// The first words of the buffer.
    pub fn words(&mut self, count: usize) -> Vec<u32> {
        let buffer = self.at.buffer;
        (0..count).map(|index| self.bus.read(buffer + 4 * index as u64)).collect()
    }

    fn take_buffer(&mut self) -> Result<(), Failed> {
        for attempt in 0..11 {
            if attempt > 0 {
                self.bus.delay(Duration::from_millis(1));
            }
            self.bus.write(self.at.mailbox, 0x4);
            if self.status() & 0x4 != 0 {
                return Ok(());
            }
        }
        Err(Failed::NotSent)
    }

    fn poll(&mut self, mask: u32, failed: Failed) -> Result<(), Failed> {
        for _ in 0..self.timeout {
            if self.check(mask) {
                return Ok(());
            }
            self.bus.delay(Duration::from_micros(500));
        }
        self.timeout = 0;
        Err(failed)
    }

    /// `e1000_write_posted_mbx`.
    pub fn post(&mut self, words: &[u32]) -> Result<(), Failed> {
        if self.timeout == 0 {
            return Err(Failed::NotSent);
        }
        self.take_buffer()?;
        // Flush: two reads.
        self.check(0x20);
        self.check(0x10);
        for (index, word) in words.iter().enumerate() {
            self.bus.write(self.at.buffer + 4 * index as u64, *word);
        }
        self.bus.write(self.at.mailbox, 0x1);
        self.poll(0x20, Failed::NoAck)
    }

    /// `e1000_read_posted_mbx`.
    pub fn reply<const N: usize>(&mut self) -> Result<[u32; N], Failed> {
        self.poll(0x10, Failed::NoReply)?;
        self.fetch()
    }

    fn fetch<const N: usize>(&mut self) -> Result<[u32; N], Failed> {
        self.take_buffer()?;
        let buffer = self.at.buffer;
        let words = std::array::from_fn(|index| self.bus.read(buffer + 4 * index as u64));
        self.bus.write(self.at.mailbox, 0x2);
        Ok(words)
    }

    /// Posts, and returns word 0 of the reply.
    pub fn call(&mut self, words: &[u32]) -> Result<u32, Failed> {
        self.post(words)?;
        Ok(self.reply::<1>()?[0])
    }

    /// `e1000_reset_hw_vf`.
    pub fn reset_hw(&mut self) -> Result<(), Failed> {
        self.bus.write(self.at.control, RST);
        let mut tries = 200;
        while self.check(0xc0) && tries > 0 {
            tries -= 1;
            self.bus.delay(Duration::from_micros(5));
        }
        if tries == 0 {
            return Err(Failed::StillResetting);
        }
        self.timeout = 2000;
        self.post(&[1])?;
        self.bus.delay(Duration::from_millis(10));
        let [word, first, second] = self.reply::<3>()?;
        match word {
            word if word == ACK | 1 => self.perm = address(first, second),
            word if word == NACK | 1 => self.perm = MacAddress::ZERO,
            _ => return Err(Failed::StillResetting),
        }
        Ok(())
    }

    /// `igbvf_reset`: reset, restore the address, adopt the result.
    pub fn reset(&mut self) -> Result<(), Failed> {
        let result = self.reset_hw();
        self.rar_set(self.mac);
        if self.mac.is_assignable() {
            self.netdev = self.mac;
        }
        self.link_wanted = true;
        result
    }

    /// `igbvf_probe`.
    pub fn probe(&mut self) {
        if self.reset_hw().is_ok() {
            self.mac = self.perm;
            self.netdev = self.mac;
        }
        let _ = self.reset();
    }

    fn rar_set(&mut self, mac: MacAddress) {
        self.mac = mac;
        let [a, b, c, d, e, f] = mac.bytes();
        let words = [2, u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, 0, 0])];
        let reply = self.post(&words).and_then(|()| self.reply::<3>());
        if reply.is_ok_and(|[word, ..]| word & !CTS == NACK | 2) {
            self.mac = self.perm;
        }
    }

    /// `ip link set dev eth0 address`: false is EADDRNOTAVAIL.
    pub fn set_mac(&mut self, mac: MacAddress) -> bool {
        self.rar_set(mac);
        if self.mac != mac {
            return false;
        }
        self.netdev = mac;
        true
    }

    /// `ip link set dev eth0 down`, then `up`.
    pub fn down_up(&mut self) {
        let _ = self.reset();
        let _ = self.reset();
    }

    /// The link check, every two seconds. True if it schedules a reset.
    pub fn watchdog(&mut self) -> bool {
        if self.check(0xc0) || self.timeout == 0 {
            self.link_wanted = true;
        }
        if !self.link_wanted || self.bus.read(self.at.status) & 2 == 0 {
            return false;
        }
        let Ok([word]) = self.fetch::<1>() else { return false };
        if word & CTS == 0 {
            return word & NACK != 0;
        }
        if self.timeout == 0 {
            return true;
        }
        self.link_wanted = false;
        false
    }
}

fn address(first: u32, second: u32) -> MacAddress {
    let ([a, b, c, d], [e, f, ..]) = (first.to_le_bytes(), second.to_le_bytes());
    MacAddress::new([a, b, c, d, e, f])
}
