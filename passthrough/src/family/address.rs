// SPDX-License-Identifier: Apache-2.0

//! The address that a driver requests after a reset, and the relay's own rules for such requests.
//!
//! A driver that *restores* (igbvf) keeps two addresses: the one that it last requested, and the one in the last reset
//! reply. After every reset it requests the former again (a "restore"). If the relay nacks the restore, the driver
//! takes the latter. Two rules follow:
//!
//! * *fresh*: the relay nacks a denied restore even if the policy asks for silence. An acknowledgement would make the
//!   driver keep an address that the device does not have, across all resets.
//! * *stale restore*: after a nack the driver goes back to the address of the last reset reply. If another address was
//!   granted in between, the next restore requests an obsolete address, and a policy that allows it would undo the
//!   grant. So the relay nacks it.
//!
//! A driver that *adopts* (ixgbevf) has one address: a reset replaces it by the one in the reply. Neither rule applies.

use netpolicy::MacAddress;

/// The address that a driver requests after a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressRule {
    /// The address that it last requested, whatever the reset reply has.
    Restores,
    /// The one in the reset reply.
    Adopts,
}

/// The relay's knowledge of the driver's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DriverAddress {
    rule: AddressRule,
    /// The driver has requested no address since the last reset.
    fresh: bool,
    /// The address in the last reset reply.
    from_reset: Option<MacAddress>,
    /// The address that the driver went back to after a nack; None after an acknowledgement.
    fallen_back: Option<MacAddress>,
}

/// First decision about a requested address, before the relay asks the authority.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// The address is the effective one: acknowledge it and forward nothing, because igb nacks even this address.
    Equal,
    /// A stale restore: nack it.
    Stale,
    /// The authority must decide.
    Ask,
}

impl DriverAddress {
    /// A driver that has not requested an address yet.
    pub fn new(rule: AddressRule) -> Self {
        Self { rule, fresh: false, from_reset: None, fallen_back: None }
    }

    /// Notes a reset reply with this address; None if it has none.
    pub fn reset(&mut self, reply: Option<MacAddress>) {
        self.fresh = self.rule == AddressRule::Restores;
        self.from_reset = reply.or(self.from_reset);
    }

    /// Judges a request for `mac` while `effective` is programmed.
    pub fn judge(&self, mac: MacAddress, effective: Option<MacAddress>) -> Judgement {
        if effective == Some(mac) {
            Judgement::Equal
        } else if self.fresh && effective.is_some() && self.fallen_back == Some(mac) {
            Judgement::Stale
        } else {
            Judgement::Ask
        }
    }

    /// Whether the relay must nack a denied request even if the policy asks for silence.
    pub fn must_tell(&self) -> bool {
        self.fresh
    }

    /// Notes the reply to a request for an address: an acknowledgement or a nack.
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
        /// A reset, answered with the effective address.
        Reset,
        /// A request; the authority grants it if the relay asks.
        Granted(u8, Judgement),
        /// A request; the authority denies it if the relay asks. `told`: the driver sees the refusal.
        Refused { mac: u8, judgement: Judgement, silent: bool, told: bool },
        /// The host changes the effective address.
        Host(u8),
    }
    use Judgement::{Ask, Equal, Stale};
    use Step::{Granted, Host, Refused, Reset};

    /// Plays the steps; the effective address is A at first. Returns the effective address at the end.
    fn play(steps: &[Step]) -> u8 {
        let (mut driver, mut effective) = (DriverAddress::new(AddressRule::Restores), A);
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
    fn a_driver_that_adopts_the_replys_address_restores_nothing() {
        let mut driver = DriverAddress::new(AddressRule::Adopts);
        driver.reset(Some(mac(A)));
        assert!(!driver.must_tell(), "silence is safe: the next reset tells the address");
        driver.answered(false);
        driver.reset(Some(mac(Y)));
        assert_eq!(driver.judge(mac(A), Some(mac(Y))), Ask, "asked for on purpose");
        assert_eq!(driver.judge(mac(Y), Some(mac(Y))), Equal);
    }

    #[test]
    fn the_old_address_may_be_asked_for_on_purpose() {
        let refused = || Refused { mac: Z, judgement: Ask, silent: false, told: true };
        // Not a restore: no reset in between.
        assert_eq!(play(&[Reset, Granted(A, Equal), Granted(Y, Ask), refused(), Granted(A, Ask)]), A);
        // The driver sees one refusal, then knows Y.
        let steps = [Reset, Granted(Y, Ask), refused(), Reset, Granted(A, Stale), Granted(A, Ask)];
        assert_eq!(play(&steps), A);
        // Without a refusal, the driver restores the address that it last requested.
        assert_eq!(play(&[Reset, Granted(Y, Ask), Host(A), Reset, Granted(Y, Ask)]), Y);
        // The same holds after an acknowledgement that follows the refusal.
        assert_eq!(
            play(&[Reset, Granted(Y, Ask), refused(), Granted(A, Ask), Host(Y), Reset, Granted(A, Ask)]),
            A
        );
    }
}
