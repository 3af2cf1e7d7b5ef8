// SPDX-License-Identifier: Apache-2.0

//! `portcullis decisions`.

use api::{
    Client,
    types::{Decision, DecisionFilter, EventKind, MAX_PAGE, Timestamp},
};
use clap::Args;
use netpolicy::{Committed, Outcome};
use uuid::Uuid;

use super::{
    error::CliError,
    events::Stream,
    output::{Output, or_dash},
    settings::{plain, word},
};

#[derive(Debug, Args)]
pub struct DecisionsArgs {
    /// Only those of this VM: its name or id. If another VM has the name of a deleted one, the id finds the
    /// decisions of the deleted one.
    #[arg(long, value_name = "VM")]
    vm: Option<String>,
    /// Only those of this port: VM and adapter, as web1/eth0, or the port's id.
    #[arg(long, value_name = "PORT")]
    port: Option<String>,
    /// Only those with this outcome: allowed, denied, taken_back, repaired or reverted.
    #[arg(long, value_name = "VERDICT", value_parser = word::<Outcome>)]
    verdict: Option<Outcome>,
    /// Only those since this time (2026-01-31T12:00:00Z), or within this time span (10m, 2h, 1day).
    #[arg(long, value_name = "TIME", value_parser = since)]
    since: Option<Timestamp>,
    /// At most this many: the latest ones.
    #[arg(long, value_name = "COUNT", default_value_t = DecisionFilter::default().limit,
        value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_PAGE)))]
    limit: u32,
    /// Follows new decisions. The earliest comes first, and --output json writes a line for each.
    #[arg(long, short)]
    follow: bool,
}

/// A time, or a time span before now.
fn since(text: &str) -> Result<Timestamp, String> {
    if let Ok(ago) = humantime::parse_duration(text) {
        let ago = u64::try_from(ago.as_millis()).unwrap_or(u64::MAX);
        return Ok(Timestamp::from_unix_ms(Timestamp::now().unix_ms().saturating_sub(ago)));
    }
    text.parse().map_err(|error: api::types::Invalid| format!("{error}, nor a time span such as 10m"))
}

pub(super) async fn run(
    client: &Client,
    output: &mut Output<'_>,
    args: DecisionsArgs,
) -> Result<(), CliError> {
    let port = match &args.port {
        None => None,
        // A port that is gone has no name any more, but its decisions are kept.
        Some(port) => match Uuid::try_parse(port) {
            Ok(id) => Some(id),
            Err(_) => Some(client.get_port(port).await?.id),
        },
    };
    let filter = DecisionFilter {
        vm: args.vm,
        port,
        verdict: args.verdict,
        since: args.since,
        limit: args.limit,
        cursor: None,
    };
    if !args.follow {
        let decisions = client.decisions(&filter).await?;
        return Ok(output.table(&decisions, HEADER, row)?);
    }
    follow(client, output, &filter).await
}

/// Lists the stored decisions, then new ones.
async fn follow(client: &Client, output: &mut Output<'_>, filter: &DecisionFilter) -> Result<(), CliError> {
    // Subscribed first: a decision between the two calls is seen twice, rather than never.
    let mut stream = Stream::open(client, None).await?;
    let mut listed = client.decisions(filter).await?;
    listed.reverse();
    output.heading(HEADER, WIDTHS)?;
    for decision in &listed {
        output.entry(decision, row(decision), WIDTHS)?;
    }
    loop {
        let EventKind::Decision { decision } = stream.next().await?.what else { continue };
        let seen = |known: &Decision| known.id == decision.id && known.count >= decision.count;
        if passes(filter, &decision) && !listed.iter().any(seen) {
            output.entry(&decision, row(&decision), WIDTHS)?;
        }
    }
}

/// The agent's filter of stored decisions, for new ones: a new decision is later than any `since`.
fn passes(filter: &DecisionFilter, decision: &Decision) -> bool {
    let vm = |vm: &String| {
        vm.eq_ignore_ascii_case(&decision.owner.name) || *vm.to_lowercase() == decision.owner.vm.to_string()
    };
    filter.vm.as_ref().is_none_or(vm)
        && filter.port.is_none_or(|port| port == decision.port)
        && filter.verdict.is_none_or(|verdict| verdict == decision.verdict)
}

const HEADER: [&str; 9] = ["TIME", "PORT", "VF", "REQUEST", "OLD", "REQUESTED", "VERDICT", "REASON", "COUNT"];

/// For a table without end, and so without a widest cell.
const WIDTHS: [usize; 9] = [24, 16, 8, 14, 17, 17, 18, 20, 5];

/// A change that the PF refused is marked as failed.
fn verdict(decision: &Decision) -> String {
    let failed = decision.committed == Committed::Failed && decision.verdict != Outcome::Denied;
    plain(&decision.verdict) + if failed { " (failed)" } else { "" }
}

fn row(decision: &Decision) -> [String; 9] {
    let vf = match (&decision.pf, decision.vf_index) {
        (Some(pf), Some(index)) => format!("{pf}/{index}"),
        _ => "-".to_owned(),
    };
    [
        decision.last.to_string(),
        format!("{}/{}", decision.owner.name, or_dash(decision.owner.adapter.as_ref())),
        vf,
        decision.request.clone(),
        or_dash(decision.old.as_ref()),
        or_dash(decision.requested.as_ref()),
        verdict(decision),
        or_dash(decision.reason.map(netpolicy::Reason::name)),
        decision.count.to_string(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_a_date_or_so_long_ago() {
        assert_eq!(since("2026-01-31T12:00:00Z").unwrap().to_string(), "2026-01-31T12:00:00.000Z");
        let then = since("1h").unwrap().unix_ms();
        let hour = Timestamp::now().unix_ms() - then;
        assert!((3_600_000..3_660_000).contains(&hour), "{hour}");
        let error = since("yesterday").unwrap_err();
        assert!(error.contains("2026-01-31T12:00:00Z") && error.contains("10m"), "{error}");
    }
}
