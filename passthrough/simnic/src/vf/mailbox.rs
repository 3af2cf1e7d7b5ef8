// SPDX-License-Identifier: Apache-2.0

//! The VF's end of the mailbox.

use passthrough::channel::mailbox::{
    message::{BUFFER_WORDS, Words},
    register_bits::{PFACK, PFSTS, READ_TO_CLEAR, REQ, VFU},
};

/// The mailbox registers, and the pending messages to the PF. The PF holds the buffer only while it writes it, so
/// PFU is never visible.
#[derive(Default)]
pub(super) struct Mailbox {
    pub(super) words: [u32; BUFFER_WORDS],
    vfu: bool,
    status: u32,
    /// Number of the last message, never 0 after the first one.
    seq: u32,
    /// The words at REQ. A second REQ before the first is sent replaces it, as in the adapter's memory.
    request: Option<[u32; BUFFER_WORDS]>,
    reset: bool,
    /// The PF's words, written while the VF held the buffer.
    waiting: Option<(u32, Words)>,
}

impl Mailbox {
    pub(super) fn read(&mut self) -> u32 {
        let value = self.status | if self.vfu { VFU } else { 0 };
        self.status &= !READ_TO_CLEAR;
        value
    }

    /// Returns whether there is a message for the PF, and whether to raise the mailbox interrupt.
    pub(super) fn write(&mut self, value: u32) -> (bool, bool) {
        self.vfu = value & VFU != 0;
        let request = value & REQ != 0;
        if request {
            self.next();
            self.request = Some(self.words);
        }
        let waiting = if self.vfu { None } else { self.waiting.take() };
        (request, waiting.is_some_and(|(seq, words)| self.post(seq, &words)))
    }

    /// VTCTRL.RST, FLR: voids messages under way. The buffer keeps its words.
    pub(super) fn reset(&mut self) {
        self.next();
        (self.vfu, self.status, self.request, self.waiting) = (false, 0, None, None);
        self.reset = true;
    }

    /// Takes the pending reset and message, in this order for the PF.
    pub(super) fn take(&mut self) -> (bool, Option<(u32, [u32; BUFFER_WORDS])>) {
        let request = self.request.take().map(|words| (self.seq, words));
        (std::mem::take(&mut self.reset), request)
    }

    /// Notes that the PF has taken a message. Returns whether to raise the mailbox interrupt.
    pub(super) fn taken(&mut self, seq: u32) -> bool {
        let current = seq == self.seq && seq != 0;
        if current {
            self.status |= PFACK;
        }
        current
    }

    /// Writes the PF's words into the buffer. Returns whether to raise the mailbox interrupt.
    pub(super) fn post(&mut self, seq: u32, words: &Words) -> bool {
        let taken = self.taken(seq);
        if seq != 0 && !taken {
            // The answer to a message before a reset, or to a replaced one.
            return false;
        }
        if self.vfu {
            self.waiting = Some((seq, *words));
            return taken;
        }
        for (to, from) in self.words.iter_mut().zip(words.as_slice()) {
            *to = *from;
        }
        self.status |= PFSTS;
        true
    }

    fn next(&mut self) {
        self.seq = self.seq.wrapping_add(1).max(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reset_voids_the_answer_that_is_on_its_way() {
        let mut mailbox = Mailbox::default();
        mailbox.words[0] = 1;
        assert_eq!(mailbox.write(REQ), (true, false));
        let (reset, request) = mailbox.take();
        let (seq, words) = request.unwrap();
        assert_eq!((reset, words[0]), (false, 1));
        mailbox.reset();
        assert!(!mailbox.post(seq, &Words::new(&[0x8000_0001])));
        assert_eq!((mailbox.words[0], mailbox.read()), (1, 0));
        assert_eq!(mailbox.take(), (true, None));
    }

    #[test]
    fn what_the_pf_writes_waits_for_the_buffer() {
        let mut mailbox = Mailbox::default();
        mailbox.write(VFU);
        assert!(!mailbox.post(0, &Words::new(&[0x100])));
        assert_eq!((mailbox.words[0], mailbox.read()), (0, VFU));
        assert_eq!(mailbox.write(0), (false, true));
        assert_eq!((mailbox.words[0], mailbox.read(), mailbox.read()), (0x100, PFSTS, 0));
    }
}
