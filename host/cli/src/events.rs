// SPDX-License-Identifier: Apache-2.0

//! `portcullis events`, and the stream of events that survives an agent's restart.

use std::time::{Duration, Instant};

use api::{
    Client, ClientError,
    client::Events,
    types::{Event, EventKind},
};
use clap::Args;

use super::{
    error::CliError,
    output::{Output, or_dash},
    settings::plain,
};

#[derive(Debug, Args)]
pub struct EventsArgs {
    /// Begins after the event of this id, with the events that the agent still keeps (0: all of
    /// them), instead of now.
    #[arg(long, value_name = "ID")]
    since: Option<u64>,
    /// Goes on until it is interrupted; this is the default without --limit.
    #[arg(long, short, conflicts_with = "limit")]
    follow: bool,
    /// Ends after this many events.
    #[arg(long, value_name = "COUNT")]
    limit: Option<u64>,
}

pub(super) async fn run(client: &Client, output: &mut Output<'_>, args: EventsArgs) -> Result<(), CliError> {
    let mut stream = Stream::open(client, args.since).await?;
    output.heading(["TIME", "ID", "EVENT", "OBJECT", "WHAT"], WIDTHS)?;
    let mut left = args.limit;
    while left != Some(0) {
        let event = stream.next().await?;
        output.entry(&event, row(&event), WIDTHS)?;
        left = left.map(|left| left.saturating_sub(1));
    }
    Ok(())
}

/// The longest absence of the agent (it restarts) before the stream fails.
const PATIENCE: Duration = Duration::from_secs(10);

/// The pause between two tries to reach the agent again.
const PAUSE: Duration = Duration::from_millis(250);

/// Events without end: if the agent ends the stream, it is resumed after the last event.
pub struct Stream<'a> {
    client: &'a Client,
    events: Events,
    last: Option<u64>,
}

impl<'a> Stream<'a> {
    /// The events after the one of this id, or from now on.
    ///
    /// # Errors
    /// Those of the client.
    pub async fn open(client: &'a Client, after: Option<u64>) -> Result<Self, ClientError> {
        Ok(Stream { client, events: client.events(after).await?, last: after })
    }

    /// The next event.
    ///
    /// # Errors
    /// Those of the client.
    pub async fn next(&mut self) -> Result<Event, ClientError> {
        loop {
            match self.events.next().await {
                Ok(Some(event)) => {
                    self.last = Some(event.id);
                    return Ok(event);
                }
                // The agent ends, or this reader was too slow.
                Ok(None) | Err(ClientError::Broken { .. }) => self.events = self.again().await?,
                Err(error) => return Err(error),
            }
        }
    }

    async fn again(&self) -> Result<Events, ClientError> {
        let begun = Instant::now();
        loop {
            match self.client.events(self.last).await {
                Err(ClientError::NoAgent { .. } | ClientError::Broken { .. })
                    if begun.elapsed() < PATIENCE =>
                {
                    tokio::time::sleep(PAUSE).await;
                }
                result => return result,
            }
        }
    }
}

const WIDTHS: [usize; 5] = [24, 19, 8, 20, 0];

fn row(event: &Event) -> [String; 5] {
    let (object, what) = match &event.what {
        EventKind::VmState { vm, state, cause } => {
            let cause = cause.as_ref().map(|cause| format!(": {}", cause.detail)).unwrap_or_default();
            (format!("VM {}", vm.name), format!("{state}{cause}"))
        }
        EventKind::Decision { decision } => {
            let adapter = or_dash(decision.owner.adapter.as_ref());
            let reason = decision.reason.map(|reason| format!(" ({reason})")).unwrap_or_default();
            let values = match (&decision.old, &decision.requested) {
                (Some(old), Some(requested)) => format!(" {old} to {requested}"),
                (None, Some(value)) | (Some(value), None) => format!(" {value}"),
                (None, None) => String::new(),
            };
            let by =
                decision.edited_by.as_ref().map(|by| format!(" after an edit by {by}")).unwrap_or_default();
            let what = format!("{} {}{values}{reason}{by}", plain(&decision.verdict), decision.request);
            (format!("port {}/{adapter}", decision.owner.name), what)
        }
        EventKind::Created { object, revision, by } | EventKind::Changed { object, revision, by } => {
            let by = by.as_ref().map(|by| format!(" by {by}")).unwrap_or_default();
            (object.to_string(), format!("at revision {revision}{by}"))
        }
        EventKind::Deleted { object, by } => {
            (object.to_string(), by.as_ref().map(|by| format!("by {by}")).unwrap_or_default())
        }
        EventKind::PfState { pf, state } => (format!("PF {pf}"), plain(state)),
        EventKind::Gap => {
            ("-".to_owned(), "some events are no longer kept: read the objects again".to_owned())
        }
    };
    [event.time.to_string(), event.id.to_string(), event.what.name().to_owned(), object, what]
}
