// SPDX-License-Identifier: Apache-2.0

//! Errors of boot files and simulated adapters as problems of the API.

use api::{Problem, ProblemCode};
use services::problem::ToProblem;
use text::chain;

use crate::{files::FileError, sim::SimError};

/// A file of a VM's specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BootFile {
    /// The kernel.
    Kernel,
    /// The initramfs.
    Initramfs,
}

impl BootFile {
    /// The problem of an error at opening the file of a field.
    #[must_use]
    pub fn problem(self, field: &str, error: &FileError) -> Problem {
        let (missing, unreadable) = match self {
            Self::Kernel => (ProblemCode::KernelNotFound, ProblemCode::KernelUnreadable),
            Self::Initramfs => (ProblemCode::InitramfsNotFound, ProblemCode::InitramfsUnreadable),
        };
        let code = match error {
            FileError::Missing { .. } => missing,
            FileError::Unreadable { .. }
            | FileError::ReadOnly { .. }
            | FileError::LeadsOut { .. }
            | FileError::Loop { .. }
            | FileError::Replaced { .. }
            | FileError::NotRegular { .. }
            | FileError::Io { .. } => unreadable,
        };
        Problem { field: Some(field.into()), ..Problem::new(code, chain(error)) }
    }
}

impl ToProblem for SimError {
    fn problem(&self) -> Problem {
        match self {
            Self::Store(error) => error.problem(),
            _ => Problem::new(ProblemCode::PfRefused, chain(self)),
        }
    }
}
