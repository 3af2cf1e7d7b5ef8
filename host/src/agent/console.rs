// SPDX-License-Identifier: Apache-2.0

//! Streams a VM's console.

use std::sync::Arc;

use api::{
    ConsoleRead,
    problem::{Problem, ProblemCode},
};
use axum::body::Bytes;
use services::{console::Reader, vmm_process::VmDirectory};
use tokio::sync::mpsc;

use crate::vm::VmHandle;

/// The most pieces that wait for a slow client.
const PIECES: usize = 4;

/// Reads the console from `offset` on, and with `follow` also new output.
pub(super) async fn read(
    vm: VmHandle,
    directory: VmDirectory,
    offset: Option<u64>,
    follow: bool,
) -> Result<ConsoleRead, Problem> {
    let (sender, receiver) = mpsc::channel(PIECES);
    // Subscribed before the first read, so that no growth after it is missed.
    let mut growth = vm.console_growth();
    let mut status = vm.follow();
    growth.mark_unchanged();
    let reader = match Reader::open(&directory.console()) {
        Ok(reader) => Arc::new(reader),
        // Never booted: there is nothing to read.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Ok(ConsoleRead::from_channel(0, receiver));
        }
        Err(error) => return Err(unreadable(&error)),
    };
    let mut piece = read_at(&reader, offset.unwrap_or(0)).await.map_err(|error| unreadable(&error))?;
    let start = piece.offset;
    tokio::spawn(async move {
        loop {
            let end = piece.end();
            if piece.bytes.is_empty() {
                let at_rest = status.borrow_and_update().run.state.is_at_rest();
                if !follow || at_rest {
                    return;
                }
                tokio::select! {
                    grown = growth.changed() => if grown.is_err() { return },
                    // At the end of the VM the ring is read once more.
                    changed = status.changed() => if changed.is_err() { return },
                    () = sender.closed() => return,
                }
            } else if sender.send(Bytes::from(piece.bytes)).await.is_err() {
                return;
            }
            piece = match read_at(&reader, end).await {
                Ok(piece) => piece,
                Err(_) => return,
            };
        }
    });
    Ok(ConsoleRead::from_channel(start, receiver))
}

async fn read_at(reader: &Arc<Reader>, offset: u64) -> std::io::Result<services::console::Piece> {
    let reader = Arc::clone(reader);
    tokio::task::spawn_blocking(move || reader.read(offset)).await.map_err(std::io::Error::other)?
}

fn unreadable(error: &std::io::Error) -> Problem {
    Problem::new(ProblemCode::Internal, format!("The console's log cannot be read ({error})."))
}
