// SPDX-License-Identifier: Apache-2.0

//! Errors of a switch.

use api::{Missing, Problem, ProblemCode};
use netpolicy::{Entity, NameError, StateError, Unenforceable};
use services::problem::ToProblem;
use store::StoreError;
use text::chain;

/// The reason why the switch does not carry out a call.
#[derive(Debug, thiserror::Error)]
pub enum SwitchError {
    /// The switch's tables do not allow the change.
    #[error(transparent)]
    State(#[from] StateError),
    /// The named object does not exist.
    #[error("{0}")]
    NotFound(Missing),
    /// The port group that an adapter names does not exist.
    #[error("{0}")]
    NoPortGroup(Missing),
    /// The switch that a port group names does not exist.
    #[error("{0}")]
    NoSwitch(Missing),
    /// The object was changed meanwhile.
    #[error("The object is at revision {actual}, not {expected}")]
    Revision {
        /// The revision that the caller named.
        expected: u64,
        /// The present revision.
        actual: u64,
    },
    /// The default switch and the default port group cannot be deleted.
    #[error("{0} default cannot be deleted: change its settings instead")]
    Permanent(Entity),
    /// A PF cannot enforce a port's policy.
    #[error("Port {port} on PF {pf}{}: {source}", and_others(*.others))]
    Unenforceable {
        /// VM and adapter.
        port: String,
        /// The PF.
        pf: String,
        /// The number of further ports with a policy that their PF cannot enforce.
        others: usize,
        /// The part of the policy that the PF cannot enforce.
        source: Unenforceable,
    },
    /// The name is malformed.
    #[error(transparent)]
    Name(#[from] NameError),
    /// The store failed.
    #[error("The switch's state cannot be stored")]
    Store(#[from] StoreError),
    /// The stored data of a port contradicts the rest of the database.
    #[error(
        "The stored port {port} contradicts the rest of the database: restore the database from a backup"
    )]
    Contradiction {
        /// The port's name.
        port: String,
        /// The contradiction.
        source: StateError,
    },
    /// A PF cannot be read or configured.
    #[error("{0}")]
    Pf(String),
    /// The VF still has settings of its last tenant.
    #[error("{vf} could not be scrubbed after its last tenant: {why}")]
    NotCleaned {
        /// The VF's PCI address.
        vf: String,
        /// The reason, and the cure.
        why: String,
    },
    /// The kind of a new switch is `distributed`, and this release has no shared store for its
    /// definition.
    #[error(
        "A switch of kind distributed needs a store that hosts share, and this release has none: use standard"
    )]
    Distributed,
    /// A limit of this agent is reached.
    #[error("{0}")]
    TooMany(&'static str),
    /// The task has ended.
    #[error("The switch has ended with the agent")]
    Closed,
}

fn and_others(others: usize) -> String {
    match others {
        0 => String::new(),
        1 => " (and 1 other port)".to_owned(),
        _ => format!(" (and {others} other ports)"),
    }
}

impl ToProblem for SwitchError {
    fn problem(&self) -> Problem {
        let with = |code| Problem::new(code, chain(self));
        match self {
            Self::State(error) => with(state_code(error)),
            Self::NotFound(missing) => Problem::not_found(missing),
            Self::NoPortGroup(_) => with(ProblemCode::PortGroupNotFound),
            Self::NoSwitch(_) => with(ProblemCode::SwitchNotFound),
            Self::Revision { expected, actual } => Problem::revision_mismatch(*expected, *actual),
            Self::Permanent(what) => with(in_use_code(*what)),
            Self::Unenforceable { .. } => with(ProblemCode::PolicyUnenforceable),
            Self::Name(_) => with(ProblemCode::InvalidRequest),
            Self::Store(error) => error.problem(),
            Self::Pf(_) => with(ProblemCode::PfRefused),
            Self::NotCleaned { .. } => with(ProblemCode::DeviceFailed),
            // This ends the start of an agent, so no API call returns it.
            Self::Contradiction { .. } => with(ProblemCode::Internal),
            Self::Distributed => Problem::invalid("kind", chain(self)),
            Self::TooMany(_) | Self::Closed => with(ProblemCode::Unavailable),
        }
    }
}

fn state_code(error: &StateError) -> ProblemCode {
    match error {
        StateError::NoSwitch(_) | StateError::NoPortGroup(_) | StateError::NoPort(_) => ProblemCode::NotFound,
        StateError::Taken { .. } => ProblemCode::NameTaken,
        StateError::InUse { what, .. } => in_use_code(*what),
        StateError::MacInvalid(_) | StateError::OverrideNotAllowed { .. } | StateError::Immutable(_) => {
            ProblemCode::InvalidRequest
        }
        StateError::MacInUse { .. } => ProblemCode::MacInUse,
        StateError::NotAnUplink { .. } => ProblemCode::VfNotFound,
        StateError::Bound(_) | StateError::NotBound(_) | StateError::Pending(_) => ProblemCode::WrongState,
    }
}

fn in_use_code(what: Entity) -> ProblemCode {
    match what {
        Entity::PortGroup | Entity::Port => ProblemCode::PortGroupInUse,
        Entity::Vf => ProblemCode::VfInUse,
        Entity::Switch | Entity::Uplink => ProblemCode::SwitchInUse,
    }
}
