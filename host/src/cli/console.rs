//! `portcullis console`.

use api::Client;
use clap::Args;

use super::{error::CliError, output::Output};

#[derive(Debug, Args)]
pub(super) struct ConsoleArgs {
    /// The VM's name or id.
    name: String,
    /// Goes on with what comes, until the VM ends.
    #[arg(long, short)]
    follow: bool,
    /// Begins at this byte in place of the oldest one that is kept.
    #[arg(long, value_name = "BYTES")]
    offset: Option<u64>,
    /// Types this text and a line end on the console first.
    #[arg(long, value_name = "TEXT")]
    send: Option<String>,
}

pub(super) async fn run(client: &Client, output: &mut Output<'_>, args: ConsoleArgs) -> Result<(), CliError> {
    if let Some(text) = &args.send {
        type_line(client, &args.name, text).await?;
    }
    show(client, output, &args.name, args.offset, args.follow).await
}

/// Shows all that is kept and all that comes until the VM ends.
pub(super) async fn follow(client: &Client, output: &mut Output<'_>, vm: &str) -> Result<(), CliError> {
    show(client, output, vm, None, true).await
}

async fn show(
    client: &Client,
    output: &mut Output<'_>,
    vm: &str,
    offset: Option<u64>,
    follow: bool,
) -> Result<(), CliError> {
    let mut console = client.read_console(vm, offset, follow).await?;
    while let Some(bytes) = console.chunk().await? {
        output.raw(&bytes)?;
    }
    Ok(())
}

/// How often a guest that takes nothing is asked again, and how long it is waited for in between.
const TRIES: u32 = 100;
const PAUSE: std::time::Duration = std::time::Duration::from_millis(50);

async fn type_line(client: &Client, vm: &str, text: &str) -> Result<(), CliError> {
    let line = format!("{text}\n");
    let mut rest = line.as_bytes();
    let mut idle = 0;
    while !rest.is_empty() && idle < TRIES {
        // The serial port's buffer is small: send little, and the rest when the guest has taken it.
        let part = rest.get(..rest.len().min(1024)).unwrap_or_default();
        let taken = client.write_console(vm, part.to_vec()).await?;
        rest = rest.get(taken.min(rest.len())..).unwrap_or_default();
        if !rest.is_empty() {
            idle = if taken == 0 { idle + 1 } else { 0 };
            tokio::time::sleep(PAUSE).await;
        }
    }
    if !rest.is_empty() {
        eprintln!("portcullis: the guest does not read its console: {} bytes were not taken", rest.len());
    }
    Ok(())
}
