// SPDX-License-Identifier: Apache-2.0

//! PF control through rtnetlink, and events of interfaces.

mod message;
#[cfg(test)]
mod message_tests;
mod monitor;
mod pf;
mod socket;

pub use monitor::{Hint, Monitor};
pub use pf::NetlinkPf;
