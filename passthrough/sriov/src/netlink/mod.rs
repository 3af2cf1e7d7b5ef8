// SPDX-License-Identifier: Apache-2.0

//! PF control and ports of bridges through rtnetlink, events of interfaces, and their flow control.

mod bridge;
mod flow_control;
mod message;
#[cfg(test)]
mod message_tests;
mod monitor;
mod pf;
mod socket;

pub use bridge::{BridgePortError, join_bridge};
pub use flow_control::{FlowControl, flow_control};
pub use monitor::{Hint, Monitor};
pub use pf::NetlinkPf;
