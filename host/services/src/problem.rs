// SPDX-License-Identifier: Apache-2.0

//! The errors of this host as problems of the API.

use std::error::Error;

use api::{Missing, Problem, ProblemCode};
use protocol::FailureCode;
use sriov::{ApplyError, BindError, InventoryError, PfError, VfCountError, ViabilityError};
use store::StoreError;
use text::chain;

use crate::vmm_process::{CommandError, ConnectError, SpawnError};

fn with(code: ProblemCode, error: &dyn Error) -> Problem {
    Problem::new(code, chain(error))
}

/// Errors that have a problem code.
pub trait ToProblem {
    /// The problem of this error.
    fn problem(&self) -> Problem;
}

impl ToProblem for StoreError {
    fn problem(&self) -> Problem {
        match self {
            Self::Conflict { expected, actual: Some(actual), .. } => {
                Problem::revision_mismatch(*expected, *actual)
            }
            Self::NotFound { kind, id } => Problem::not_found(&Missing::new(kind.clone(), id)),
            Self::NameTaken { .. } => with(ProblemCode::NameTaken, self),
            _ => with(ProblemCode::Unavailable, self),
        }
    }
}

impl ToProblem for InventoryError {
    fn problem(&self) -> Problem {
        match self {
            Self::NoDevice(_) | Self::NotVf(_) | Self::Orphan { .. } => with(ProblemCode::VfNotFound, self),
            Self::NotPf(_) | Self::NoSuchInterface(_) => with(ProblemCode::NotFound, self),
            Self::Sysfs(_) => with(ProblemCode::Internal, self),
        }
    }
}

impl ToProblem for ViabilityError {
    fn problem(&self) -> Problem {
        match self {
            Self::NoIommu(_) => with(ProblemCode::VfioUnavailable, self),
            Self::NotViable { .. } => with(ProblemCode::GroupNotViable, self),
            Self::InterruptRemappingOff(_) => with(ProblemCode::InterruptRemappingOff, self),
            Self::Inventory(error) => error.problem(),
            Self::Sysfs(_) => with(ProblemCode::Internal, self),
        }
    }
}

impl ToProblem for BindError {
    fn problem(&self) -> Problem {
        match self {
            Self::NoDevice(_) => with(ProblemCode::VfRemoved, self),
            Self::NoDriver { .. } => with(ProblemCode::VfioUnavailable, self),
            Self::NotReleased { .. } | Self::NotTaken { .. } | Self::HasDriver { .. } => {
                with(ProblemCode::DeviceInUse, self)
            }
            Self::Thread(_) | Self::Sysfs(_) => with(ProblemCode::Internal, self),
        }
    }
}

impl ToProblem for PfError {
    fn problem(&self) -> Problem {
        match self {
            Self::NoInterface { .. } => with(ProblemCode::PfDown, self),
            Self::NoVf { .. } => with(ProblemCode::VfRemoved, self),
            Self::Inventory(error) => error.problem(),
            _ => with(ProblemCode::PfRefused, self),
        }
    }
}

impl ToProblem for ApplyError {
    fn problem(&self) -> Problem {
        Problem { detail: chain(self), ..self.source.problem() }
    }
}

impl ToProblem for VfCountError {
    fn problem(&self) -> Problem {
        match self {
            Self::TooMany { .. } => with(ProblemCode::TooManyVfs, self),
            Self::NotZero { .. } => with(ProblemCode::WrongState, self),
            Self::Busy(_) => with(ProblemCode::VfsInUse, self),
            Self::NoDriver(_) | Self::Unsupported { .. } | Self::NotTaken { .. } => {
                with(ProblemCode::PfRefused, self)
            }
            Self::Inventory(error) => error.problem(),
            Self::Sysfs(_) => with(ProblemCode::Internal, self),
        }
    }
}

impl ToProblem for SpawnError {
    fn problem(&self) -> Problem {
        match self {
            Self::Memlock { .. } => with(ProblemCode::MemlockTooSmall, self),
            Self::Directory(_) | Self::Process(_) => with(ProblemCode::VmmFailed, self),
        }
    }
}

impl ToProblem for ConnectError {
    fn problem(&self) -> Problem {
        with(ProblemCode::VmmFailed, self)
    }
}

impl ToProblem for CommandError {
    fn problem(&self) -> Problem {
        let failure = match self {
            Self::Failed(failure) => failure,
            Self::TooOld => return with(ProblemCode::WrongState, self),
            _ => return with(ProblemCode::VmmFailed, self),
        };
        let code = match failure.code {
            FailureCode::WrongState => ProblemCode::WrongState,
            FailureCode::Kvm => ProblemCode::KvmUnavailable,
            FailureCode::Memory => ProblemCode::MemoryUnavailable,
            FailureCode::Placement => ProblemCode::PlacementUnavailable,
            FailureCode::CpuFeature => ProblemCode::CpuFeatureUnavailable,
            FailureCode::Kernel => ProblemCode::KernelInvalid,
            FailureCode::NoKernelOnDisk => ProblemCode::NoKernelOnDisk,
            FailureCode::Memlock => ProblemCode::MemlockTooSmall,
            FailureCode::GroupNotViable => ProblemCode::GroupNotViable,
            FailureCode::Disk => ProblemCode::DiskInvalid,
            FailureCode::Device => ProblemCode::DeviceFailed,
            FailureCode::Sandbox => ProblemCode::SandboxUnavailable,
            FailureCode::Invalid => ProblemCode::InvalidRequest,
            _ => ProblemCode::Internal,
        };
        // The vmm is not trusted with the length of its text.
        Problem::new(code, failure.detail.chars().take(2000).collect::<String>())
    }
}
