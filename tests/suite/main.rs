// SPDX-License-Identifier: Apache-2.0

//! Integration tests on the real thing: the agent's own binary, reached through REST alone.
//!
//! `local::` needs /dev/kvm, `lab::` the nested lab, `hardware::` an adapter. `tests/run` starts them, and no tier is green that
//! did not run.

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
