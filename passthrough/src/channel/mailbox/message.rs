// SPDX-License-Identifier: Apache-2.0

//! The words of one mailbox message.

/// Words in a mailbox buffer.
pub const BUFFER_WORDS: usize = 16;

/// One message: 1 to 16 words. Words beyond its length are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Words {
    words: [u32; BUFFER_WORDS],
    len: u8,
}

impl Words {
    /// A message of these words. Words beyond 16 are cut off; an empty slice makes one zero word.
    pub fn new(words: &[u32]) -> Self {
        let mut message = Self { words: [0; BUFFER_WORDS], len: 1 };
        for (to, from) in message.words.iter_mut().zip(words) {
            *to = *from;
        }
        message.len = u8::try_from(words.len().clamp(1, BUFFER_WORDS)).unwrap_or(1);
        message
    }

    /// Word 0: opcode, argument and the PF's bits.
    pub fn first(&self) -> u32 {
        self.words[0]
    }

    /// The words of the message.
    pub fn as_slice(&self) -> &[u32] {
        self.words.get(..usize::from(self.len)).unwrap_or(&self.words)
    }

    /// All 16 words, with zeros after the message.
    pub fn padded(&self) -> &[u32; BUFFER_WORDS] {
        &self.words
    }
}
