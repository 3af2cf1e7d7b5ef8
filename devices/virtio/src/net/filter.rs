// SPDX-License-Identifier: Apache-2.0

//! The receive filter of a network device (the specification, 5.1.6.5.1 and 5.1.6.5.2).

use super::control::{Addresses, Mac};

/// The destination address of a frame.
const DESTINATION: usize = 6;
const BROADCAST: Mac = [0xff; 6];

/// The frames that a driver wants.
#[derive(Clone, Debug)]
pub struct Filter {
    address: Mac,
    /// Frames to any unicast address.
    pub promiscuous: bool,
    /// Frames to any multicast address.
    pub all_multicast: bool,
    /// Further unicast addresses.
    pub unicast: Addresses,
    /// Multicast addresses.
    pub multicast: Addresses,
}

impl Filter {
    /// The filter of a device at power-on: its own address and broadcasts.
    #[must_use]
    pub fn new(address: Mac) -> Self {
        let none = Addresses::Only(Vec::new());
        Self { address, promiscuous: false, all_multicast: false, unicast: none.clone(), multicast: none }
    }

    /// Whether a frame passes. `frame` begins with the destination address; without a complete
    /// address it does not pass.
    #[must_use]
    pub fn passes(&self, frame: &[u8]) -> bool {
        let Some(destination) = frame.get(..DESTINATION) else { return false };
        if destination == BROADCAST {
            return true;
        }
        let is_multicast = destination.first().is_some_and(|byte| byte & 1 != 0);
        let (all, list) = if is_multicast {
            (self.all_multicast || self.promiscuous, &self.multicast)
        } else {
            (self.promiscuous || destination == self.address, &self.unicast)
        };
        all || match list {
            Addresses::All => true,
            Addresses::Only(addresses) => addresses.iter().any(|address| destination == address),
        }
    }
}
