// SPDX-License-Identifier: Apache-2.0

//! The VF's side of the *real* mailbox.
//!
//! It has one owner, the VF's relay thread, because reading the mailbox register clears bits. The owner latches the
//! cleared bits until it needs them. It owns the buffer (VFU) only while it copies words: the PF's driver would wait
//! for the buffer with interrupts off.
//!
//! The owner acknowledges only messages that show that the PF listens. ixgbe responds to any other acknowledgement at
//! once, with an interrupt for the guest, whose reads would make the owner read and acknowledge again, without end
//! (`ixgbe_rcv_ack_from_vf`). igb responds likewise, at most every 2 s.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    layout::Layout,
    message::{BUFFER_WORDS, Words},
    register_bits::{self, ACK, ACK_MESSAGE, CTS, PFACK, PFSTS, PFU, READ_TO_CLEAR, REQ, RSTD, RSTI, VFU},
};
use crate::{
    family::{Exchange, Family},
    hardware::VfHardware,
};

/// The relay's clock. Tests have their own.
pub trait Clock: Send + Sync {
    /// Monotonic time since some fixed moment.
    fn now(&self) -> Duration;

    /// Sleeps for `time`.
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

/// The reason why an exchange with the PF failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VfMailboxError {
    /// The VF did not get VFU.
    #[error("The PF driver holds the mailbox buffer: it hangs or is being removed")]
    Busy,
    /// PFACK did not come.
    #[error("The PF driver did not take the message: is its interface up on the host?")]
    NotTaken,
    /// PFSTS did not come, or only for another message.
    #[error("The PF driver took the message and did not respond: it has not seen the VF's reset yet")]
    NoReply,
    /// RSTI was set all the time.
    #[error("The PF is being reset: is its interface up on the host?")]
    PfResetting,
    /// The mailbox register read as all-ones.
    #[error("The VF does not answer: it was removed from the host or is being reset")]
    Gone,
}

/// Events of the PF's own since the last poll.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// A reset of the PF is under way.
    pub resetting: bool,
    /// A reset of the PF ended.
    pub reset_done: bool,
    /// The last unsolicited message.
    pub message: Option<PfMessage>,
    /// The VF does not answer at all.
    pub gone: bool,
}

/// An unsolicited message of the PF.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PfMessage {
    /// Word 0, which is the whole message.
    pub word: u32,
    /// Whether the PF listens to the VF.
    pub clear_to_send: bool,
}

/// The real mailbox.
pub struct VfMailbox {
    hardware: Arc<dyn VfHardware>,
    clock: Arc<dyn Clock>,
    family: &'static Family,
    latched: u32,
    message: Option<u32>,
}

impl PfMessage {
    fn new(word: u32) -> Self {
        Self { word, clear_to_send: word & CTS != 0 }
    }
}

/// Attempts to get VFU before a message is given up, a millisecond apart, as in igbvf.
const VFU_TRIES: u32 = 11;
const VFU_PAUSE: Duration = Duration::from_millis(1);
/// The PF's driver answers in its interrupt handler, usually within some 10 µs.
const FIRST_PAUSE: Duration = Duration::from_micros(20);
const LAST_PAUSE: Duration = Duration::from_micros(500);
/// The time after which a message counts as lost if the PF has written another one in between, and has not taken it.
const COLLISION: Duration = Duration::from_millis(10);
/// Messages of the PF's own that one exchange reads before the reply. A PF that writes more does not work.
const MAX_UNSOLICITED: u32 = 8;

impl VfMailbox {
    /// The mailbox of this VF. Nothing is written yet.
    pub fn new(hardware: Arc<dyn VfHardware>, family: &'static Family, clock: Arc<dyn Clock>) -> Self {
        Self { hardware, clock, family, latched: 0, message: None }
    }

    fn layout(&self) -> &'static Layout {
        &self.family.layout
    }

    /// Resets the VF (VTCTRL.RST): its queues are off, and the PF does not listen until the next reset message.
    pub fn reset_vf(&mut self) {
        self.write(self.layout().control, register_bits::CONTROL_RST);
        self.forget();
    }

    /// Drops the latched state after a reset of the device from elsewhere.
    pub fn forget(&mut self) {
        self.latched = 0;
        self.message = None;
    }

    /// Drops the unsolicited message that was read last.
    pub fn forget_message(&mut self) {
        self.message = None;
    }

    /// Polls for events of the PF's own. This costs one register read if there is none.
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
        Observed {
            resetting: status & RSTI != 0,
            reset_done,
            message: self.message.take().map(PfMessage::new),
            gone: false,
        }
    }

    /// Sends a message and waits for the reply.
    ///
    /// # Errors
    /// [`VfMailboxError`], after `limit` at the latest (and the 11 ms that VFU may take).
    pub fn exchange(&mut self, exchange: &Exchange, limit: Duration) -> Result<Words, VfMailboxError> {
        let Exchange { words: message, reply_words } = exchange;
        let deadline = self.clock.now().saturating_add(limit);
        self.wait_for_pf(deadline)?;
        self.take_buffer()?;
        // Read twice, as the driver does: the first read clears bits that the second would otherwise show.
        self.status();
        self.status();
        if self.latched & PFSTS != 0 {
            // Save an unsolicited message of the PF, which the new message would overwrite.
            let word = self.word(0);
            self.keep_message(word);
        }
        self.send(message);
        self.wait_until_taken(message, deadline)?;
        for _ in 0..=MAX_UNSOLICITED {
            self.wait_for(PFSTS, deadline).map_err(|error| error.unwrap_or(VfMailboxError::NoReply))?;
            let reply = self.get(*reply_words)?;
            if self.family.codec.answers(reply.first(), message.first()) {
                return Ok(reply);
            }
            self.keep_message(reply.first());
        }
        Err(VfMailboxError::NoReply)
    }

    /// Writes the message, and tells the PF. The VF owns the buffer until then.
    fn send(&mut self, message: &Words) {
        self.latched &= !(PFSTS | PFACK);
        self.put(message);
        self.write(self.layout().mailbox, REQ);
    }

    /// Waits until the PF has taken the message. Sends it once more if the PF has written a message of its own at the
    /// same time: PF drivers clear a pending REQ before they write (`ixgbe_write_mbx_pf`, `igb_write_mbx_pf`).
    fn wait_until_taken(&mut self, message: &Words, deadline: Duration) -> Result<(), VfMailboxError> {
        let first = deadline.min(self.clock.now().saturating_add(COLLISION));
        match self.wait_for(PFACK, first) {
            Ok(()) => return Ok(()),
            Err(Some(error)) => return Err(error),
            Err(None) => {}
        }
        if self.latched & PFSTS != 0 {
            self.latched &= !PFSTS;
            self.take_buffer()?;
            let word = self.word(0);
            self.keep_message(word);
            self.send(message);
        }
        self.wait_for(PFACK, deadline).map_err(|error| error.unwrap_or(VfMailboxError::NotTaken))
    }

    /// Raises the VF's mailbox interrupt, if the guest has given it a vector.
    pub fn raise_interrupt(&mut self) {
        let entry = self.read(self.layout().mailbox_vector);
        if entry != u32::MAX && entry & 0x80 != 0 {
            self.write(self.layout().trigger, 1 << (entry & 0x3));
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
            self.write(self.layout().mailbox, VFU);
            let status = self.status();
            if status == u32::MAX {
                return Err(VfMailboxError::Gone);
            }
            if status & VFU != 0 && status & PFU == 0 {
                return Ok(());
            }
        }
        self.write(self.layout().mailbox, 0);
        Err(VfMailboxError::Busy)
    }

    /// Waits until `bit` is latched, and clears it. `Err(None)` means that the deadline has passed.
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

    /// Writes all 16 words: those after the message may be left from another message, or from the PF's late reply to
    /// it.
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
        // A write of zero releases the buffer. The reply to a reset message lacks CTS, and is marked as accepted.
        let listens = reply[0] & (CTS | ACK_MESSAGE) != 0;
        self.write(self.layout().mailbox, if listens { ACK } else { 0 });
        Ok(Words::new(reply.get(..words).unwrap_or(&reply)))
    }

    fn fetch_message(&mut self) {
        match self.get(1) {
            Ok(message) => self.keep_message(message.first()),
            // The PF is writing again and will raise PFSTS again.
            Err(error) => tracing::debug!(%error, "Message of the PF not read"),
        }
    }

    /// Keeps an unsolicited message of the PF: a ping, or the response to an acknowledgement while the PF does not
    /// listen. Drops replies to messages that were given up.
    fn keep_message(&mut self, word: u32) {
        if word & 0xffff == register_bits::PF_CONTROL || Some(word) == self.family.lost.acknowledged {
            self.message = Some(word);
        }
    }

    /// Reads the mailbox register and latches the bits that the read clears.
    fn status(&mut self) -> u32 {
        let status = self.read(self.layout().mailbox);
        if status != u32::MAX {
            self.latched |= status & READ_TO_CLEAR;
        }
        status
    }

    fn buffer(&self, index: usize) -> u16 {
        // At most 15 words of 4 bytes beyond an offset below 4096.
        self.layout().buffer.saturating_add(u16::try_from(index * 4).unwrap_or(0))
    }

    fn word(&self, index: usize) -> u32 {
        self.read(self.buffer(index))
    }

    fn read(&self, offset: u16) -> u32 {
        let mut data = [0xff; 4];
        self.hardware.bar_read(self.layout().bar, offset.into(), &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, offset: u16, value: u32) {
        self.hardware.bar_write(self.layout().bar, offset.into(), &value.to_le_bytes());
    }
}

#[cfg(test)]
mod tests;
