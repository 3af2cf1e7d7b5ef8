// SPDX-License-Identifier: Apache-2.0

//! Doubles for tests: a VF whose PF answers as igb does, the stock driver's mailbox code, an authority with a script,
//! the tables that any implementation of either side must satisfy, and the check of an implementation against them.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test support only")]

pub mod bench;
pub mod conformance;
pub mod driver;
pub mod fake_vf;
pub mod igb;
pub mod ixgbe;
pub mod ixgbe_driver;
pub mod ixgbe_table;
pub mod table;

pub use self::{
    bench::{Bench, FakeClock, ScriptedAuthority},
    driver::{Bus, Driver},
    fake_vf::{Double, FakeVf},
};
