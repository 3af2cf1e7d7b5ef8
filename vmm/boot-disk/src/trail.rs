// SPDX-License-Identifier: Apache-2.0

//! The places that a search has looked at.

use std::{fmt, io};

use crate::{
    TIME,
    error::{Fault, FindError, Places},
};

/// The places of one search that boot nothing.
#[derive(Default)]
pub(crate) struct Trail {
    all: Places,
    passed_over: Places,
    /// A place has another reason than a failed read.
    has_other: bool,
    unreadable: Option<io::Error>,
}

impl Trail {
    /// A place where nothing names a kernel.
    pub(crate) fn nothing(&mut self, place: &str, reason: &impl fmt::Display) {
        self.all.add(place, reason);
    }

    /// A place that is for other uses, or that this crate cannot read.
    pub(crate) fn other(&mut self, place: &str, reason: &impl fmt::Display) {
        self.has_other = true;
        self.all.add(place, reason);
    }

    /// A place that may name a kernel, and is passed over for a fault. The error is that of a fault that ends the search.
    pub(crate) fn fault(&mut self, place: &str, fault: Fault) -> Result<(), FindError> {
        self.all.add(place, &fault);
        self.passed_over.add(place, &fault);
        match fault {
            Fault::Budget(bytes) => return Err(FindError::Budget(bytes)),
            Fault::Late => return Err(FindError::Late(TIME)),
            Fault::Read(error) => drop(self.unreadable.get_or_insert(error)),
            _ => self.has_other = true,
        }
        Ok(())
    }

    /// The places with faults.
    pub(crate) fn passed_over(&self) -> &Places {
        &self.passed_over
    }

    /// The error of a search without a kernel.
    pub(crate) fn end(self) -> FindError {
        match self.unreadable {
            Some(error) if !self.has_other => FindError::Read(error),
            _ => FindError::Nothing(self.all),
        }
    }
}
