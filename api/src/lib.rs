// SPDX-License-Identifier: Apache-2.0

//! The REST contract: wire types, router, errors, OpenAPI document, typed client.

pub mod backend;
pub mod client;
pub mod document;
pub mod missing;
pub mod problem;
pub mod router;
#[cfg(feature = "test-support")]
pub mod seen;
pub mod tls;
pub mod token;
pub mod types;

pub use backend::{
    Answered, Backend, Caller, ConsoleRead, Health, Lease, LeaseTerms, PolicyBackend, Progress, Put,
    TurnedAway, User,
};
pub use client::{Client, ClientError, DEFAULT_SOCKET, Remote, RemoteError};
pub use missing::Missing;
pub use problem::{Problem, ProblemCode};
pub use router::{Gate, Limits, Listener, Source, openapi, router, router_with_policy, serve};
