// SPDX-License-Identifier: Apache-2.0

//! The control protocol between the agent and one vmm process.
//!
//! The agent binds a listening `SOCK_SEQPACKET` Unix socket, and the vmm inherits and accepts from it: an agent that
//! was restarted or upgraded connects again. One packet is one [`ToVmm`] or [`ToAgent`] message as JSON, at most
//! [`FRAME_MAX`] bytes; file descriptors travel beside it (`SCM_RIGHTS`), and only from the agent to the vmm.
//!
//! ```text
//!   agent                                   vmm
//!     │── Hello {versions} ─────────────────▶│
//!     │◀────────── Hello {version, state} ───│   (or Refused, and the connection ends)
//!     │── Command {id, Configure} + fds ────▶│   once in the process's life
//!     │◀──────────────────── Done {id} ──────│
//!     │── Command {id, Run} ────────────────▶│
//!     │◀──────────────────── Done {id} ──────│
//!     │◀───────────── Event {seq, …} ────────│   kept by the vmm (bounded) until
//!     │── Noted {upto: seq} ────────────────▶│
//!     │◀────────── Request {id, …} ──────────│   with a deadline on the vmm's side
//!     │── Response {id, …} ─────────────────▶│
//!     │── Standing {adapter, refusal} ──────▶│   denied without a Request while the connection lasts
//! ```
//!
//! There is one agent at a time: a new connection replaces the old one, if its peer has the user id of this process.
//! The agent chooses the ids of its commands, and the vmm may complete commands in another sequence. Neither side trusts
//! the other with more than this module's types.

pub mod channel;
pub mod files;
#[cfg(any(test, feature = "test-support"))]
pub mod fuzz;
pub mod message;
pub mod spec;

pub use channel::{Channel, ChannelError, FDS_MAX, FRAME_MAX, Listener};
pub use files::{FileError, Files};
pub use message::*;
pub use spec::*;

#[cfg(test)]
mod tests;
