// SPDX-License-Identifier: Apache-2.0

//! Three messages: reset (1), address (2) and version (8).

use netpolicy::{Change, MacAddress, Request};

use crate::{
    channel::mailbox::{
        message::{BUFFER_WORDS, Words},
        register_bits::{ACK_MESSAGE, CTS, NACK_MESSAGE},
    },
    family::{Codec, Context, Exchange, Incoming, Malformed, Outcome, Protocol, ResetReply, Session, Step},
};

const RESET: u32 = 1;
const SET_MAC: u32 = 2;
const VERSION: u32 = 8;
/// The most queues that a guest may believe to have.
const MOST_QUEUES: u32 = 4;

#[derive(Debug)]
pub(super) struct Sample;

fn mac_words(mac: MacAddress) -> [u32; 2] {
    let [a, b, c, d, e, f] = mac.bytes();
    [u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, 0, 0])]
}

fn mac_from(first: u32, second: u32) -> MacAddress {
    let ([a, b, c, d], [e, f, ..]) = (first.to_le_bytes(), second.to_le_bytes());
    MacAddress::new([a, b, c, d, e, f])
}

fn marks(outcome: Outcome) -> u32 {
    let verdict = if outcome.accepted { ACK_MESSAGE } else { NACK_MESSAGE };
    verdict | if outcome.clear_to_send { CTS } else { 0 }
}

impl Codec for Sample {
    fn decode(&self, words: &[u32; BUFFER_WORDS], session: Session) -> Result<Incoming, Malformed> {
        let [word, first, second, ..] = *words;
        if word & (ACK_MESSAGE | NACK_MESSAGE) != 0 {
            return Err(Malformed::Answer(word));
        }
        match word {
            RESET => Ok(Incoming::Request(Request::Reset)),
            SET_MAC => {
                let mac = mac_from(first, second);
                if mac.is_assignable() {
                    Ok(Incoming::Request(Request::SetMac(mac)))
                } else {
                    Err(Malformed::Mac { mac, filter: false })
                }
            }
            // A session agrees on a version once. The codec knows versions 1 and 2.
            VERSION => {
                let known = session.version == 0 && (1..=2).contains(&first);
                let exchange = Exchange { words: Words::new(&[VERSION, first]), reply_words: 3 };
                let step = if known { Step::Forward(exchange) } else { Step::Refuse };
                Ok(Incoming::Protocol(Protocol { name: "version", step }))
            }
            _ => {
                Ok(Incoming::Request(Request::Unknown { opcode: u16::try_from(word & 0xffff).unwrap_or(0) }))
            }
        }
    }

    fn encode(&self, request: &Request, context: Context) -> Option<Exchange> {
        let Request::SetMac(mac) = request else { return None };
        let [first, second] = mac_words(*mac);
        // The message's form depends on the version.
        let words = match context.session.version {
            0 | 1 => Words::new(&[SET_MAC, first, second]),
            _ => Words::new(&[SET_MAC, first, second, 0x0002_0000]),
        };
        Some(Exchange { words, reply_words: 3 })
    }

    fn encode_change(&self, _change: &Change, _context: Context) -> Option<Exchange> {
        None
    }

    fn reset(&self) -> Exchange {
        Exchange { words: Words::new(&[RESET]), reply_words: 4 }
    }

    fn parse_reset(&self, reply: &Words) -> Option<ResetReply> {
        let [word, first, second, extra, ..] = *reply.padded();
        let mac = mac_from(first, second);
        match word {
            0x8000_0001 => {
                Some(ResetReply { mac: mac.is_assignable().then_some(mac), extra: Some(extra & 0xff) })
            }
            0x4000_0001 => Some(ResetReply::default()),
            _ => None,
        }
    }

    fn reset_reply(&self, mac: Option<MacAddress>, from_pf: Option<ResetReply>) -> Words {
        let extra = from_pf.and_then(|reply| reply.extra).unwrap_or(0);
        match mac {
            Some(mac) => {
                let [first, second] = mac_words(mac);
                Words::new(&[RESET | ACK_MESSAGE, first, second, extra])
            }
            None => Words::new(&[RESET | NACK_MESSAGE, 0, 0, extra]),
        }
    }

    fn reply(&self, message: &[u32; BUFFER_WORDS], result: Outcome, from_pf: Option<&Words>) -> Words {
        let word = message[0] & 0xffff | marks(result);
        match (message[0], from_pf) {
            // The reply has the VF's address.
            (SET_MAC, Some(reply)) => Words::new(&[word, reply.padded()[1], reply.padded()[2]]),
            (SET_MAC, None) => Words::new(&[word, message[1], message[2]]),
            _ => Words::new(&[word]),
        }
    }

    fn answers(&self, reply: u32, message: u32) -> bool {
        reply & 0xffff == message & 0xffff && reply & (ACK_MESSAGE | NACK_MESSAGE) != 0
    }

    fn protocol_reply(&self, message: &Words, from_pf: &Words, session: &mut Session) -> Option<Words> {
        let [word, version, queues, ..] = *from_pf.padded();
        if version != message.padded()[1] {
            return None;
        }
        session.version = version;
        Some(Words::new(&[word, version, queues.min(MOST_QUEUES)]))
    }
}
