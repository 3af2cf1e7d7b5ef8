// SPDX-License-Identifier: Apache-2.0

mod again;
mod floods;
mod guest;
mod properties;
mod revocation;
mod standing;
mod tables;
mod threads;

use netpolicy::{MacAddress, OnDenied, Reason};

use super::{Decision, How};

fn mac(last: u8) -> MacAddress {
    MacAddress::new([2, 0, 0, 0, 0, last])
}

const LOCAL: Decision = Decision::Grant { how: How::Local };
const FORWARD: Decision = Decision::Grant { how: How::Forward };
const NACK: Decision = Decision::Refuse { tell: OnDenied::Nack, reason: Reason::MacChangesRejected };
const SILENT: Decision = Decision::Refuse { tell: OnDenied::Silent, reason: Reason::MacChangesRejected };
