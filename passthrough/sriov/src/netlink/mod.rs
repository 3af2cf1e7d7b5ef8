// SPDX-License-Identifier: Apache-2.0

//! PF control through rtnetlink, events of interfaces, and their flow control.

mod flow_control;
mod message;
#[cfg(test)]
mod message_tests;
mod monitor;
mod pf;
mod socket;

pub use flow_control::{FlowControl, flow_control};
pub use monitor::{Hint, Monitor};
pub use pf::NetlinkPf;
