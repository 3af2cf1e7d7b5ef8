// SPDX-License-Identifier: Apache-2.0

//! The agent's side of one vmm process: its directory, its start, its control connection, its exit.
//!
//! The vmm process belongs to the guest as soon as guest code runs: what comes from it (messages, console file,
//! log) is read as input from a stranger.

mod conduct;
mod connection;
mod directory;
mod exit;
mod polled;
mod spawn;

pub use conduct::Allowance;
pub use connection::{ConnectError, Connection, Event, Greeting, OrderError};
pub use directory::VmDirectory;
pub use exit::{Exit, Identity, Process};
pub use spawn::{MEMLOCK_SLACK, Program, SpawnError, isolate, limit_memlock, spawn};
