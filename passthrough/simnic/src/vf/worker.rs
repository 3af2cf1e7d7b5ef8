// SPDX-License-Identifier: Apache-2.0

//! The VF's thread: DMA, and both directions of the connection to the PF.

use std::{
    collections::VecDeque,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, atomic::Ordering},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{self, RecvFlags, SendFlags},
};

use super::{
    Shared,
    interrupts::Event,
    transmit::{Round, Transmitter},
};
use crate::wire::{self, MAX_PACKET, Packet};

/// Packets taken from either side before the other gets its turn.
const BATCH: usize = 64;
const NOW: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };

pub(super) struct Worker {
    shared: Arc<Shared>,
    /// None once the PF is gone.
    connection: Option<Arc<OwnedFd>>,
    transmitter: Transmitter,
    /// A reset, then a message: at most those of two turns.
    control: VecDeque<Vec<u8>>,
    /// Frames of one packet. While there are any, no descriptors are taken.
    frames: VecDeque<Vec<u8>>,
}

impl Worker {
    pub(super) fn new(shared: Arc<Shared>, connection: Arc<OwnedFd>) -> Self {
        Self {
            shared,
            connection: Some(connection),
            transmitter: Transmitter::default(),
            control: VecDeque::new(),
            frames: VecDeque::new(),
        }
    }

    pub(super) fn run(mut self) {
        while !self.shared.stopped.load(Ordering::Acquire) {
            let more = self.turn();
            if let Err(errno) = self.wait(more) {
                tracing::error!(%errno, "A simulated VF can no longer wait for its events");
                return;
            }
        }
    }

    /// Returns whether there is more work at once.
    fn turn(&mut self) -> bool {
        self.tell_pf();
        self.flush();
        let received = self.receive();
        let sent = self.transmit();
        received || sent
    }

    fn wait(&self, more: bool) -> Result<(), Errno> {
        let connected = self.connection.as_ref().map(|connection| {
            let blocked = !self.control.is_empty() || !self.frames.is_empty();
            let wanted = if blocked { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
            PollFd::from_borrowed_fd(connection.as_fd(), wanted)
        });
        let mut fds: Vec<PollFd<'_>> =
            [Some(PollFd::new(&self.shared.wake, PollFlags::IN)), connected].into_iter().flatten().collect();
        match poll(&mut fds, more.then_some(&NOW)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
        // Read before looking for work: later events wake the thread again.
        let _ = rustix::io::read(&self.shared.wake, &mut [0; 8]);
        Ok(())
    }

    /// Takes the registers' pending messages for the PF.
    fn tell_pf(&mut self) {
        if self.control.len() > 2 {
            // The PF does not read: the mailbox keeps the latest message, as it would on hardware.
            return;
        }
        let (reset, message) = self.shared.registers().mailbox.take();
        let packets =
            [reset.then_some(Packet::Reset), message.map(|(seq, words)| Packet::Message { seq, words })];
        if reset {
            self.frames.clear();
        }
        for packet in packets.into_iter().flatten() {
            let mut bytes = Vec::new();
            packet.encode(&mut bytes);
            self.control.push_back(bytes);
        }
    }

    fn flush(&mut self) {
        loop {
            let control = !self.control.is_empty();
            let queue = if control { &mut self.control } else { &mut self.frames };
            let Some(bytes) = queue.front() else { return };
            let Some(connection) = &self.connection else {
                queue.clear();
                continue;
            };
            match net::send(connection, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(_) => drop(queue.pop_front()),
                Err(Errno::AGAIN | Errno::INTR | Errno::NOBUFS) => return,
                Err(_) => self.lose(),
            }
        }
    }

    fn transmit(&mut self) -> bool {
        let mut out = Vec::new();
        for _ in 0..BATCH {
            if !self.frames.is_empty() || !self.control.is_empty() {
                return false;
            }
            if self.transmitter.round(&self.shared, &mut out) == Round::Idle {
                return false;
            }
            self.frames.extend(out.drain(..));
            self.flush();
        }
        true
    }

    fn receive(&mut self) -> bool {
        let mut bytes = [0; MAX_PACKET + 1];
        for _ in 0..BATCH {
            let Some(connection) = &self.connection else { return false };
            let len = match net::recv(connection, bytes.as_mut_slice(), RecvFlags::empty()) {
                Err(Errno::AGAIN | Errno::INTR) => return false,
                Ok((_, len)) if len > 0 => len,
                _ => {
                    self.lose();
                    return false;
                }
            };
            if let Some(packet) = wire::decode(bytes.get(..len).unwrap_or_default()) {
                self.packet(&packet);
            }
        }
        true
    }

    fn packet(&self, packet: &Packet<'_>) {
        let mailbox = |deliver: &dyn Fn(&mut super::mailbox::Mailbox) -> bool| {
            let mut registers = self.shared.registers();
            if deliver(&mut registers.mailbox) {
                registers.interrupts.raise(Event::Mailbox);
            }
        };
        match packet {
            Packet::Frame { frame, looped } => match &self.shared.frames {
                Some(inbox) => inbox.put(*frame),
                None => self.shared.receive(*frame, *looped),
            },
            Packet::Taken { seq } => mailbox(&|mailbox| mailbox.taken(*seq)),
            Packet::Post { seq, words } => mailbox(&|mailbox| mailbox.post(*seq, words)),
            Packet::Link { up } => self.shared.set_link(*up),
            // Only VFs send these.
            Packet::Reset | Packet::Message { .. } => {}
        }
    }

    /// Notes that the PF is gone: no link and no answers from now on.
    fn lose(&mut self) {
        if self.connection.take().is_some() {
            tracing::warn!(
                "A simulated VF has lost its PF: the PF's process has ended, or another VM has the VF"
            );
            self.shared.gone.store(true, Ordering::Release);
            self.shared.set_link(false);
            let _ = self.shared.failed.write(1);
        }
    }
}
