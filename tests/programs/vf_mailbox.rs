// SPDX-License-Identifier: Apache-2.0

//! Drives a VF's mailbox by its registers, in place of the VF's driver, also with messages that no driver sends.
//!
//! ```text
//! vf-mailbox BDF read OFFSET...       registers of BAR 0, in hexadecimal, one line each
//! vf-mailbox BDF reset                device reset, then the RESET message: prints the address in the PF's reply
//! vf-mailbox BDF send WORD...         one message (words in hexadecimal): prints the reply's first word
//! vf-mailbox BDF sweep                opcodes, lengths, counts and flag bits: prints the granted messages
//! vf-mailbox BDF flood SECONDS        requests one after the other, without waiting
//! vf-mailbox BDF race SECONDS         the same from two threads at once
//! vf-mailbox BDF abort COUNT          device resets while a message is in flight
//! vf-mailbox BDF time COUNT MAC MAC   round trips of SET_MAC with the two addresses in turn: median and 99th percentile
//! vf-mailbox BDF late WORD... -- WORD...  two messages, the second right after the first's acknowledgement (igbvf)
//! ```
//!
//! The function must have no driver, or one that does not use it at that moment. Offsets and handshake are those of
//! Linux' `igbvf/regs.h` and `igbvf/mbx.c`. The tests run the program in guests and, for `read`, on the lab's host.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

use std::{
    fs::{File, OpenOptions},
    ptr::NonNull,
    thread,
    time::{Duration, Instant},
};

use rustix::mm::{MapFlags, ProtFlags, mmap};

const CONTROL: usize = 0x0000;
const CONTROL_RESET: u32 = 1 << 26;
const MAILBOX: usize = 0x0c40;
const BUFFER: usize = 0x0800;
const WORDS: usize = 16;

const REQUEST: u32 = 0x01;
const ACKNOWLEDGE: u32 = 0x02;
const OWNED: u32 = 0x04;
const PF_STATUS: u32 = 0x10;
const PF_ACKNOWLEDGE: u32 = 0x20;
const RESETTING: u32 = 0x40;

const ACK: u32 = 0x8000_0000;
const NACK: u32 = 0x4000_0000;
const CTS: u32 = 0x2000_0000;

/// igbvf's timeout: 2000 polls, 500 us apart, for each of acknowledgement and reply.
const POLL: Duration = Duration::from_micros(500);
const PATIENCE: Duration = Duration::from_secs(1);

/// BAR 0 of a function.
#[derive(Clone, Copy)]
struct Bar(NonNull<u32>, usize);

// SAFETY: registers, not memory: any thread may access them, and the program never unmaps them.
unsafe impl Send for Bar {}

impl Bar {
    fn open(bdf: &str) -> Self {
        let device = format!("/sys/bus/pci/devices/{bdf}");
        // Turns memory decoding on; fails if a driver has done so already.
        let _ = std::fs::write(format!("{device}/enable"), "1");
        let path = format!("{device}/resource0");
        let file: File =
            OpenOptions::new().read(true).write(true).open(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
        let length = usize::try_from(file.metadata().unwrap().len()).unwrap();
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let base = unsafe {
            mmap(std::ptr::null_mut(), length, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &file, 0)
        };
        let base = base.unwrap_or_else(|e| panic!("{path} cannot be mapped: {e}"));
        Self(NonNull::new(base.cast()).unwrap(), length)
    }

    fn at(self, offset: usize) -> NonNull<u32> {
        assert!(offset.is_multiple_of(4) && offset < self.1, "{offset:#x} is no register");
        // SAFETY: inside of the mapping, as checked.
        unsafe { self.0.add(offset / 4) }
    }

    fn read(self, offset: usize) -> u32 {
        // SAFETY: a mapped, aligned register.
        unsafe { self.at(offset).read_volatile() }
    }

    fn write(self, offset: usize, value: u32) {
        // SAFETY: a mapped, aligned register.
        unsafe { self.at(offset).write_volatile(value) }
    }

    fn take_buffer(self) -> bool {
        (0..11).any(|_| {
            self.write(MAILBOX, OWNED);
            let taken = self.read(MAILBOX) & OWNED != 0;
            if !taken {
                thread::sleep(Duration::from_millis(1));
            }
            taken
        })
    }

    /// Posts a message; false if the buffer is not free in time.
    fn post(self, words: &[u32]) -> bool {
        if !self.take_buffer() {
            return false;
        }
        self.read(MAILBOX);
        self.read(MAILBOX);
        for (index, word) in words.iter().take(WORDS).enumerate() {
            self.write(BUFFER + 4 * index, *word);
        }
        self.write(MAILBOX, REQUEST);
        true
    }

    /// Waits for bits of the mailbox register; `seen` gathers bits that reading clears.
    fn wait(self, bit: u32, seen: &mut u32) -> bool {
        let deadline = Instant::now() + PATIENCE;
        loop {
            *seen |= self.read(MAILBOX);
            if *seen & bit != 0 {
                return true;
            }
            if Instant::now() >= deadline {
                return false;
            }
            let until = Instant::now() + POLL;
            while Instant::now() < until {
                std::hint::spin_loop();
            }
        }
    }

    /// Sends a message and waits for its reply.
    fn exchange(self, words: &[u32]) -> Option<[u32; 3]> {
        let mut seen = 0;
        if !self.post(words) || !self.wait(PF_ACKNOWLEDGE, &mut seen) || !self.wait(PF_STATUS, &mut seen) {
            return None;
        }
        self.take_buffer();
        let reply = [0, 1, 2].map(|index| self.read(BUFFER + 4 * index));
        self.write(MAILBOX, ACKNOWLEDGE);
        Some(reply)
    }

    /// Resets as igbvf does: the device, 10 ms, the message.
    fn reset(self) -> Option<[u8; 6]> {
        self.write(CONTROL, CONTROL_RESET);
        let deadline = Instant::now() + PATIENCE;
        while self.read(MAILBOX) & RESETTING != 0 && Instant::now() < deadline {}
        let reply = self.exchange(&[1])?;
        if reply[0] != 0x8000_0001 {
            return None;
        }
        let ([a, b, c, d], [e, f, ..]) = (reply[1].to_le_bytes(), reply[2].to_le_bytes());
        Some([a, b, c, d, e, f])
    }

    fn must_reset(self) -> [u8; 6] {
        self.reset().expect("the RESET message is answered")
    }
}

fn address(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

fn set_mac(mac: &str) -> [u32; 3] {
    let bytes: Vec<u8> = mac.split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
    let word = |bytes: &[u8]| bytes.iter().rev().fold(0, |word, byte| (word << 8) | u32::from(*byte));
    [2, word(&bytes[..4]), word(&bytes[4..6])]
}

fn hex(words: &[String]) -> Vec<u32> {
    words.iter().map(|word| u32::from_str_radix(word.trim_start_matches("0x"), 16).unwrap()).collect()
}

/// Sends all messages that a PF must refuse to a VF without rights, and must survive.
fn sweep(bar: Bar) {
    bar.must_reset();
    let mut sent = 0;
    let mut granted = Vec::new();
    let mut try_out = |words: &[u32]| {
        sent += 1;
        if let Some(reply) = bar.exchange(words)
            && reply[0] & ACK != 0
        {
            granted.push(format!("{:08x}", words[0]));
        }
    };
    let junk = [0xffff_ffffu32; WORDS];
    let with = |word: u32| {
        let mut words = junk;
        words[0] = word;
        words
    };
    // Each opcode with each argument that has a meaning to a driver. Only the reset message may be granted.
    for opcode in (0u32..=0x10).chain([0x1f, 0x20, 0x7f, 0xff, 0x0100, 0x0101, 0x8000, 0xffff]) {
        for argument in [0u32, 1, 2, 3, 0xff] {
            if (opcode, argument) != (1, 0) {
                try_out(&with(opcode | (argument << 16)));
            }
        }
    }
    // Counts of multicast hashes above those that fit.
    for count in [31u32, 32, 64, 127, 128, 255] {
        try_out(&with(3 | (count << 16)));
    }
    // Flags that only the PF sets, on all opcodes.
    for flags in [ACK, NACK, CTS, ACK | NACK, ACK | CTS, NACK | CTS, ACK | NACK | CTS] {
        for opcode in 1u32..=6 {
            try_out(&with(opcode | flags));
        }
    }
    // One word in place of three: the PF must not read the last message's words as this one's.
    bar.write(BUFFER + 4, 0x0a00_0002);
    bar.write(BUFFER + 8, 0x0000_0a00);
    try_out(&[2]);
    println!("sweep: {sent} sent, {} granted: {}", granted.len(), granted.join(" "));
    println!("sweep: address {}", address(bar.must_reset()));
}

/// Sends requests without waiting for anything.
fn flood(bar: Bar, seconds: u64) -> u64 {
    let end = Instant::now() + Duration::from_secs(seconds);
    let refused = set_mac("02:00:00:00:0a:01");
    let mut count = 0;
    while Instant::now() < end {
        bar.write(MAILBOX, OWNED);
        for (index, word) in refused.iter().enumerate() {
            bar.write(BUFFER + 4 * index, *word);
        }
        bar.write(MAILBOX, REQUEST);
        count += 1;
    }
    count
}

fn race(bar: Bar, seconds: u64) {
    let threads: Vec<_> = (0..2).map(|_| thread::spawn(move || flood(bar, seconds))).collect();
    let counts: Vec<u64> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
    println!("race: {counts:?} requests");
}

fn abort(bar: Bar, count: u32) {
    for _ in 0..count {
        bar.post(&set_mac("02:00:00:00:0a:01"));
        bar.write(CONTROL, CONTROL_RESET);
    }
    println!("abort: address {}", address(bar.must_reset()));
}

fn time(bar: Bar, count: usize, macs: [&str; 2]) {
    // A VF without an address of its own gets a NACK, and may go on.
    bar.reset();
    let (mut times, mut granted) = (Vec::new(), 0);
    for index in 0..count {
        let words = set_mac(macs[index % 2]);
        let begun = Instant::now();
        let reply = bar.exchange(&words).expect("SET_MAC is answered");
        times.push(begun.elapsed());
        granted += usize::from(reply[0] & ACK != 0);
        // Slower than any limit on messages.
        thread::sleep(Duration::from_millis(30));
    }
    times.sort();
    let at = |percent: usize| times[(times.len() * percent / 100).min(times.len() - 1)].as_micros();
    println!("time: {count} messages, {granted} granted, median {} us, p99 {} us", at(50), at(99));
}

/// Sends as igbvf does: the next message follows the acknowledgement of the last, and not every reply is read.
fn late(bar: Bar, words: &[String]) {
    let mut messages = words.split(|word| word == "--");
    let (first, second) = (hex(messages.next().unwrap()), hex(messages.next().expect("-- WORD...")));
    bar.must_reset();
    let begun = Instant::now();
    let mut seen = 0;
    assert!(bar.post(&first), "the buffer is free");
    let acknowledged = bar.wait(PF_ACKNOWLEDGE, &mut seen);
    let took = begun.elapsed().as_millis();
    let reply = bar.exchange(&second);
    println!("late: first {acknowledged} after {took} ms, second {:08x}", reply.map_or(0, |reply| reply[0]));
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (Some(bdf), Some(command)) = (arguments.first(), arguments.get(1)) else {
        panic!("usage: vf-mailbox BDF read|reset|send|sweep|flood|race|abort|time|late ...");
    };
    let rest = &arguments[2..];
    let number = || rest.first().expect("a number").parse::<u32>().expect("a number");
    let bar = Bar::open(bdf);
    match command.as_str() {
        "read" => {
            for offset in hex(rest) {
                println!("{offset:05x} {:08x}", bar.read(offset as usize));
            }
        }
        "reset" => println!("reset: {}", bar.reset().map_or("refused".into(), address)),
        "send" => match bar.exchange(&hex(rest)) {
            Some(reply) => println!("reply: {:08x}", reply[0]),
            None => println!("reply: none"),
        },
        "sweep" => sweep(bar),
        "flood" => println!("flood: {} requests", flood(bar, number().into())),
        "race" => race(bar, number().into()),
        "abort" => abort(bar, number()),
        "time" => time(bar, number() as usize, [&rest[1], &rest[2]]),
        "late" => late(bar, rest),
        other => panic!("what is {other}?"),
    }
}
