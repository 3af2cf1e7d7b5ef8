// SPDX-License-Identifier: Apache-2.0

//! Integration tests on the real thing: the agent's own binary, reached through REST alone.
//!
//! `local::` needs /dev/kvm, `lab::` the nested lab. `tests/run` starts both and refuses to call a tier green that
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
mod lab;
mod local;
