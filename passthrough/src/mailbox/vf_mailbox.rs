// SPDX-License-Identifier: Apache-2.0

//! The VF's side of the *real* mailbox.
//!
//! It has one owner, the VF's relay thread: reading the mailbox register clears bits. What a read clears is latched
//! here until somebody asks for it. The buffer is owned (VFU) only while words are copied: the PF's driver would wait
//! for it with interrupts off.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    igbvf,
    layout::Layout,
    message::{BUFFER_WORDS, Words},
    register_bits::{self, ACK, PFACK, PFSTS, PFU, READ_TO_CLEAR, REQ, RSTD, RSTI, VFU},
};
use crate::hardware::VfHardware;

/// Time as the relay sees it; tests have their own.
pub trait Clock: Send + Sync {
    /// Monotonic time since some fixed moment.
    fn now(&self) -> Duration;

    /// Waits.
    fn sleep(&self, time: Duration);
}

/// The machine's monotonic clock.
#[derive(Debug)]
pub struct SystemClock(Instant);

impl Default for SystemClock {
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }

    fn sleep(&self, time: Duration) {
        std::thread::sleep(time);
    }
}

/// Why an exchange with the PF failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VfMailboxError {
    /// VFU was not granted.
    #[error("The PF driver holds the mailbox buffer: it hangs or is being removed")]
    Busy,
    /// No PFACK.
    #[error("The PF driver did not take the message: is its interface up on the host?")]
    NotTaken,
    /// No PFSTS, or none that answers this message.
    #[error(
        "The PF driver took the message and did not answer: it does so before it has seen the VF's reset"
    )]
    NoReply,
    /// RSTI for all of the time.
    #[error("The PF is being reset: is its interface up on the host?")]
    PfResetting,
    /// All-ones.
    #[error("The VF does not answer: it was removed from the host or is being reset")]
    Gone,
}

/// What the PF did on its own since the last look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// The PF is being reset at this moment.
    pub resetting: bool,
    /// A reset of the PF ended.
    pub reset_done: bool,
    /// Word 0 of the last message that it sent on its own.
    pub message: Option<u32>,
    /// The VF does not answer at all.
    pub gone: bool,
}

/// The real mailbox.
pub struct VfMailbox {
    hardware: Arc<dyn VfHardware>,
    clock: Arc<dyn Clock>,
    layout: &'static Layout,
    latched: u32,
    message: Option<u32>,
}

/// How often VFU is tried before a message is given up, a millisecond apart, as igbvf does.
const VFU_TRIES: u32 = 11;
const VFU_PAUSE: Duration = Duration::from_millis(1);
/// The PF's driver answers in its interrupt handler: usually within some 10 µs.
const FIRST_PAUSE: Duration = Duration::from_micros(20);
const LAST_PAUSE: Duration = Duration::from_micros(500);

impl VfMailbox {
    /// The mailbox of this VF. Nothing is written yet.
    pub fn new(hardware: Arc<dyn VfHardware>, layout: &'static Layout, clock: Arc<dyn Clock>) -> Self {
        Self { hardware, clock, layout, latched: 0, message: None }
    }

    /// Resets the VF (VTCTRL.RST): queues off, and the PF listens no more until the next reset message.
    pub fn reset_vf(&mut self) {
        self.write(self.layout.control, register_bits::CONTROL_RST);
        self.forget();
    }

    /// The device was reset behind our back: nothing that was latched is true any more.
    pub fn forget(&mut self) {
        self.latched = 0;
        self.message = None;
    }

    /// Looks for what the PF did on its own: one register read when there is nothing.
    pub fn poll(&mut self) -> Observed {
        let status = self.status();
        if status == u32::MAX {
            self.forget();
            return Observed { gone: true, ..Observed::default() };
        }
        if self.latched & PFSTS != 0 {
            self.latched &= !PFSTS;
            self.fetch_message();
        }
        let reset_done = self.latched & RSTD != 0;
        self.latched &= !RSTD;
        Observed { resetting: status & RSTI != 0, reset_done, message: self.message.take(), gone: false }
    }

    /// Sends a message and waits for its reply of `reply_words` words.
    ///
    /// # Errors
    /// [`VfMailboxError`], after `limit` at the latest (and the 11 ms that VFU may take).
    pub fn exchange(
        &mut self,
        message: &Words,
        reply_words: usize,
        limit: Duration,
    ) -> Result<Words, VfMailboxError> {
        let deadline = self.clock.now().saturating_add(limit);
        self.wait_for_pf(deadline)?;
        self.take_buffer()?;
        // Two reads, as the driver does: the first clears what the second would still show.
        self.status();
        self.status();
        if self.latched & PFSTS != 0 {
            // Something the PF said on its own: it would be overwritten.
            let word = self.word(0);
            self.keep_message(word);
        }
        self.latched &= !(PFSTS | PFACK);
        self.put(message);
        self.write(self.layout.mailbox, REQ);
        self.wait_for(PFACK, deadline).map_err(|error| error.unwrap_or(VfMailboxError::NotTaken))?;
        loop {
            self.wait_for(PFSTS, deadline).map_err(|error| error.unwrap_or(VfMailboxError::NoReply))?;
            let reply = self.get(reply_words)?;
            if igbvf::answers(reply.first(), message.first()) {
                return Ok(reply);
            }
            self.keep_message(reply.first());
        }
    }

    /// Raises the VF's mailbox interrupt, if the guest has given it a vector.
    pub fn raise_interrupt(&mut self) {
        let entry = self.read(self.layout.mailbox_vector);
        if entry != u32::MAX && entry & 0x80 != 0 {
            self.write(self.layout.trigger, 1 << (entry & 0x3));
        }
    }

    fn wait_for_pf(&mut self, deadline: Duration) -> Result<(), VfMailboxError> {
        loop {
            let status = self.status();
            if status == u32::MAX {
                return Err(VfMailboxError::Gone);
            }
            if status & RSTI == 0 {
                return Ok(());
            }
            if self.clock.now() >= deadline {
                return Err(VfMailboxError::PfResetting);
            }
            self.clock.sleep(VFU_PAUSE);
        }
    }

    fn take_buffer(&mut self) -> Result<(), VfMailboxError> {
        for attempt in 0..VFU_TRIES {
            if attempt > 0 {
                self.clock.sleep(VFU_PAUSE);
            }
            self.write(self.layout.mailbox, VFU);
            let status = self.status();
            if status == u32::MAX {
                return Err(VfMailboxError::Gone);
            }
            if status & VFU != 0 && status & PFU == 0 {
                return Ok(());
            }
        }
        self.write(self.layout.mailbox, 0);
        Err(VfMailboxError::Busy)
    }

    /// Waits until `bit` is latched, and takes it. `Err(None)` is the deadline.
    fn wait_for(&mut self, bit: u32, deadline: Duration) -> Result<(), Option<VfMailboxError>> {
        let mut pause = FIRST_PAUSE;
        loop {
            if self.latched & bit == 0 && self.status() == u32::MAX {
                return Err(Some(VfMailboxError::Gone));
            }
            if self.latched & bit != 0 {
                self.latched &= !bit;
                return Ok(());
            }
            if self.clock.now() >= deadline {
                return Err(None);
            }
            self.clock.sleep(pause);
            pause = (pause * 5 / 4).min(LAST_PAUSE);
        }
    }

    /// All 16 words: those behind the message may be left from another one, or from the PF's late reply to it.
    fn put(&self, message: &Words) {
        for (index, word) in message.padded().iter().enumerate() {
            self.write(self.buffer(index), *word);
        }
    }

    fn get(&mut self, words: usize) -> Result<Words, VfMailboxError> {
        self.take_buffer()?;
        let words = words.clamp(1, BUFFER_WORDS);
        let mut reply = [0; BUFFER_WORDS];
        for (index, word) in reply.iter_mut().enumerate().take(words) {
            *word = self.word(index);
        }
        self.write(self.layout.mailbox, ACK);
        Ok(Words::new(reply.get(..words).unwrap_or(&reply)))
    }

    fn fetch_message(&mut self) {
        match self.get(1) {
            Ok(message) => self.keep_message(message.first()),
            // The PF is writing again: it will raise PFSTS again.
            Err(error) => tracing::debug!(%error, "Message of the PF not read"),
        }
    }

    /// Keeps what the PF says on its own; replies to messages that were given up are dropped.
    fn keep_message(&mut self, word: u32) {
        if word & 0xffff == register_bits::PF_CONTROL {
            self.message = Some(word);
        }
    }

    /// Reads the mailbox register and latches what that clears.
    fn status(&mut self) -> u32 {
        let status = self.read(self.layout.mailbox);
        if status != u32::MAX {
            self.latched |= status & READ_TO_CLEAR;
        }
        status
    }

    fn buffer(&self, index: usize) -> u16 {
        // At most 15 words of 4 bytes beyond an offset below 4096.
        self.layout.buffer.saturating_add(u16::try_from(index * 4).unwrap_or(0))
    }

    fn word(&self, index: usize) -> u32 {
        self.read(self.buffer(index))
    }

    fn read(&self, offset: u16) -> u32 {
        let mut data = [0xff; 4];
        self.hardware.bar_read(self.layout.bar, offset.into(), &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, offset: u16, value: u32) {
        self.hardware.bar_write(self.layout.bar, offset.into(), &value.to_le_bytes());
    }
}

#[cfg(test)]
mod tests;
