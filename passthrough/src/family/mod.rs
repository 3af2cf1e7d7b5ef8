// SPDX-License-Identifier: Apache-2.0

//! VF families: everything that depends on the VF's driver.
//!
//! A family is a folder here and a line in [`FAMILIES`]. It has the offsets of its registers ([`Layout`]), the meaning
//! of its messages ([`Codec`]), and two habits of its driver: the address that it requests after a reset
//! ([`AddressRule`]), and the words that make it reset ([`LostWords`]). The relay and the channel name no family.
//!
//! The behaviour of *PF* drivers is in `netpolicy::PfCapabilities`, because one VF driver meets several of them.

pub mod address;
pub mod igb;
pub mod ixgbe;
#[cfg(test)]
mod sample;

use std::fmt;

use netpolicy::{Change, MacAddress, Request};

pub use self::address::AddressRule;
use crate::channel::mailbox::{
    layout::Layout,
    message::{BUFFER_WORDS, Words},
    register_bits::ACK_MESSAGE,
};

/// The families that the relay supports.
pub static FAMILIES: &[&Family] = &[
    &igb::IGBVF,
    // For tests only: no stock driver and no PF have met it yet, and the agent does not take a promiscuous mode away that a VF
    // had before its first guest.
    #[cfg(any(test, feature = "test-support"))]
    &ixgbe::IXGBEVF,
    #[cfg(test)]
    &sample::SAMPLE,
];

/// One family of VFs.
#[derive(Debug)]
pub struct Family {
    /// The VF's driver in Linux, for log lines and users.
    pub driver: &'static str,
    /// PCI vendor and device ids of the VFs.
    pub ids: &'static [(u16, u16)],
    /// The registers of the mailbox page.
    pub layout: Layout,
    /// The messages.
    pub codec: &'static dyn Codec,
    /// The address that the driver requests after a reset.
    pub address: AddressRule,
    /// The words that make the driver reset its VF.
    pub lost: LostWords,
}

impl Family {
    /// The family of a VF, if the relay supports it.
    pub fn of(vendor: u16, device: u16) -> Option<&'static Self> {
        FAMILIES.iter().copied().find(|family| family.ids.contains(&(vendor, device)))
    }
}

/// The words without "clear to send" that make a driver reset its VF.
#[derive(Clone, Copy, Debug)]
pub struct LostWords {
    /// Word 0 of the mailbox once "clear to send" is lost.
    pub first: u32,
    /// Word 0 after the driver has acknowledged the first one; None if the first one is enough for every driver of the
    /// family.
    pub acknowledged: Option<u32>,
}

/// The messages of a family: pure translations, without I/O and without state.
///
/// No word of the guest reaches the PF: [`decode`](Self::decode) trusts none of them, and the PF gets only words of
/// [`encode`](Self::encode), [`encode_change`](Self::encode_change), [`reset`](Self::reset) and [`Step::Forward`], in
/// canonical form: the length of the opcode's message, unused bits and words zero.
pub trait Codec: Send + Sync + fmt::Debug {
    /// Decodes a message of the guest.
    ///
    /// # Errors
    /// [`Malformed`]. An unknown opcode is not malformed but [`Request::Unknown`].
    fn decode(&self, words: &[u32; BUFFER_WORDS], session: Session) -> Result<Incoming, Malformed>;

    /// Encodes a request; None for a request without a canonical form.
    fn encode(&self, request: &Request, context: Context) -> Option<Exchange>;

    /// Encodes a change with the mailbox as its [route](Change::route); None for other changes, and for a reset, which
    /// only the guest requests.
    fn encode_change(&self, change: &Change, context: Context) -> Option<Exchange>;

    /// The protocol messages that may have to precede the message of a change, because the guest has made no agreement
    /// yet: the first that the PF accepts is enough.
    fn before_change(&self, _change: &Change, _session: Session) -> Vec<Exchange> {
        Vec::new()
    }

    /// The reset message, and the length of its reply.
    fn reset(&self) -> Exchange;

    /// The content of the PF's reply to a reset message; None if `reply` is not such a reply.
    fn parse_reset(&self, reply: &Words) -> Option<ResetReply>;

    /// The reply that the guest sees to its reset message. Without an address the driver makes one up. `from_pf` is the
    /// PF's reply, for words that must reach the guest.
    fn reset_reply(&self, mac: Option<MacAddress>, from_pf: Option<ResetReply>) -> Words;

    /// The reply that the guest sees to any other message. `from_pf` is the PF's reply, if the message was forwarded.
    fn reply(&self, message: &[u32; BUFFER_WORDS], result: Outcome, from_pf: Option<&Words>) -> Words;

    /// Whether `reply` is word 0 of the PF's reply to a message with the word 0 `message`.
    fn answers(&self, reply: u32, message: u32) -> bool;

    /// The hash of a multicast address in messages: its bits 47:36, as the filters of 82576 and 82599 have it (datasheets, MTA
    /// with filter type 0).
    fn multicast_hash(&self, group: MacAddress) -> u16 {
        let [.., e, f] = group.bytes();
        (u16::from(e) >> 4 | u16::from(f) << 4) & 0xfff
    }

    /// Whether `reply`, the PF's reply to `message`, shows that the PF has carried it out as a whole.
    fn carried_out(&self, _message: &Words, reply: &Words) -> bool {
        reply.first() & ACK_MESSAGE != 0
    }

    /// Whether a PF that refuses this message may switch something off, until it accepts another message of this kind.
    /// The channel then repeats the last accepted one.
    fn refusal_disables(&self, _message: &Words) -> bool {
        false
    }

    /// The reply that the guest sees to a protocol message that the PF accepted: `from_pf` with its numbers bounded.
    /// Notes the agreement in `session`. None nacks the message.
    fn protocol_reply(&self, _message: &Words, _from_pf: &Words, _session: &mut Session) -> Option<Words> {
        None
    }
}

/// The protocol agreement between guest and PF. The guest's reset message clears it; before that message the relay
/// forwards nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Session {
    /// The version of the mailbox protocol, in the family's numbering; 0 without an agreement.
    pub version: u32,
}

/// State of the VF on which the form of a message may depend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context {
    /// The VF's effective address.
    pub effective: MacAddress,
    /// The agreement of guest and PF.
    pub session: Session,
}

/// A decoded message of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Incoming {
    /// A request that the policy decides.
    Request(Request),
    /// A message about the protocol itself, such as its version or the number of queues. No policy decides it.
    Protocol(Protocol),
}

/// A message about the protocol.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Protocol {
    /// The message's name in counters. A family has few of them.
    pub name: &'static str,
    /// The relay's next step.
    pub step: Step,
}

/// The relay's next step for a protocol message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nack the message, without the PF.
    Refuse,
    /// Send the message to the PF, in this form.
    Forward(Exchange),
}

/// A message for the PF, and the length of its reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exchange {
    /// The message.
    pub words: Words,
    /// Words of the reply, 1 to 16.
    pub reply_words: usize,
}

/// The PF's reply to a reset message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ResetReply {
    /// The VF's address, if the PF has one for it.
    pub mac: Option<MacAddress>,
    /// A further word that the guest must have from the PF.
    pub extra: Option<u32>,
}

/// The result of a message, from the PF or for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Whether the message is acknowledged; otherwise it is nacked.
    pub accepted: bool,
    /// Whether the PF listens to the VF.
    pub clear_to_send: bool,
}

/// The reason why a message has no meaning. The PF never hears such a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Word 0 is marked as an answer. PFs acknowledge such a message and send no reply.
    #[error("Message {0:#010x} is marked as an answer")]
    Answer(u32),
    /// Word 0 claims "clear to send", a bit that only the PF may set.
    #[error("Message {0:#010x} is marked as clear to send")]
    ClearToSend(u32),
    /// The opcode has no such argument (bits 23:16; bits 28:24 must be zero).
    #[error("Message {0:#010x} has an argument that its opcode does not take")]
    Argument(u32),
    /// The address is a group address or zero.
    #[error("{mac} cannot be an adapter's address")]
    Mac {
        /// The address.
        mac: MacAddress,
        /// Whether it was meant as a further unicast address.
        filter: bool,
    },
    /// The VLAN id is above 4094.
    #[error("VLAN {0} does not exist")]
    Vlan(u32),
    /// The frame size, in bytes, is outside of the family's range.
    #[error("A frame size of {0} bytes does not exist")]
    Frame(u32),
    /// The mode of reception is none of the family's.
    #[error("A receive mode {0} does not exist")]
    Mode(u32),
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_family_has_ids_and_registers_of_its_own() {
        let mut ids = BTreeSet::new();
        for family in FAMILIES {
            let layout = &family.layout;
            for id in family.ids {
                assert!(ids.insert(*id), "{}: {id:x?} is another family's", family.driver);
                assert_eq!(Family::of(id.0, id.1).unwrap().driver, family.driver);
            }
            let first = u64::from(layout.buffer);
            let buffer = first..first + 64;
            let own = [layout.control, layout.mailbox].map(u64::from);
            assert!(own.iter().all(|offset| !buffer.contains(offset)) && own[0] != own[1], "{layout:?}");
            for passed in layout.passed {
                for offset in passed.offsets.clone().map(u64::from) {
                    assert!(offset < 4096, "{layout:?}");
                    assert!(!own.contains(&offset) && !buffer.contains(&offset), "{offset:#x} in {layout:?}");
                }
            }
        }
        assert!(Family::of(0xffff, 0xffff).is_none());
    }
}
