// SPDX-License-Identifier: Apache-2.0

//! Hostile guests and vmms.

use passthrough::hardware::VfHardware;
use rustix::net::{SendFlags, send};
use vm_memory::{Bytes, GuestAddress};

use super::fixture::{Adapter, Guest, MEMORY, eventually, frame, mac, text};

/// Seeded, so that a failure can be reproduced.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    fn word(&mut self) -> u32 {
        let word = self.next() as u32;
        match self.below(6) {
            0 => word & 0xff,
            1 => word & 0xf_ffff,
            2 => 1 << (word & 31),
            3 => u32::MAX,
            // Enabled queues, valid vectors.
            4 => word | 1 << 25 | 0x80,
            _ => word,
        }
    }
}

const HOT: [u64; 24] = [
    0x0000, 0x0800, 0x0804, 0x0808, 0x0c40, 0x1520, 0x1524, 0x1580, 0x1700, 0x1740, 0x2800, 0x2804, 0x2808,
    0x280c, 0x2810, 0x2818, 0x2828, 0x3800, 0x3804, 0x3808, 0x3810, 0x3818, 0x3828, 0x0008,
];

/// Writes descriptors of all kinds, good and bad, all over the memory.
fn litter(guest: &Guest, random: &mut Random) {
    for _ in 0..64 {
        let at = random.below(MEMORY as u64 / 16) * 16;
        let command = random.pick(&[0x2b30_0000, 0x2020_0000, 0xab30_0000, 0x0b00_0000, 0, 0x2230_0000]);
        let words = [
            random.word(),
            random.pick(&[0, 0, 0, 1, u32::MAX]),
            command | random.word() & 0x4000_ffff,
            random.word(),
        ];
        for (word, offset) in words.iter().zip([0, 4, 8, 12]) {
            guest.memory.write_obj(*word, GuestAddress(at + offset)).unwrap();
        }
    }
}

fn misbehave(guest: &Guest, random: &mut Random) {
    for _ in 0..40 {
        let len = random.pick(&[4, 4, 4, 4, 4, 1, 2, 8]);
        let bar = random.pick(&[0, 0, 0, 0, 0, 0, 3, 1, 7]);
        let page = random.below(5) * 0x1000;
        let cold = page + random.below(0x1000);
        let offset = if random.below(4) > 0 { random.pick(&HOT) } else { cold };
        let data = (u64::from(random.word()) | u64::from(random.word()) << 32).to_le_bytes();
        match random.below(12) {
            0 => guest.vf.config_write(random.below(4200) as u16, &data[..len.min(4)]),
            1 => guest.vf.config_write(4, &[6, 0]),
            2 => guest.vf.bar_read(bar, offset, &mut [0; 8][..len]),
            3 => guest.vf.config_read(random.below(4200) as u16, &mut [0; 8]),
            _ => guest.vf.bar_write(bar, offset, &data[..len]),
        }
    }
}

#[test]
fn thousands_of_seeded_runs_leave_the_vf_alive_and_its_neighbours_alone() {
    let mut adapter = Adapter::new(3);
    let mut hostile = adapter.guest(0);
    let (mut left, mut right) = (adapter.guest(1), adapter.guest(2));
    for seed in 1..=3000u64 {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        litter(&hostile, &mut random);
        misbehave(&hostile, &mut random);
        if seed % 500 == 0 {
            // The neighbours continue. They need not answer the hostile guest's broadcasts.
            left.send(&frame(mac(0x12), mac(0x11), &format!("seed {seed}")));
            let expected = format!("seed {seed}");
            let found = (0..200).any(|_| {
                let received = right.receive();
                received.bytes[6..12] == mac(0x11).bytes() && text(&received) == expected
            });
            assert!(found, "seed {seed}");
            // The VF itself is like new after a reset.
            hostile.vf.reset().unwrap();
            hostile.probe();
            assert_eq!(hostile.driver.netdev, mac(0x10), "seed {seed}");
            hostile.send(&frame(mac(0x12), mac(0x10), "again"));
            let found = (0..200).any(|_| right.receive().bytes.windows(5).any(|bytes| bytes == b"again"));
            assert!(found, "seed {seed}");
        }
    }
    assert!(hostile.vf.dma_errors() > 0, "the runs did access missing memory");
}

#[test]
fn rings_outside_of_memory_and_endless_packets() {
    let mut adapter = Adapter::new(2);
    let (mut guest, mut other) = (adapter.guest(0), adapter.guest(1));
    // A ring outside of the memory stops, and the error is counted.
    for (base, high) in [(MEMORY as u32, 0), (0xffff_ff80, u32::MAX), (0, 1)] {
        guest.write(0x3800, base);
        guest.write(0x3804, high);
        guest.write(0x3810, 0);
        let before = guest.vf.dma_errors();
        guest.write(0x3828, 1 << 25);
        guest.write(0x3818, 5);
        assert!(eventually(|| guest.vf.dma_errors() > before));
        assert!(eventually(|| guest.read(0x3828) == 0), "stopped");
    }
    // A ring full of pieces of one endless packet: it is walked once, and the packet stays within its bound.
    guest.driver.reset().unwrap();
    guest.open(0x0200_0002);
    let mut endless = Guest::data(0xffff, 0, 0);
    endless[0] = 0;
    endless[2] &= !(1 << 24);
    for _ in 0..4 {
        guest.put(&[endless; 31]);
        assert!(guest.reported());
    }
    // At its end the endless packet is dropped, and the next one is sent.
    guest.put(&[Guest::data(60, 0, 0)]);
    assert!(guest.reported());
    guest.send(&frame(mac(0x11), mac(0x10), "after"));
    assert_eq!(text(&other.receive()), "after");
    // A tail outside of the ring.
    guest.write(0x3818, 0xffff);
    guest.write(0x2818, 0xffff);
    other.send(&frame(mac(0x10), mac(0x11), "not received"));
    assert_eq!(guest.read(0x3810), guest.read(0x3810));
    // Receive buffers outside of the memory: the frame is lost, the queue stops.
    guest.driver.reset().unwrap();
    guest.open(0x0200_0002);
    guest.memory.write_obj(u64::MAX - 4, GuestAddress(0x1000)).unwrap();
    let before = guest.vf.dma_errors();
    other.send(&frame(mac(0x10), mac(0x11), "lost"));
    assert!(eventually(|| guest.vf.dma_errors() > before));
    assert_eq!(guest.read(0x2828), 0);
}

#[test]
fn a_vmm_that_was_taken_over_harms_nobody_else() {
    let mut adapter = Adapter::new(3);
    let (mut left, mut right) = (adapter.guest(0), adapter.guest(1));
    let raw = adapter.pf.attach(2).unwrap();
    let mut random = Random(0x1234_5678_9abc_def1);
    let mut message = vec![2u8, 0, 0, 0, 1, 0, 0, 0];
    message.resize(8 + 64, 0);
    // This vmm never reads its connection.
    for round in 0..20_000u32 {
        let mut packet = message.clone();
        if round % 2 == 0 {
            let len = random.pick(&[0, 1, 7, 8, 9, 22, 72, 100, 1600, 9736, 9737, 20_000]);
            packet = (0..len).map(|_| random.next() as u8).collect();
            if let Some(kind) = packet.first_mut() {
                *kind %= 8;
            }
        } else {
            packet[8] = random.below(9) as u8;
        }
        let _ = send(&raw, &packet, SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
    }
    left.send(&frame(mac(0x11), mac(0x10), "still here"));
    let found = (0..200).any(|_| text_of(&right.receive().bytes).contains("still here"));
    assert!(found);
    assert!(adapter.counters(2).messages > 0);
    // After a new attachment, the VF works for its next holder.
    let (vf, memory) = adapter.vf(2, mac(0x12));
    let mut next = Guest::new(vf, memory);
    next.probe();
    next.send(&frame(mac(0x10), mac(0x12), "next"));
    let found = (0..200).any(|_| text_of(&left.receive().bytes).contains("next"));
    assert!(found);
    drop(raw);
}

fn text_of(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
