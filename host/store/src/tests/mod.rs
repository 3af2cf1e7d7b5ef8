// SPDX-License-Identifier: Apache-2.0

//! Laws that hold for every store, and the file of [`SqliteStore`](super::SqliteStore).

mod laws;
mod sqlite;
