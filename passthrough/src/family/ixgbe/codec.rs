// SPDX-License-Identifier: Apache-2.0

//! Messages of ixgbevf and ixgbe (Linux 6.12; `ixgbevf/mbx.h`).
//!
//! ixgbe repeats a message in its reply, and may replace words behind word 0.

use std::ops::RangeInclusive;

use netpolicy::{Change, MacAddress, PromiscuousMode, Request, VlanId};

use crate::{
    channel::mailbox::{
        message::{BUFFER_WORDS, Words},
        register_bits::{ACK_MESSAGE, CTS, NACK_MESSAGE, REQUEST_MASK},
    },
    family::{Codec, Context, Exchange, Incoming, Malformed, Outcome, Protocol, ResetReply, Session, Step},
};

const RESET: u16 = 0x01;
const SET_MAC: u16 = 0x02;
const SET_MULTICAST: u16 = 0x03;
const SET_VLAN: u16 = 0x04;
const SET_MAX_FRAME: u16 = 0x05;
const SET_MACVLAN: u16 = 0x06;
const NEGOTIATE: u16 = 0x08;
const GET_QUEUES: u16 = 0x09;
const GET_RETA: u16 = 0x0a;
const GET_RSS_KEY: u16 = 0x0b;
const SET_XCAST: u16 = 0x0c;
const IPSEC_ADD: u16 = 0x0d;
const IPSEC_DELETE: u16 = 0x0e;
const GET_LINK_STATE: u16 = 0x10;
const GET_PF_LINK_STATE: u16 = 0x11;
const NEGOTIATE_FEATURES: u16 = 0x12;

/// Codes of the protocol's versions that grow with the version. Code 0 is 1.0, which holds without an agreement; code 1
/// is another system's protocol, which uses the same opcodes.
const VERSION_1_1: u32 = 2;
const VERSION_1_2: u32 = 3;
const VERSION_1_3: u32 = 4;
/// The versions that a guest may have.
const VERSIONS: [u32; 4] = [0, VERSION_1_1, VERSION_1_2, VERSION_1_3];

/// `IXGBEVF_XCAST_MODE_*`: no multicast, the groups of the hashes, all groups, all frames.
const XCAST_NONE: u32 = 0;
const XCAST_MULTI: u32 = 1;
const XCAST_ALL_MULTI: u32 = 2;
const XCAST_PROMISCUOUS: u32 = 3;

/// Multicast hashes in one message: 15 words of two. ixgbe ignores a higher count.
pub(super) const MAX_MULTICAST: usize = 30;
/// Frame lengths in messages, in bytes. They lack the VLAN tag, unlike those of [`Request::SetMaxFrame`].
const FRAME_SIZES: RangeInclusive<u32> = 68..=9728;
const TAG: u32 = 4;
/// The index by which a further address is added, and none is removed.
const MACVLAN_ADD: u8 = 2;
/// Words of the reply to a reset message.
const RESET_REPLY_WORDS: usize = 4;
/// Types of multicast filters.
const FILTER_TYPES: u32 = 3;
/// The highest numbers that a guest may get from the PF: queues in each direction, traffic classes or the flag of a port
/// VLAN, and the default queue.
const QUEUE_BOUNDS: [u32; 4] = [8, 8, 8, 7];
/// -EACCES, in ixgbe's refusal of an IPsec offload.
const IPSEC_REFUSED: u32 = 0xffff_fff3;

/// The codec of [`IXGBEVF`](super::IXGBEVF).
#[derive(Debug)]
pub(super) struct Ixgbevf;

impl Codec for Ixgbevf {
    fn decode(&self, words: &[u32; BUFFER_WORDS], session: Session) -> Result<Incoming, Malformed> {
        let [word, first, second, ..] = *words;
        if word & (ACK_MESSAGE | NACK_MESSAGE) != 0 {
            return Err(Malformed::Answer(word));
        }
        if word & CTS != 0 {
            return Err(Malformed::ClearToSend(word));
        }
        let [low, high, argument, rest] = word.to_le_bytes();
        let opcode = u16::from_le_bytes([low, high]);
        let only = |most: u8| {
            if rest == 0 && argument <= most { Ok(()) } else { Err(Malformed::Argument(word)) }
        };
        if let Some(protocol) = protocol(opcode, first, session) {
            return only(0).map(|()| Incoming::Protocol(protocol));
        }
        let request = match opcode {
            RESET => only(0).map(|()| Request::Reset)?,
            SET_MAC => {
                only(0)?;
                Request::SetMac(assignable([first, second], false)?)
            }
            SET_MACVLAN => {
                only(u8::MAX)?;
                if argument == 0 {
                    Request::ClearUnicastFilters
                } else {
                    Request::AddUnicastFilter(assignable([first, second], true)?)
                }
            }
            SET_MULTICAST => {
                only(u8::MAX)?;
                let hashes = words.iter().skip(1).flat_map(|word| [word & 0xfff, (word >> 16) & 0xfff]);
                let hashes = hashes.take(usize::from(argument).min(MAX_MULTICAST));
                Request::SetMulticast {
                    count: argument.into(),
                    hashes: hashes.map(|hash| u16::try_from(hash).unwrap_or(0)).collect(),
                }
            }
            SET_VLAN => {
                only(1)?;
                match u16::try_from(first) {
                    Ok(vid) if vid <= VlanId::MAX.get() => Request::SetVlan { vid, add: argument == 1 },
                    _ => return Err(Malformed::Vlan(first)),
                }
            }
            SET_MAX_FRAME => {
                only(0)?;
                if !FRAME_SIZES.contains(&first) {
                    return Err(Malformed::Frame(first));
                }
                Request::SetMaxFrame(first + TAG)
            }
            SET_XCAST => {
                only(0)?;
                Request::SetPromiscuous(match first {
                    XCAST_NONE | XCAST_MULTI => PromiscuousMode::OFF,
                    XCAST_ALL_MULTI => PromiscuousMode { multicast: true, unicast: false },
                    XCAST_PROMISCUOUS => PromiscuousMode { multicast: true, unicast: true },
                    _ => return Err(Malformed::Mode(first)),
                })
            }
            _ => Request::Unknown { opcode },
        };
        Ok(Incoming::Request(request))
    }

    fn encode(&self, request: &Request, context: Context) -> Option<Exchange> {
        encode(request, context.session)
    }

    fn encode_change(&self, change: &Change, context: Context) -> Option<Exchange> {
        encode(&request_of(change)?, context.session)
    }

    /// A reset ends the agreement, and at 1.0 ixgbe has no receive modes, and refuses each frame length on an 82599 whose
    /// PF has long frames.
    fn before_change(&self, change: &Change, session: Session) -> Vec<Exchange> {
        let needed = matches!(change, Change::SetPromiscuous(_) | Change::SetMaxFrame(_));
        if !needed || session.version != 0 {
            return Vec::new();
        }
        [VERSION_1_3, VERSION_1_2, VERSION_1_1].map(negotiate).into()
    }

    fn reset(&self) -> Exchange {
        Exchange { words: Words::new(&[RESET.into()]), reply_words: RESET_REPLY_WORDS }
    }

    fn parse_reset(&self, reply: &Words) -> Option<ResetReply> {
        let [word, first, second, filter_type, ..] = *reply.padded();
        let extra = Some(filter_type & FILTER_TYPES);
        let mac = mac_from([first, second]);
        match word & !CTS {
            word if word == u32::from(RESET) | ACK_MESSAGE => {
                Some(ResetReply { mac: mac.is_assignable().then_some(mac), extra })
            }
            // The address is not the administrator's.
            word if word == u32::from(RESET) | NACK_MESSAGE => Some(ResetReply { mac: None, extra }),
            _ => None,
        }
    }

    fn reset_reply(&self, mac: Option<MacAddress>, from_pf: Option<ResetReply>) -> Words {
        // ixgbe clears the whole buffer before it writes these four words. The driver compares word 0 exactly.
        let mut reply = [0; BUFFER_WORDS];
        reply[0] = u32::from(RESET) | if mac.is_some() { ACK_MESSAGE } else { NACK_MESSAGE };
        [reply[1], reply[2]] = mac.map_or([0; 2], mac_words);
        reply[3] = from_pf.and_then(|reply| reply.extra).unwrap_or(0) & FILTER_TYPES;
        Words::new(&reply)
    }

    fn reply(&self, message: &[u32; BUFFER_WORDS], result: Outcome, from_pf: Option<&Words>) -> Words {
        let word = message[0] & REQUEST_MASK | marks(result);
        match opcode(message[0]) {
            Some(SET_XCAST) if result.accepted => {
                let asked = message[1];
                let granted = match from_pf {
                    _ if asked <= XCAST_MULTI => asked,
                    Some(reply) => reply.padded()[1] & 3,
                    // A silent denial: ixgbe gives an untrusted VF this mode in place of a higher one.
                    None => XCAST_MULTI,
                };
                Words::new(&[word, granted])
            }
            Some(IPSEC_ADD | IPSEC_DELETE) if !result.accepted => Words::new(&[word, IPSEC_REFUSED]),
            _ => Words::new(&[word]),
        }
    }

    fn answers(&self, reply: u32, message: u32) -> bool {
        reply & REQUEST_MASK == message & REQUEST_MASK && reply & (ACK_MESSAGE | NACK_MESSAGE) != 0
    }

    fn carried_out(&self, message: &Words, reply: &Words) -> bool {
        let [word, mode, ..] = *reply.padded();
        // ixgbe acknowledges a higher mode than the VF may have, and gives a lower one.
        let lowered = opcode(message.first()) == Some(SET_XCAST) && mode < message.padded()[1];
        word & ACK_MESSAGE != 0 && !lowered
    }

    /// An 82599's PF that refuses a frame length switches the VF's receiver off (`ixgbe_set_vf_lpe`).
    fn refusal_disables(&self, message: &Words) -> bool {
        opcode(message.first()) == Some(SET_MAX_FRAME)
    }

    fn protocol_reply(&self, message: &Words, from_pf: &Words, session: &mut Session) -> Option<Words> {
        let outcome = Outcome { accepted: true, clear_to_send: from_pf.first() & CTS != 0 };
        let word = message.first() | marks(outcome);
        let [_, data @ ..] = from_pf.padded();
        match opcode(message.first())? {
            NEGOTIATE => {
                session.version = message.padded()[1];
                Some(Words::new(&[word]))
            }
            GET_QUEUES => {
                let mut reply = [word, 0, 0, 0, 0];
                for ((to, from), most) in reply.iter_mut().skip(1).zip(data).zip(QUEUE_BOUNDS) {
                    *to = (*from).min(most);
                }
                Some(Words::new(&reply))
            }
            GET_LINK_STATE => Some(Words::new(&[word, data[0] & 1])),
            _ => None,
        }
    }
}

/// The meaning of a message about the protocol; None for any other message.
fn protocol(opcode: u16, first: u32, session: Session) -> Option<Protocol> {
    let since = |version: u32, words: &[u32], reply_words: usize| {
        if session.version < version {
            return Step::Refuse;
        }
        Step::Forward(Exchange { words: Words::new(words), reply_words })
    };
    let (name, step) = match opcode {
        NEGOTIATE if VERSIONS.contains(&first) => ("api_version", Step::Forward(negotiate(first))),
        NEGOTIATE => ("api_version", Step::Refuse),
        GET_QUEUES => ("queues", since(VERSION_1_1, &[GET_QUEUES.into(), 0, 0, 0, 0], 5)),
        GET_LINK_STATE => ("link_state", since(VERSION_1_2, &[GET_LINK_STATE.into(), 0], 2)),
        // ixgbe refuses both as well, unless the administrator permits them.
        GET_RETA | GET_RSS_KEY => ("rss", Step::Refuse),
        // These belong to versions that no guest gets.
        GET_PF_LINK_STATE => ("pf_link_state", Step::Refuse),
        NEGOTIATE_FEATURES => ("features", Step::Refuse),
        SET_XCAST if session.version < VERSION_1_2 => ("receive_mode", Step::Refuse),
        SET_XCAST if session.version < VERSION_1_3 && first == XCAST_PROMISCUOUS => {
            ("receive_mode", Step::Refuse)
        }
        _ => return None,
    };
    Some(Protocol { name, step })
}

fn negotiate(version: u32) -> Exchange {
    Exchange { words: Words::new(&[NEGOTIATE.into(), version, 0]), reply_words: 1 }
}

/// The request whose message makes a change.
fn request_of(change: &Change) -> Option<Request> {
    Some(match change {
        Change::AddUnicast(mac) => Request::AddUnicastFilter(*mac),
        Change::ClearUnicast => Request::ClearUnicastFilters,
        Change::SetMulticast(hashes) => {
            Request::SetMulticast { count: u16::try_from(hashes.len()).ok()?, hashes: hashes.clone() }
        }
        Change::JoinVlan(vlan) => Request::SetVlan { vid: vlan.get(), add: true },
        Change::LeaveVlan(vlan) => Request::SetVlan { vid: vlan.get(), add: false },
        Change::SetMaxFrame(size) => Request::SetMaxFrame((*size).into()),
        Change::SetPromiscuous(mode) => Request::SetPromiscuous(*mode),
        _ => return None,
    })
}

/// The canonical form of a request.
fn encode(request: &Request, session: Session) -> Option<Exchange> {
    let message = |words: &[u32], reply_words| Some(Exchange { words: Words::new(words), reply_words });
    match request {
        Request::Reset => message(&[RESET.into()], RESET_REPLY_WORDS),
        Request::SetMac(mac) if mac.is_assignable() => {
            let [first, second] = mac_words(*mac);
            message(&[SET_MAC.into(), first, second], 1)
        }
        Request::ClearUnicastFilters => message(&[SET_MACVLAN.into(), 0, 0], 1),
        Request::AddUnicastFilter(mac) if mac.is_assignable() => {
            let [first, second] = mac_words(*mac);
            message(&[word0(SET_MACVLAN, MACVLAN_ADD), first, second], 1)
        }
        Request::SetMulticast { hashes, .. } => message(&multicast(hashes), 1),
        Request::SetVlan { vid, add } if *vid <= VlanId::MAX.get() => {
            message(&[word0(SET_VLAN, u8::from(*add)), u32::from(*vid)], 1)
        }
        Request::SetMaxFrame(size) => {
            let size = size.checked_sub(TAG).filter(|size| FRAME_SIZES.contains(size))?;
            message(&[SET_MAX_FRAME.into(), size], 1)
        }
        Request::SetPromiscuous(mode) => {
            let (mode, since) = match (mode.multicast, mode.unicast) {
                // The other mode without promiscuity, `XCAST_MULTI`, would make the VF receive all groups of all VFs even
                // without a hash of its own. A list of hashes, which drivers send next, switches them on again.
                (false, false) => (XCAST_NONE, VERSION_1_2),
                (true, false) => (XCAST_ALL_MULTI, VERSION_1_2),
                (true, true) => (XCAST_PROMISCUOUS, VERSION_1_3),
                (false, true) => return None,
            };
            (session.version >= since).then_some(())?;
            message(&[SET_XCAST.into(), mode], 2)
        }
        _ => None,
    }
}

fn multicast(hashes: &[u16]) -> [u32; BUFFER_WORDS] {
    let mut words = [0; BUFFER_WORDS];
    let hashes = hashes.get(..MAX_MULTICAST).unwrap_or(hashes);
    for (word, pair) in words.iter_mut().skip(1).zip(hashes.chunks(2)) {
        let hash = |index: usize| u32::from(pair.get(index).copied().unwrap_or(0) & 0xfff);
        *word = hash(0) | hash(1) << 16;
    }
    words[0] = word0(SET_MULTICAST, u8::try_from(hashes.len()).unwrap_or(0));
    words
}

fn opcode(word: u32) -> Option<u16> {
    u16::try_from(word & 0xffff).ok()
}

fn word0(opcode: u16, argument: u8) -> u32 {
    u32::from(opcode) | u32::from(argument) << 16
}

fn marks(outcome: Outcome) -> u32 {
    let verdict = if outcome.accepted { ACK_MESSAGE } else { NACK_MESSAGE };
    verdict | if outcome.clear_to_send { CTS } else { 0 }
}

fn assignable(words: [u32; 2], filter: bool) -> Result<MacAddress, Malformed> {
    let mac = mac_from(words);
    if mac.is_assignable() { Ok(mac) } else { Err(Malformed::Mac { mac, filter }) }
}

/// Addresses are in memory order in little-endian words.
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
