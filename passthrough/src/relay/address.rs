// SPDX-License-Identifier: Apache-2.0

//! What the driver will do with its address at its next reset, and which of that must be refused.
//!
//! igbvf keeps two addresses: the one it last asked for, and the one of the last reset's reply. After every reset it
//! asks for the former again ("restore"); refused, it takes the latter. Two rules follow, in both ways of refusing:
//!
//! * *fresh*: a refusal that the guest must not see (silent) is told all the same when it answers a restore.
//!   Acknowledged, the driver would keep an address that the device does not have, across all resets.
//! * *stale restore*: a refusal makes the driver go back to the address of the last reset's reply. If it was granted
//!   another one in between, its next restore asks for an address that nobody wants any more, and a policy that
//!   accepts it would undo the granted one. So that one is refused.

use netpolicy::MacAddress;

/// What is known of the driver's two addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DriverAddress {
    /// No address was asked for since the last reset.
    fresh: bool,
    /// Of the last reset's reply.
    from_reset: Option<MacAddress>,
    /// A refusal made the driver go back to this address, and nothing was acknowledged since.
    fallen_back: Option<MacAddress>,
}

/// What to do with a request for an address before anybody is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// It is the effective one: acknowledge, forward nothing (igb refuses even that).
    Equal,
    /// A stale restore: refuse.
    Stale,
    /// The authority decides.
    Ask,
}

impl DriverAddress {
    /// A reset was answered with this address.
    pub fn reset(&mut self, reply: Option<MacAddress>) {
        self.fresh = true;
        self.from_reset = reply.or(self.from_reset);
    }

    /// The guest asks for `mac` while `effective` is programmed.
    pub fn judge(&self, mac: MacAddress, effective: Option<MacAddress>) -> Judgement {
        if effective == Some(mac) {
            Judgement::Equal
        } else if self.fresh && effective.is_some() && self.fallen_back == Some(mac) {
            Judgement::Stale
        } else {
            Judgement::Ask
        }
    }

    /// Whether a refusal that is meant to be silent must be told.
    pub fn must_tell(&self) -> bool {
        self.fresh
    }

    /// A request for an address was answered.
    pub fn answered(&mut self, acknowledged: bool) {
        self.fresh = false;
        self.fallen_back = if acknowledged { None } else { self.from_reset };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: u8 = 0xa;
    const Y: u8 = 0xb;
    const Z: u8 = 0xc;

    fn mac(last: u8) -> MacAddress {
        MacAddress::new([2, 0, 0, 0, 0, last])
    }

    enum Step {
        /// Reset, answered with the effective address.
        Reset,
        /// Asked for; granted by the authority if it comes to that.
        Granted(u8, Judgement),
        /// Asked for; refused by the authority if it comes to that. `told`: the driver sees it.
        Refused { mac: u8, judgement: Judgement, silent: bool, told: bool },
        /// The host changes the effective address.
        Host(u8),
    }
    use Judgement::{Ask, Equal, Stale};
    use Step::{Granted, Host, Refused, Reset};

    /// Plays the steps; the effective address is A at first. Returns the effective address at the end.
    fn play(steps: &[Step]) -> u8 {
        let (mut driver, mut effective) = (DriverAddress::default(), A);
        for (index, step) in steps.iter().enumerate() {
            match *step {
                Reset => driver.reset(Some(mac(effective))),
                Host(address) => effective = address,
                Granted(address, expected) => {
                    let judgement = driver.judge(mac(address), Some(mac(effective)));
                    assert_eq!(judgement, expected, "step {index}");
                    if judgement == Ask {
                        effective = address;
                    }
                    driver.answered(judgement != Stale);
                }
                Refused { mac: address, judgement: expected, silent, told } => {
                    let judgement = driver.judge(mac(address), Some(mac(effective)));
                    assert_eq!(judgement, expected, "step {index}");
                    let tells = !silent || driver.must_tell();
                    assert_eq!(tells, told, "step {index}");
                    driver.answered(!tells);
                }
            }
        }
        effective
    }

    #[test]
    fn an_equal_address_needs_no_question() {
        assert_eq!(play(&[Reset, Granted(A, Equal), Granted(A, Equal)]), A);
    }

    #[test]
    fn a_silent_refusal_is_silent_except_for_the_restore_after_a_reset() {
        let silently = |told| Refused { mac: Z, judgement: Ask, silent: true, told };
        assert_eq!(
            play(&[Reset, Granted(A, Equal), silently(false), silently(false), Reset, silently(true)]),
            A
        );
        assert_eq!(play(&[Reset, silently(true), silently(false)]), A);
    }

    #[test]
    fn a_granted_address_survives_a_later_refusal_and_a_reset() {
        for silent in [false, true] {
            let refused = Refused { mac: Z, judgement: Ask, silent: false, told: true };
            let steps = [
                Reset,
                Granted(A, Equal),
                Granted(Y, Ask),
                refused,
                Reset,
                Granted(A, Stale),
                Granted(Y, Equal),
            ];
            assert_eq!(play(&steps), Y, "silent {silent}");
        }
    }

    #[test]
    fn the_old_address_may_be_asked_for_on_purpose() {
        let refused = || Refused { mac: Z, judgement: Ask, silent: false, told: true };
        // Not a restore: no reset in between.
        assert_eq!(play(&[Reset, Granted(A, Equal), Granted(Y, Ask), refused(), Granted(A, Ask)]), A);
        // The driver is told once, then knows Y.
        let steps = [Reset, Granted(Y, Ask), refused(), Reset, Granted(A, Stale), Granted(A, Ask)];
        assert_eq!(play(&steps), A);
        // No refusal: what it restores is what it last asked for.
        assert_eq!(play(&[Reset, Granted(Y, Ask), Host(A), Reset, Granted(Y, Ask)]), Y);
        // An acknowledgement after the refusal: likewise.
        assert_eq!(
            play(&[Reset, Granted(Y, Ask), refused(), Granted(A, Ask), Host(Y), Reset, Granted(A, Ask)]),
            A
        );
    }
}
