// SPDX-License-Identifier: Apache-2.0

//! `portcullis console`: a VM's serial console, read or in both directions.
//!
//! A terminal and the console are connected as by a cable: all keys go to the guest, also Ctrl-C, except for the key
//! that detaches.

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
    after_long_help = "On a terminal, the console is attached: your keys go to the guest. Ctrl-] detaches; the VM runs on."
)]
pub struct ConsoleArgs {
    /// The VM's name or id.
    name: String,
    /// Follows new output until the VM ends, and sends nothing.
    #[arg(long, short)]
    follow: bool,
    /// Sends the input to the guest, until Ctrl-] or the end of the input or of the VM. This is the
    /// default on a terminal without other options; choose it for input that is not a terminal.
    #[arg(long, short, conflicts_with = "follow")]
    attach: bool,
    /// Begins at this byte instead of the oldest kept one.
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
    /// The key that detaches was pressed, or the input has ended.
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

/// Shows the kept and all further output until the VM ends; on a terminal in both directions, except with `no_input`.
/// Waits for an agent that is away, at most for `patience`.
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

/// Connects input and output to the console until one of the [`End`]s.
async fn connect(
    client: &Client,
    output: &mut Output<'_>,
    name: &str,
    vm: &str,
    offset: Option<u64>,
    patience: Duration,
) -> Result<End, CliError> {
    let mut console = Followed::open(client, vm, offset, true, patience).await?;
    // On a terminal in raw mode Ctrl-C is a key for the guest. A signal comes from elsewhere, and the terminal must be
    // restored.
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
                // The sender has ended: the console takes no more input.
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
                        // A guest that takes no input loses keys, as behind a real serial port. It must not prevent
                        // detaching.
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
    // The input before the end is sent, unless the guest does not take it.
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

/// The keys before the one that detaches, and whether that one is among them. Input that is no terminal has no such
/// key.
fn until_detach(keys: &[u8], is_terminal: bool) -> (&[u8], bool) {
    match keys.iter().position(|key| is_terminal && *key == DETACH) {
        Some(at) => (keys.get(..at).unwrap_or_default(), true),
        None => (keys, false),
    }
}

/// Sends input in its order, as fast as the guest takes it. After an error the rest of its piece of input is lost.
async fn send(client: Client, vm: String, mut input: mpsc::Receiver<Vec<u8>>) {
    while let Some(bytes) = input.recv().await {
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let piece = rest.get(..rest.len().min(PIECE)).unwrap_or_default();
            // The end of the output shows the end of the VM. While the agent is away input is lost, as on a cable.
            let Ok(taken) = client.write_console(&vm, piece.to_vec()).await else { break };
            rest = rest.get(taken.min(rest.len())..).unwrap_or_default();
            if !rest.is_empty() {
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// The number of successive attempts with a guest that takes no input, and the pause between two.
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
            "portcullis: the guest does not read its console: {} bytes were not delivered",
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
