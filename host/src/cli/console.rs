// SPDX-License-Identifier: Apache-2.0

//! `portcullis console`: a VM's serial console, read or in both directions.
//!
//! On a terminal the two are connected as by a cable: keys go to the guest as they are, also Ctrl-C, but for the key that
//! takes the cable out.

mod follow;
mod terminal;

use std::{io::IsTerminal as _, time::Duration};

use api::Client;
use clap::Args;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
};

use super::{
    error::CliError,
    output::{Output, warn, warn_raw},
};
use follow::Followed;
use terminal::{Raw, keys};

/// Ctrl-], as of telnet and virsh.
const DETACH: u8 = 0x1d;

/// The most bytes that are sent at once: the serial port's buffer is small.
const PIECE: usize = 1024;

#[derive(Debug, Args)]
#[command(
    after_long_help = "On a terminal, the console is attached: what is typed goes to the guest. Ctrl-] detaches; the VM runs on."
)]
pub(super) struct ConsoleArgs {
    /// The VM's name or id.
    name: String,
    /// Goes on with what comes, until the VM ends, and sends nothing.
    #[arg(long, short)]
    follow: bool,
    /// Sends what is typed, until Ctrl-] or the end of the input or of the VM. This is what is done on a terminal without other options;
    /// it can be asked for where the input is none.
    #[arg(long, short, conflicts_with = "follow")]
    attach: bool,
    /// Begins at this byte in place of the oldest one that is kept.
    #[arg(long, value_name = "BYTES")]
    offset: Option<u64>,
    /// Types this text and a line end on the console first.
    #[arg(long, value_name = "TEXT")]
    send: Option<String>,
}

/// How an attached console ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The VM is at rest.
    Rest,
    /// Somebody detached it, or the input has ended.
    Detached,
    /// A signal asked this process to end.
    Signalled,
}

pub(super) async fn run(client: &Client, output: &mut Output<'_>, args: ConsoleArgs) -> Result<(), CliError> {
    if let Some(text) = &args.send {
        type_line(client, &args.name, text).await?;
    }
    let plain = !args.follow && args.offset.is_none() && args.send.is_none();
    if args.attach || (plain && on_terminal()) {
        return connect(client, output, &args.name, &args.name, args.offset, Duration::ZERO).await.map(drop);
    }
    show(client, output, &args.name, args.offset, args.follow, Duration::ZERO).await
}

fn on_terminal() -> bool {
    std::io::stdin().is_terminal() && std::io::stdout().is_terminal()
}

/// Shows all that is kept and all that comes until the VM ends; on a terminal in both directions, unless there is to be `no_input`. An
/// agent that is away is waited for, at most for `patience`.
pub(super) async fn attach(
    client: &Client,
    output: &mut Output<'_>,
    name: &str,
    id: &str,
    no_input: bool,
    patience: Duration,
) -> Result<End, CliError> {
    if !no_input && on_terminal() {
        return connect(client, output, name, id, None, patience).await;
    }
    show(client, output, id, None, true, patience).await.map(|()| End::Rest)
}

async fn show(
    client: &Client,
    output: &mut Output<'_>,
    vm: &str,
    offset: Option<u64>,
    follow: bool,
    patience: Duration,
) -> Result<(), CliError> {
    let mut console = Followed::open(client, vm, offset, follow, patience).await?;
    while let Some(bytes) = console.chunk().await? {
        output.raw(&bytes)?;
    }
    Ok(())
}

/// Both directions.
async fn connect(
    client: &Client,
    output: &mut Output<'_>,
    name: &str,
    vm: &str,
    offset: Option<u64>,
    patience: Duration,
) -> Result<End, CliError> {
    let mut console = Followed::open(client, vm, offset, true, patience).await?;
    // On a terminal in raw mode Ctrl-C is a key of the guest's; a signal comes from elsewhere, and the terminal must be put right.
    let mut ends = [SignalKind::terminate(), SignalKind::hangup(), SignalKind::interrupt()].map(signal);
    let [Ok(terminate), Ok(hangup), Ok(interrupt)] = &mut ends else {
        return Err(CliError::Terminal(std::io::Error::other("signals cannot be handled")));
    };
    let raw = Raw::enter().map_err(CliError::Terminal)?;
    if raw.is_some() {
        warn_raw(format_args!("portcullis: attached to {name}, Ctrl-] detaches"));
    }
    let mut typed = keys();
    let (to_guest, input) = mpsc::channel::<Vec<u8>>(16);
    let sender = tokio::spawn(send(client.clone(), vm.to_owned(), input));
    let mut to_guest = Some(to_guest);
    // Input of a file or a pipe that the guest has not taken yet. Output and signals do not wait for it.
    let mut waiting: Option<Vec<u8>> = None;
    let end = loop {
        tokio::select! {
            chunk = console.chunk() => match chunk? {
                Some(bytes) => output.raw(&bytes)?,
                None => break End::Rest,
            },
            permit = room(to_guest.clone()), if waiting.is_some() => match (permit, waiting.take()) {
                (Some(permit), Some(bytes)) => drop(permit.send(bytes)),
                // Its console takes nothing any more.
                _ => to_guest = None,
            },
            keys = typed.recv(), if to_guest.is_some() && waiting.is_none() => {
                let (bytes, detach) = match &keys {
                    Some(keys) => until_detach(keys, raw.is_some()),
                    // The end of a file or of a pipe.
                    None => (&[][..], true),
                };
                if let Some(to_guest) = to_guest.as_ref().filter(|_| !bytes.is_empty()) {
                    if raw.is_some() {
                        // A guest that takes nothing loses keys, as behind a real serial port; it must not keep from detaching.
                        let _ = to_guest.try_send(bytes.to_vec());
                    } else {
                        waiting = Some(bytes.to_vec());
                    }
                }
                if detach {
                    to_guest = None;
                    if raw.is_some() {
                        break End::Detached;
                    }
                }
            }
            () = told(terminate, hangup, interrupt) => break End::Signalled,
        }
    };
    drop(to_guest);
    // What was typed before is sent, unless the guest does not take it.
    let _ = tokio::time::timeout(PAUSE, sender).await;
    if raw.is_some() && end != End::Rest {
        drop(raw);
        warn(format_args!("\nportcullis: detached from {name}, which runs on"));
    }
    Ok(end)
}

/// A slot in the send queue; None if the queue is closed.
async fn room(to_guest: Option<mpsc::Sender<Vec<u8>>>) -> Option<mpsc::OwnedPermit<Vec<u8>>> {
    to_guest?.reserve_owned().await.ok()
}

async fn told(terminate: &mut Signal, hangup: &mut Signal, interrupt: &mut Signal) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = hangup.recv() => {}
        _ = interrupt.recv() => {}
    }
}

/// What is before the key that detaches, and whether it is there. Where the input is no terminal there is no such key.
fn until_detach(keys: &[u8], is_terminal: bool) -> (&[u8], bool) {
    match keys.iter().position(|key| is_terminal && *key == DETACH) {
        Some(at) => (keys.get(..at).unwrap_or_default(), true),
        None => (keys, false),
    }
}

/// Sends what is typed, in its order, as fast as the guest takes it, until it cannot be sent.
async fn send(client: Client, vm: String, mut input: mpsc::Receiver<Vec<u8>>) {
    while let Some(bytes) = input.recv().await {
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let piece = rest.get(..rest.len().min(PIECE)).unwrap_or_default();
            // The end of the output tells the end of the VM. An agent that is away loses what is typed, as a cable does.
            let Ok(taken) = client.write_console(&vm, piece.to_vec()).await else { break };
            rest = rest.get(taken.min(rest.len())..).unwrap_or_default();
            if !rest.is_empty() {
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// How often a guest that takes nothing is asked again, and how long it is waited for in between.
const TRIES: u32 = 100;
const PAUSE: Duration = Duration::from_millis(50);

async fn type_line(client: &Client, vm: &str, text: &str) -> Result<(), CliError> {
    let line = format!("{text}\n");
    let mut rest = line.as_bytes();
    let mut idle = 0;
    while !rest.is_empty() && idle < TRIES {
        let part = rest.get(..rest.len().min(PIECE)).unwrap_or_default();
        // The serial port's buffer is small: send little, and the rest when the guest has taken it.
        let taken = client.write_console(vm, part.to_vec()).await?;
        rest = rest.get(taken.min(rest.len())..).unwrap_or_default();
        if !rest.is_empty() {
            idle = if taken == 0 { idle + 1 } else { 0 };
            tokio::time::sleep(PAUSE).await;
        }
    }
    if !rest.is_empty() {
        warn(format_args!(
            "portcullis: the guest does not read its console: {} bytes were not taken",
            rest.len()
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_key_detaches_and_the_others_are_the_guest_s() {
        for (keys, terminal, expect) in [
            (&b"ls\r"[..], true, (&b"ls\r"[..], false)),
            (b"\x03", true, (b"\x03", false)),
            (b"a\x1db", true, (b"a", true)),
            (b"a\x1db", false, (b"a\x1db", false)),
        ] {
            assert_eq!(until_detach(keys, terminal), expect);
        }
    }
}
