// SPDX-License-Identifier: Apache-2.0

//! The control channel between the agent and one vmm process.
//!
//! A `SOCK_SEQPACKET` Unix socket that the agent binds and the vmm listens on: an agent that was restarted or
//! upgraded connects again. One packet is one [`ToVmm`] or [`ToAgent`] message as JSON, at most [`FRAME_MAX`]
//! bytes; file descriptors travel beside it (`SCM_RIGHTS`).
//!
//! ```text
//!   agent                                   vmm
//!     │── Hello {versions} ─────────────────▶│
//!     │◀────────── Hello {version, state} ───│   (or Refused, and the connection ends)
//!     │── Order {id, Configure} + fds ──────▶│   once in the process's life
//!     │◀──────────────────── Done {id} ──────│
//!     │── Order {id, Boot} ─────────────────▶│
//!     │◀──────────────────── Done {id} ──────│
//!     │◀──────────── Report {seq, …} ────────│   kept by the vmm (bounded) until
//!     │── Noted {upto: seq} ────────────────▶│
//!     │◀────────────── Ask {id, …} ──────────│   with a deadline on the vmm's side
//!     │── Answer {id, …} ───────────────────▶│
//! ```
//!
//! One agent at a time: a new connection replaces the old one (the vmm checks that its peer has the uid that
//! started it). Orders are answered in any order; their ids are the agent's. Neither side trusts the other with
//! more than this module's types.

pub mod channel;
#[cfg(any(test, feature = "test-support"))]
pub mod fuzz;
pub mod message;

pub use channel::{Channel, ChannelError, FDS_MAX, FRAME_MAX, Listener};
pub use message::*;
