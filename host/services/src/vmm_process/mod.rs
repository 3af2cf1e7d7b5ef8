// SPDX-License-Identifier: Apache-2.0

//! The agent's side of one vmm process: its directory, its start, its control connection, its exit.
//!
//! The vmm process belongs to the guest as soon as guest code runs: what comes from it (messages, console file,
//! log) is read as input from a stranger.

mod async_fd;
mod connection;
mod directory;
mod exit;
mod protocol_guard;
mod spawn;

pub use connection::{
    CommandError, ConnectError, Connection, Greeting, MachineEvent, RelayMessage, RelayMessages,
};
pub use directory::VmDirectory;
pub use exit::{Exit, Identity, Process};
pub use protocol_guard::Allowance;
pub use spawn::{MEMLOCK_SLACK, Program, SpawnError, allow_longer_files, isolate, limit_memlock, spawn};
