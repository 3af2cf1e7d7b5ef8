// SPDX-License-Identifier: Apache-2.0

//! VFs of 82576 and i350 (Linux drivers igbvf and igb).

pub mod codec;
