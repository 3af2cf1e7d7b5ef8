// SPDX-License-Identifier: Apache-2.0

//! Messages of 82576 and i350 VFs (Linux igbvf and igb; `e1000_mbx.h`).
//!
//! [`decode`] reads a guest's words without trust. [`encode`] writes the only form in which a request may reach the
//! real mailbox: a fixed length for each opcode, unused bits and words zero.

use netpolicy::{Change, MacAddress, PromiscuousMode, Request, VlanId};

use crate::{
    channel::mailbox::{
        message::{BUFFER_WORDS, Words},
        register_bits::{ACK_MESSAGE, CTS, NACK_MESSAGE, REQUEST_MASK},
    },
    family::{Codec, Context, Exchange, Incoming, Malformed, Outcome, ResetReply, Session},
};

const RESET: u16 = 0x01;
const SET_MAC: u16 = 0x02;
const SET_MULTICAST: u16 = 0x03;
const SET_VLAN: u16 = 0x04;
/// The opcode in word 0.
const OPCODE_MASK: u32 = 0xffff;
const SET_MAX_FRAME: u16 = 0x05;
const SET_PROMISC: u16 = 0x06;

const FILTER_CLEAR: u8 = 1;
const FILTER_ADD: u8 = 2;
const PROMISC_UNICAST: u8 = 1;
const PROMISC_MULTICAST: u8 = 2;

/// Multicast hashes in one message: 15 words of two. igb turns on all-multicast for a higher count.
pub(super) const MAX_MULTICAST: usize = 30;
/// Frame sizes in bytes: from `ETH_MIN_MTU` to `MAX_JUMBO_FRAME_SIZE`, to which igb cuts a longer one.
pub(super) const FRAME_SIZES: std::ops::RangeInclusive<u32> = 68..=9728;
/// Words of the reply to a reset. All other replies have one.
const RESET_REPLY_WORDS: usize = 3;

/// The codec of [`IGBVF`](super::IGBVF).
#[derive(Debug)]
pub(super) struct Igbvf;

impl Codec for Igbvf {
    fn decode(&self, words: &[u32; BUFFER_WORDS], _session: Session) -> Result<Incoming, Malformed> {
        decode(words).map(Incoming::Request)
    }

    fn encode(&self, request: &Request, context: Context) -> Option<Exchange> {
        encode(request, context.effective).map(one_word)
    }

    fn encode_change(&self, change: &Change, context: Context) -> Option<Exchange> {
        encode_change(change, context.effective).map(one_word)
    }

    fn reset(&self) -> Exchange {
        Exchange { words: Words::new(&[u32::from(RESET)]), reply_words: RESET_REPLY_WORDS }
    }

    fn parse_reset(&self, reply: &Words) -> Option<ResetReply> {
        parse_reset_reply(reply).map(|mac| ResetReply { mac, extra: None })
    }

    fn reset_reply(&self, mac: Option<MacAddress>, _from_pf: Option<ResetReply>) -> Words {
        reset_reply(mac)
    }

    fn reply(&self, message: &[u32; BUFFER_WORDS], result: Outcome, _from_pf: Option<&Words>) -> Words {
        reply(message[0], result.accepted, result.clear_to_send)
    }

    fn answers(&self, reply: u32, message: u32) -> bool {
        answers(reply, message)
    }
}

fn one_word(words: Words) -> Exchange {
    Exchange { words, reply_words: 1 }
}

/// Decodes the guest's request.
///
/// # Errors
/// [`Malformed`]. An unknown opcode is not malformed but [`Request::Unknown`].
pub(super) fn decode(words: &[u32; BUFFER_WORDS]) -> Result<Request, Malformed> {
    let [word, first, second, ..] = *words;
    if word & (ACK_MESSAGE | NACK_MESSAGE) != 0 {
        return Err(Malformed::Answer(word));
    }
    if word & CTS != 0 {
        return Err(Malformed::ClearToSend(word));
    }
    let [low, high, argument, rest] = word.to_le_bytes();
    let opcode = u16::from_le_bytes([low, high]);
    let only = |allowed: &[u8]| {
        if rest == 0 && allowed.contains(&argument) { Ok(()) } else { Err(Malformed::Argument(word)) }
    };
    match opcode {
        RESET => only(&[0]).map(|()| Request::Reset),
        SET_MAC => {
            only(&[0, FILTER_CLEAR, FILTER_ADD])?;
            if argument == FILTER_CLEAR {
                // igbvf sends zeros here. An address would have no meaning.
                return Ok(Request::ClearUnicastFilters);
            }
            let mac = mac_from([first, second]);
            if !mac.is_assignable() {
                return Err(Malformed::Mac { mac, filter: argument == FILTER_ADD });
            }
            Ok(if argument == FILTER_ADD { Request::AddUnicastFilter(mac) } else { Request::SetMac(mac) })
        }
        SET_MULTICAST => {
            if rest != 0 {
                return Err(Malformed::Argument(word));
            }
            let hashes = words.iter().skip(1).flat_map(|word| [word & 0xfff, (word >> 16) & 0xfff]);
            let hashes = hashes.take(usize::from(argument).min(MAX_MULTICAST));
            Ok(Request::SetMulticast {
                count: argument.into(),
                hashes: hashes.map(|hash| u16::try_from(hash).unwrap_or(0)).collect(),
            })
        }
        SET_VLAN => {
            only(&[0, 1])?;
            match u16::try_from(first) {
                Ok(vid) if vid <= VlanId::MAX.get() => Ok(Request::SetVlan { vid, add: argument == 1 }),
                _ => Err(Malformed::Vlan(first)),
            }
        }
        SET_MAX_FRAME => {
            only(&[0])?;
            if FRAME_SIZES.contains(&first) {
                Ok(Request::SetMaxFrame(first))
            } else {
                Err(Malformed::Frame(first))
            }
        }
        SET_PROMISC => {
            only(&[0, PROMISC_UNICAST, PROMISC_MULTICAST, PROMISC_UNICAST | PROMISC_MULTICAST])?;
            Ok(Request::SetPromiscuous(PromiscuousMode {
                multicast: argument & PROMISC_MULTICAST != 0,
                unicast: argument & PROMISC_UNICAST != 0,
            }))
        }
        opcode => Ok(Request::Unknown { opcode }),
    }
}

/// Encodes a request for the real mailbox; None for a request without a canonical form. The message that clears the
/// unicast filters has `effective` in place of igbvf's zeros, which igb nacks.
pub(super) fn encode(request: &Request, effective: MacAddress) -> Option<Words> {
    Some(match request {
        Request::Reset => Words::new(&[u32::from(RESET)]),
        Request::SetMac(mac) if mac.is_assignable() => mac_message(0, *mac),
        Request::AddUnicastFilter(mac) if mac.is_assignable() => mac_message(FILTER_ADD, *mac),
        Request::ClearUnicastFilters if effective.is_assignable() => mac_message(FILTER_CLEAR, effective),
        Request::SetMulticast { hashes, .. } => multicast(hashes),
        Request::SetVlan { vid, add } if *vid <= VlanId::MAX.get() => {
            Words::new(&[word0(SET_VLAN, u8::from(*add)), u32::from(*vid)])
        }
        Request::SetMaxFrame(size) if FRAME_SIZES.contains(size) => {
            Words::new(&[word0(SET_MAX_FRAME, 0), *size])
        }
        Request::SetPromiscuous(mode) => {
            let multicast = if mode.multicast { PROMISC_MULTICAST } else { 0 };
            let unicast = if mode.unicast { PROMISC_UNICAST } else { 0 };
            Words::new(&[word0(SET_PROMISC, multicast | unicast)])
        }
        _ => return None,
    })
}

/// Encodes a change with the mailbox as its [route](Change::route); None for other changes, and for a reset, which only
/// the guest requests.
pub(super) fn encode_change(change: &Change, effective: MacAddress) -> Option<Words> {
    let request = match change {
        Change::AddUnicast(mac) => Request::AddUnicastFilter(*mac),
        Change::ClearUnicast => Request::ClearUnicastFilters,
        Change::SetMulticast(hashes) => return Some(multicast(hashes)),
        Change::JoinVlan(vlan) => Request::SetVlan { vid: vlan.get(), add: true },
        Change::LeaveVlan(vlan) => Request::SetVlan { vid: vlan.get(), add: false },
        Change::SetMaxFrame(size) => Request::SetMaxFrame((*size).into()),
        Change::SetPromiscuous(mode) => Request::SetPromiscuous(*mode),
        _ => return None,
    };
    encode(&request, effective)
}

/// The reply to any message but a reset.
pub(super) fn reply(request_word: u32, accepted: bool, clear_to_send: bool) -> Words {
    let verdict = if accepted { ACK_MESSAGE } else { NACK_MESSAGE };
    let cts = if clear_to_send { CTS } else { 0 };
    let mut echo = echo(request_word);
    if !accepted && echo & OPCODE_MASK == u32::from(SET_VLAN) {
        // igbvf compares with the bare opcode (drivers/net/ethernet/intel/igbvf/vf.c, e1000_set_vfta_vf): if the reply
        // echoed the argument, as the PF does, a refused VLAN would look joined.
        echo = u32::from(SET_VLAN);
    }
    Words::new(&[echo | verdict | cts])
}

/// The part of word 0 that igb's reply repeats: opcode and argument, without the bits that igb clears after it has
/// carried out the message (drivers/net/ethernet/intel/igb/igb_main.c, igb_set_vf_promisc).
pub(super) fn echo(request_word: u32) -> u32 {
    let echo = request_word & REQUEST_MASK;
    if echo & OPCODE_MASK == u32::from(SET_PROMISC) { echo & !word0(0, PROMISC_MULTICAST) } else { echo }
}

/// Whether `reply` is word 0 of the PF's reply to the message with this word 0.
pub(super) fn answers(reply: u32, request_word: u32) -> bool {
    let repeated = reply & REQUEST_MASK;
    // A PF that does not listen nacks a message and repeats its word 0 unchanged.
    let same = repeated == echo(request_word) || repeated == request_word & REQUEST_MASK;
    same && reply & (ACK_MESSAGE | NACK_MESSAGE) != 0
}

/// The reply to a reset. The driver compares word 0 exactly, so it lacks "clear to send". Without an address the driver
/// makes one up.
pub(super) fn reset_reply(effective: Option<MacAddress>) -> Words {
    match effective {
        Some(mac) => {
            let [first, second] = mac_words(mac);
            Words::new(&[u32::from(RESET) | ACK_MESSAGE, first, second])
        }
        None => Words::new(&[u32::from(RESET) | NACK_MESSAGE, 0, 0]),
    }
}

/// The address in the PF's reply to a reset: `Some(None)` if the PF has none for this VF, None if `reply` is not such a
/// reply.
pub(super) fn parse_reset_reply(reply: &Words) -> Option<Option<MacAddress>> {
    let &[word, first, second, ..] = reply.padded();
    if word & !CTS == u32::from(RESET) | ACK_MESSAGE {
        let mac = mac_from([first, second]);
        Some(mac.is_assignable().then_some(mac))
    } else if word & !CTS == u32::from(RESET) | NACK_MESSAGE {
        Some(None)
    } else {
        None
    }
}

fn word0(opcode: u16, argument: u8) -> u32 {
    u32::from(opcode) | u32::from(argument) << 16
}

fn mac_message(argument: u8, mac: MacAddress) -> Words {
    let [first, second] = mac_words(mac);
    Words::new(&[word0(SET_MAC, argument), first, second])
}

fn multicast(hashes: &[u16]) -> Words {
    let mut words = [0; BUFFER_WORDS];
    let hashes = hashes.get(..MAX_MULTICAST).unwrap_or(hashes);
    let pairs = hashes.chunks(2).map(|pair| {
        let hash = |index| u32::from(pair.get(index).copied().unwrap_or(0) & 0xfff);
        hash(0) | hash(1) << 16
    });
    for (word, pair) in words.iter_mut().skip(1).zip(pairs) {
        *word = pair;
    }
    words[0] = word0(SET_MULTICAST, u8::try_from(hashes.len()).unwrap_or(0));
    Words::new(&words)
}

/// Addresses are in memory order in little-endian words: 02:aa:bb:cc:dd:01 is 0xccbbaa02, 0x000001dd.
fn mac_words(mac: MacAddress) -> [u32; 2] {
    let [a, b, c, d, e, f] = mac.bytes();
    [u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, 0, 0])]
}

fn mac_from([first, second]: [u32; 2]) -> MacAddress {
    let ([a, b, c, d], [e, f, ..]) = (first.to_le_bytes(), second.to_le_bytes());
    MacAddress::new([a, b, c, d, e, f])
}

#[cfg(test)]
mod tests;
