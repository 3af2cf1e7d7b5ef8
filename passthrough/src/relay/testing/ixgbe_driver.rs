// SPDX-License-Identifier: Apache-2.0

//! The mailbox code of the stock ixgbevf driver, step by step (Linux 6.12, `ixgbevf/mbx.c`, `vf.c` and
//! `ixgbevf_main.c`), with a record of its messages and the replies to them.

use std::time::Duration;

use netpolicy::MacAddress;

use super::{
    driver::{Bus, Failed},
    ixgbe::QUEUES,
};

const CONTROL: u64 = 0;
const STATUS: u64 = 0x8;
const LINKS: u64 = 0x10;
const BUFFER: u64 = 0x200;
const MAILBOX: u64 = 0x2fc;
const CTS: u32 = 0x2000_0000;
const R2C: u32 = 0xb0;
const POLL: Duration = Duration::from_micros(500);

/// The driver's state.
pub struct IxgbevfDriver<B> {
    pub bus: B,
    /// The netdev's address, which is also `mac.addr` and `perm_addr`.
    pub mac: MacAddress,
    /// The agreed version's code.
    pub version: Option<u32>,
    /// Messages and replies since the last [`told`](Self::told), as in `8,4,0 -> a0000008`.
    record: Vec<String>,
    cached: u32,
    link_wanted: bool,
}

impl<B: Bus> IxgbevfDriver<B> {
    pub fn new(bus: B) -> Self {
        let mac = MacAddress::ZERO;
        Self { bus, mac, version: None, record: Vec::new(), cached: 0, link_wanted: true }
    }

    /// Takes the record.
    pub fn told(&mut self) -> Vec<String> {
        std::mem::take(&mut self.record)
    }

    fn status(&mut self) -> u32 {
        let value = self.bus.read(MAILBOX) | self.cached;
        self.cached |= value & R2C;
        value
    }

    fn check(&mut self, mask: u32) -> bool {
        let set = self.status() & mask != 0;
        self.cached &= !mask;
        set
    }

    /// `ixgbevf_obtain_mbx_lock_vf`. The written value has all bits that were read.
    fn take_buffer(&mut self) -> Result<(), Failed> {
        for _ in 0..2000 {
            let value = self.status() | 0x4;
            self.bus.write(MAILBOX, value);
            if self.status() & 0x4 != 0 {
                return Ok(());
            }
            self.bus.delay(POLL);
        }
        Err(Failed::NotSent)
    }

    /// `ixgbevf_write_mbx_vf_legacy`: it does not wait for PFACK.
    pub fn post(&mut self, words: &[u32]) -> Result<(), Failed> {
        self.take_buffer()?;
        for mask in [0x10, 0x20, 0x10, 0x20] {
            self.check(mask);
        }
        for (index, word) in words.iter().enumerate() {
            self.bus.write(BUFFER + 4 * index as u64, *word);
        }
        self.bus.write(MAILBOX, 0x1);
        Ok(())
    }

    fn fetch(&mut self, count: usize) -> Result<Vec<u32>, Failed> {
        self.take_buffer()?;
        let words = (0..count).map(|index| self.bus.read(BUFFER + 4 * index as u64)).collect();
        self.bus.write(MAILBOX, 0x2);
        Ok(words)
    }

    fn reply(&mut self, count: usize) -> Result<Vec<u32>, Failed> {
        for _ in 0..2000 {
            if self.check(0x10) {
                return self.fetch(count);
            }
            self.bus.delay(POLL);
        }
        Err(Failed::NoReply)
    }

    /// `ixgbevf_write_msg_read_ack`, with a record of as many words as matter.
    pub fn call(&mut self, words: &[u32], count: usize) -> Result<Vec<u32>, Failed> {
        self.post(words)?;
        let reply = self.reply(count)?;
        self.note(words, &reply);
        Ok(reply)
    }

    fn note(&mut self, words: &[u32], reply: &[u32]) {
        let list = |words: &[u32]| words.iter().map(|word| format!("{word:x}")).collect::<Vec<_>>().join(",");
        self.record.push(format!("{} -> {}", list(words), list(reply)));
    }

    /// `ixgbevf_reset_hw_vf`.
    pub fn reset_hw(&mut self) -> Result<(), Failed> {
        self.version = None;
        self.bus.write(CONTROL, 0x0400_0000);
        self.bus.read(STATUS);
        let mut tries = 200;
        while self.check(0xc0) && tries > 0 {
            tries -= 1;
            self.bus.delay(Duration::from_micros(5));
        }
        if tries == 0 {
            return Err(Failed::StillResetting);
        }
        self.post(&[1])?;
        self.bus.delay(Duration::from_millis(10));
        let reply = self.reply(4)?;
        self.note(&[1], &reply);
        match reply[0] {
            0x8000_0001 => self.mac = address(reply[1], reply[2]),
            0x4000_0001 => {}
            _ => return Err(Failed::StillResetting),
        }
        Ok(())
    }

    /// `ixgbevf_negotiate_api`.
    pub fn negotiate(&mut self) {
        for version in [8, 7, 6, 5, 4, 3, 2, 0] {
            let reply = self.call(&[8, version, 0], 1);
            if reply.is_ok_and(|reply| reply[0] & !CTS == 0x8000_0008) {
                self.version = Some(version);
                return;
            }
        }
    }

    /// `ixgbevf_reset`, at probe and at "down".
    pub fn reset(&mut self) -> Result<(), Failed> {
        self.reset_hw()?;
        self.negotiate();
        Ok(())
    }

    /// `ixgbevf_sw_init`: reset, agreement, number of queues.
    pub fn probe(&mut self) -> Result<(), Failed> {
        self.reset()?;
        self.queues()
    }

    fn queues(&mut self) -> Result<(), Failed> {
        let reply = self.call(&[9, 0, 0, 0, 0], 5)?;
        assert!(reply[0] & !CTS != 0x8000_0009 || reply[1] == QUEUES, "{reply:x?}");
        Ok(())
    }

    /// `ixgbevf_open` with these multicast hashes, an MTU of 1500 bytes and no VLAN.
    pub fn up(&mut self, hashes: &[u16]) -> Result<(), Failed> {
        self.queues()?;
        self.set_rx_mode(hashes)?;
        self.call(&[5, 0x5ee], 1)?;
        let mac = self.mac;
        self.set_mac(mac)?;
        self.call(&[0x10, 0], 2)?;
        self.link_wanted = true;
        Ok(())
    }

    /// `ixgbevf_set_rx_mode`.
    pub fn set_rx_mode(&mut self, hashes: &[u16]) -> Result<(), Failed> {
        self.call(&[0xc, 1], 2)?;
        let mut words = [0; 16];
        words[0] = 3 | u32::try_from(hashes.len()).unwrap() << 16;
        for (word, pair) in words[1..].iter_mut().zip(hashes.chunks(2)) {
            *word = pair.iter().rev().fold(0, |word, hash| word << 16 | u32::from(*hash));
        }
        self.call(&words, 1)?;
        self.call(&[6, 0, 0], 1)?;
        Ok(())
    }

    /// `ip link set dev eth0 address`: false is EPERM. The netdev then keeps its address.
    pub fn set_mac(&mut self, mac: MacAddress) -> Result<bool, Failed> {
        let [a, b, c, d, e, f] = mac.bytes();
        let words = [2, u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, 0, 0])];
        let accepted = self.call(&words, 1)?[0] & !CTS != 0x4000_0002;
        if accepted {
            self.mac = mac;
        }
        Ok(accepted)
    }

    /// The link check, every 2 s and after each mailbox interrupt. True if it schedules a reset.
    pub fn tick(&mut self) -> bool {
        if self.check(0xc0) {
            self.link_wanted = true;
        }
        if !self.link_wanted || self.bus.read(LINKS) & 1 << 30 == 0 {
            return false;
        }
        let Ok(words) = self.fetch(1) else { return false };
        if words[0] & CTS == 0 {
            return words[0] & 0x4000_0000 != 0;
        }
        self.link_wanted = false;
        false
    }
}

/// DPDK's interrupt handler (22.11): it peeks at word 0. True if the application gets a reset event.
pub fn dpdk_interrupt(bus: &mut impl Bus) -> bool {
    if bus.read(BUFFER) != 0x100 {
        return false;
    }
    bus.write(MAILBOX, 0x2);
    true
}

fn address(first: u32, second: u32) -> MacAddress {
    let ([a, b, c, d], [e, f, ..]) = (first.to_le_bytes(), second.to_le_bytes());
    MacAddress::new([a, b, c, d, e, f])
}
