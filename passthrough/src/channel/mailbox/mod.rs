// SPDX-License-Identifier: Apache-2.0

//! Mailbox registers of VF drivers: the registers that the guest sees in place of the real mailbox ([`registers`]), and
//! access to the real mailbox ([`vf_mailbox`]).
//!
//! Nothing here decides. The [relay](crate::relay) owns the real mailbox and waits for verdicts.

pub mod channel;
#[cfg(any(test, feature = "test-support"))]
pub mod fuzz;
pub mod layout;
pub mod message;
pub mod register_bits;
pub mod registers;
pub mod vf_mailbox;
