// SPDX-License-Identifier: Apache-2.0

//! For tests, also of other crates: a tree that looks and reacts like the kernel's sysfs, and a PF in memory that
//! answers like igb.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // A broken fake must stop the test.

mod pf;
mod tree;

pub use pf::FakePf;
pub use tree::FakeSysfs;
