// SPDX-License-Identifier: Apache-2.0

//! Integration tests of the agent's own binary, over REST alone.
//!
//! `local::` needs /dev/kvm, `lab::` the nested lab, `hardware::` an adapter. `tests/run` starts them; a tier that
//! did not run is not green.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    missing_docs,
    unreachable_pub
)]

mod fixture;
mod hardware;
mod lab;
mod local;
