//! The REST contract: wire types, router, errors, OpenAPI document, typed client.

pub mod backend;
pub mod client;
pub mod problem;
pub mod router;
pub mod types;

pub use backend::{Backend, Caller, ConsoleRead, Health, PolicyBackend, Progress, Put};
pub use client::{Client, ClientError, DEFAULT_SOCKET};
pub use problem::{Problem, ProblemCode};
pub use router::{openapi, router, router_with_policy, serve};
