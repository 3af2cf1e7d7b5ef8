// SPDX-License-Identifier: Apache-2.0

//! PF control and ports of bridges through rtnetlink, and events of interfaces.

mod bridge;
mod message;
#[cfg(test)]
mod message_tests;
mod monitor;
mod pf;
mod socket;

pub use bridge::{BridgePortError, join_bridge};
pub use monitor::{Hint, Monitor};
pub use pf::NetlinkPf;
