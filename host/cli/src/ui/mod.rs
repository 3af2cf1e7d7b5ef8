// SPDX-License-Identifier: Apache-2.0

//! `portcullis ui`: the agent's page (`/ui`) in a browser of this host.
//!
//! The agent lets no web page in. This command is the one way: it serves the page on a loopback port to a browser with
//! a link that works once, and forwards the page's requests in the name of its own user. The agent needs to listen
//! nowhere else, and nothing is left once the command ends.

mod browser;
mod proxy;
#[cfg(test)]
mod tests;

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
};

use api::{Client, Limits, Listener};
use clap::Args;
use tokio::net::TcpListener;

use super::{
    error::CliError,
    output::{Output, warn},
};
use proxy::Proxy;

#[derive(Debug, Args)]
pub struct UiArgs {
    /// The port on 127.0.0.1; by default a free one.
    #[arg(long, value_name = "PORT", default_value_t = 0)]
    port: u16,
    /// Only prints the link, even if a browser could open it.
    #[arg(long)]
    no_browser: bool,
}

/// The output of the command.
#[derive(serde::Serialize)]
struct Link {
    url: String,
}

pub(super) async fn run(client: &Client, output: &mut Output<'_>, args: UiArgs) -> Result<(), CliError> {
    // An agent that cannot be reached is an error before a browser opens the page.
    client.health().await?;
    let bound = async {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, args.port)).await?;
        listener.local_addr().map(|address| (listener, address))
    };
    let (listener, address): (_, SocketAddr) =
        bound.await.map_err(|source| CliError::Port { port: args.port, source })?;
    let proxy = Proxy::new(client.clone())?;
    let url = format!("http://{address}/#{}", proxy.link());
    let browser = (!args.no_browser).then(|| browser::open(&url)).flatten();
    let opened = browser.is_some();
    output.object(&Link { url: url.clone() }, |link| vec![("Open".to_owned(), link.url.clone())])?;
    warn(format_args!(
        "{}The link works once. Ctrl-C ends the page.",
        if opened { "Opening a browser. " } else { "" }
    ));
    let gate = proxy.gate();
    let listeners = vec![Listener::tcp(listener, gate, None)];
    api::serve(listeners, proxy.router(browser), Limits::default(), interrupted()).await;
    Ok(())
}

/// Waits for Ctrl-C or SIGTERM: either is the usual end.
async fn interrupted() {
    use tokio::signal::unix::{SignalKind, signal};
    let wait =
        || -> io::Result<_> { Ok((signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)) };
    // Without handlers the signal ends the process by itself.
    let Ok((mut interrupt, mut terminate)) = wait() else { return std::future::pending().await };
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
}
