// SPDX-License-Identifier: Apache-2.0

//! Log lines about requests that were refused before their caller was known.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use api::{ProblemCode, Source, TurnedAway};
use passthrough::relay::{Rate, TokenBucket};
use services::line_rate::LineRate;

/// The rate of lines about one source.
const EACH: Rate = Rate { burst: 5, period: Duration::from_secs(10) };

/// The rate of lines about all sources together: there may be many addresses.
const ALL: Rate = Rate { burst: 50, period: Duration::from_secs(1) };

/// The most sources in memory.
const SOURCES: usize = 1024;

/// The rates of these lines.
#[derive(Debug)]
pub(super) struct Strangers {
    began: Instant,
    rates: Mutex<(LineRate<(Source, ProblemCode)>, TokenBucket)>,
}

impl Default for Strangers {
    fn default() -> Self {
        let rates = (LineRate::new(EACH, SOURCES), TokenBucket::new(ALL));
        Self { began: Instant::now(), rates: Mutex::new(rates) }
    }
}

impl Strangers {
    /// Writes a line, or counts it for the next one. A line never has a token, right or wrong.
    pub(super) fn say(&self, away: &TurnedAway) {
        let TurnedAway { source, code } = *away;
        let Some(suppressed) = self.take(away, self.began.elapsed()) else { return };
        let why = match code {
            ProblemCode::Unauthorized => "it has no token of the token file",
            _ => "it came from a web page, or for a foreign host name",
        };
        tracing::warn!(%source, %code, suppressed, "refused a request of the API: {why}");
    }

    fn take(&self, away: &TurnedAway, now: Duration) -> Option<u64> {
        let mut rates = self.rates.lock().unwrap_or_else(PoisonError::into_inner);
        let (each, all) = &mut *rates;
        // A line of a source that is suppressed anyway takes nothing from the others.
        let suppressed = each.take((away.source.share(), away.code), now)?;
        all.take(now).then_some(suppressed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(strangers: &Strangers, addresses: impl Iterator<Item = u32>, at: Duration) -> Vec<u64> {
        let away = |address: u32| TurnedAway {
            source: Source::Address(std::net::Ipv4Addr::from_bits(address).into()),
            code: ProblemCode::Unauthorized,
        };
        addresses.filter_map(|address| strangers.take(&away(address), at)).collect()
    }

    #[test]
    fn neither_one_source_nor_many_fill_the_log() {
        let (strangers, start) = (Strangers::default(), Duration::from_secs(100));
        assert_eq!(said(&strangers, std::iter::repeat_n(7, 1000), start), [0; 5]);
        assert_eq!(said(&strangers, std::iter::repeat_n(7, 9), start + EACH.period), [995]);
        let later = start + Duration::from_secs(1000);
        assert_eq!(said(&strangers, 0..100_000, later).len(), 50);
        assert!(strangers.rates.lock().unwrap().0.keys() <= SOURCES);
    }
}
