// SPDX-License-Identifier: Apache-2.0

//! The packets between a VF and its PF, with a fixed head of eight bytes, little-endian.
//!
//! | byte | |
//! |---|---|
//! | 0 | kind |
//! | 1 | flags: 1 tagged, 2 sent by a VF of the same adapter, 4 link up |
//! | 2-3 | the tag (TCI) of a tagged frame |
//! | 4-7 | sequence number of a message; 0 for an unsolicited message of the PF |
//! | 8- | words, or the frame without tag and checksum |

use passthrough::channel::mailbox::message::{BUFFER_WORDS, Words};

/// Longest frame in bytes, without tag and checksum (`MAX_JUMBO_FRAME_SIZE` of igb).
pub(super) const MAX_FRAME: usize = 9728;
/// Two addresses and a type.
pub(super) const MIN_FRAME: usize = 14;
/// Longest packet.
pub(super) const MAX_PACKET: usize = HEAD + MAX_FRAME;

const HEAD: usize = 8;
const TAGGED: u8 = 1;
const LOOPED: u8 = 2;
const LINK_UP: u8 = 4;

const RESET: u8 = 1;
const MESSAGE: u8 = 2;
const FRAME: u8 = 3;
const TAKEN: u8 = 4;
const POST: u8 = 5;
const LINK: u8 = 6;

/// A frame without its outermost 802.1Q tag, which is separate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// Priority and VLAN (TCI).
    pub tag: Option<u16>,
    /// From the destination address on, without checksum.
    pub bytes: &'a [u8],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Packet<'a> {
    /// VF to PF: VTCTRL.RST or a function level reset.
    Reset,
    /// VF to PF: the guest wrote REQ.
    Message { seq: u32, words: [u32; BUFFER_WORDS] },
    /// PF to VF: the PF took the message (PFACK) and has no answer.
    Taken { seq: u32 },
    /// PF to VF: words for the mailbox (PFSTS). With the number of a message, the PF took that too
    /// (PFACK).
    Post { seq: u32, words: Words },
    /// PF to VF: the link.
    Link { up: bool },
    /// Either direction. `looped`: the sender is a VF of the same adapter.
    Frame { frame: Frame<'a>, looped: bool },
}

impl Packet<'_> {
    /// Replaces the content of `buffer` with the packet.
    pub(super) fn encode(&self, buffer: &mut Vec<u8>) {
        buffer.clear();
        let mut head = |kind, flags, tag: u16, seq: u32| {
            buffer.extend_from_slice(&[kind, flags]);
            buffer.extend_from_slice(&tag.to_le_bytes());
            buffer.extend_from_slice(&seq.to_le_bytes());
        };
        let flag = |on: bool, flag: u8| if on { flag } else { 0 };
        match self {
            Self::Reset => head(RESET, 0, 0, 0),
            Self::Taken { seq } => head(TAKEN, 0, 0, *seq),
            Self::Link { up } => head(LINK, flag(*up, LINK_UP), 0, 0),
            Self::Message { seq, words } => {
                head(MESSAGE, 0, 0, *seq);
                words.iter().for_each(|word| buffer.extend_from_slice(&word.to_le_bytes()));
            }
            Self::Post { seq, words } => {
                head(POST, 0, 0, *seq);
                words.as_slice().iter().for_each(|word| buffer.extend_from_slice(&word.to_le_bytes()));
            }
            Self::Frame { frame, looped } => {
                let flags = flag(frame.tag.is_some(), TAGGED) | flag(*looped, LOOPED);
                head(FRAME, flags, frame.tag.unwrap_or(0), 0);
                buffer.extend_from_slice(frame.bytes);
            }
        }
    }
}

/// The packet in these bytes; None if they are no packet.
pub(super) fn decode(bytes: &[u8]) -> Option<Packet<'_>> {
    let (&[kind, flags, tag_low, tag_high, s0, s1, s2, s3], body) = bytes.split_first_chunk::<HEAD>()?;
    let seq = u32::from_le_bytes([s0, s1, s2, s3]);
    let tag = u16::from_le_bytes([tag_low, tag_high]);
    Some(match kind {
        RESET if body.is_empty() => Packet::Reset,
        TAKEN if body.is_empty() => Packet::Taken { seq },
        LINK if body.is_empty() => Packet::Link { up: flags & LINK_UP != 0 },
        MESSAGE if body.len() == 4 * BUFFER_WORDS => Packet::Message { seq, words: words(body) },
        POST if !body.is_empty() && body.len().is_multiple_of(4) && body.len() <= 4 * BUFFER_WORDS => {
            Packet::Post { seq, words: Words::new(words(body).get(..body.len() / 4)?) }
        }
        FRAME if (MIN_FRAME..=MAX_FRAME).contains(&body.len()) => Packet::Frame {
            frame: Frame { tag: (flags & TAGGED != 0).then_some(tag), bytes: body },
            looped: flags & LOOPED != 0,
        },
        _ => return None,
    })
}

fn words(body: &[u8]) -> [u32; BUFFER_WORDS] {
    let mut words = [0; BUFFER_WORDS];
    for (word, bytes) in words.iter_mut().zip(body.as_chunks::<4>().0) {
        *word = u32::from_le_bytes(*bytes);
    }
    words
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(packet: Packet<'_>) {
        let mut bytes = vec![0xee; 3];
        packet.encode(&mut bytes);
        assert_eq!(decode(&bytes), Some(packet));
    }

    proptest! {
        #[test]
        fn packets_survive_the_way(seq: u32, words: [u32; 16], len in 1..=16usize, tag: Option<u16>,
                                   looped: bool, body in proptest::collection::vec(any::<u8>(), 14..200)) {
            check(Packet::Reset);
            check(Packet::Taken { seq });
            check(Packet::Link { up: looped });
            check(Packet::Message { seq, words });
            check(Packet::Post { seq, words: Words::new(&words[..len]) });
            check(Packet::Frame { frame: Frame { tag, bytes: &body }, looped });
        }

        #[test]
        fn whatever_arrives_is_a_packet_or_nothing(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            if let Some(packet) = decode(&bytes) {
                let mut again = Vec::new();
                packet.encode(&mut again);
                prop_assert_eq!(decode(&again), Some(packet));
            }
        }
    }

    #[test]
    fn lengths_are_bounded() {
        let frame = |len: usize| {
            let mut bytes = vec![0; HEAD + len];
            bytes[0] = FRAME;
            decode(&bytes).is_some()
        };
        let found = [13, 14, MAX_FRAME, MAX_FRAME + 1].map(frame);
        assert_eq!(found, [false, true, true, false]);
        assert_eq!(decode(&[]), None);
        assert_eq!(decode(&[MESSAGE, 0, 0, 0, 1, 0, 0, 0, 1]), None);
    }
}
