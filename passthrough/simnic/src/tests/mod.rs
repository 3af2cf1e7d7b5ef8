// SPDX-License-Identifier: Apache-2.0

//! The simulated adapter as a whole: VFs, their PF's process loop on a thread, and drivers that behave as igbvf.
#![allow(clippy::cast_possible_truncation, reason = "made-up data")]

mod fixture;
mod frames;
mod function;
mod hostile;
mod pf;
mod relay;
mod reset;
mod uplink;
