// SPDX-License-Identifier: Apache-2.0

//! The text of `/metrics`: OpenMetrics, with names and units by the conventions of Prometheus.
//!
//! Each label's value is from a closed set, or the name of an existing VM: no guest, vmm or client
//! can make new series. The counters of VMs are read from their processes at each scrape (`vms`).

mod vms;

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use api::{Answered, ProblemCode, TurnedAway};
use netpolicy::{Decision, Outcome};
use prometheus_client::{
    encoding::{
        EncodeLabelSet, EncodeLabelValue, LabelValueEncoder,
        text::{encode_eof, encode_registry},
    },
    metrics::{
        counter::Counter,
        family::{Family, MetricConstructor},
        gauge::Gauge,
        histogram::Histogram,
        info::Info,
    },
    registry::{Registry, Unit},
};

pub use vms::Vm;

/// The prefix of all metrics except those about processes, which have the same names in every
/// exporter.
pub(crate) const PREFIX: &str = "portcullis";

/// Buckets, in seconds, of times for which a guest busy-waits.
const QUICK: [f64; 12] = [0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.4, 1.0];

/// Buckets, in seconds, of times for which people and programs wait.
const REQUEST: [f64; 10] = [0.0005, 0.001, 0.005, 0.025, 0.1, 0.5, 1.0, 5.0, 30.0, 120.0];

/// A label's value from a closed set.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Word(&'static str);

impl EncodeLabelValue for Word {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), fmt::Error> {
        EncodeLabelValue::encode(&self.0, encoder)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfDecision {
    request: String,
    verdict: Word,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfVerdict {
    verdict: Word,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfResult {
    result: Word,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfRepair {
    setting: Word,
    result: Word,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfRequest {
    route: String,
    method: Word,
    status: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfReason {
    reason: Word,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfRoute {
    route: String,
    method: Word,
}

/// Makes histograms with these bounds.
#[derive(Clone, Copy)]
struct Bounds(&'static [f64]);

impl MetricConstructor<Histogram> for Bounds {
    fn new_metric(&self) -> Histogram {
        Histogram::new(self.0.iter().copied())
    }
}

type Histograms<L> = Family<L, Histogram, Bounds>;

/// The metrics of the agent. Clones share all counters.
#[derive(Clone)]
pub struct Metrics {
    registry: Arc<Mutex<Registry>>,
    decisions: Family<OfDecision, Counter>,
    decided: Histograms<OfVerdict>,
    committed: Histograms<OfResult>,
    repairs: Family<OfRepair, Counter>,
    requests: Family<OfRequest, Counter>,
    answered: Histograms<OfRoute>,
    turned_away: Family<OfReason, Counter>,
    memory: Gauge,
    unchecked: Gauge,
}

impl Default for Metrics {
    fn default() -> Self {
        let metrics = Self {
            registry: Arc::default(),
            decisions: Family::default(),
            decided: Family::new_with_constructor(Bounds(&QUICK)),
            committed: Family::new_with_constructor(Bounds(&QUICK)),
            repairs: Family::default(),
            requests: Family::default(),
            answered: Family::new_with_constructor(Bounds(&REQUEST)),
            turned_away: Family::default(),
            memory: Gauge::default(),
            unchecked: Gauge::default(),
        };
        let mut all = metrics.registry.lock().unwrap_or_else(PoisonError::into_inner);
        all.register_with_unit(
            "process_resident_memory",
            "Resident memory of the agent",
            Unit::Bytes,
            metrics.memory.clone(),
        );
        let own = all.sub_registry_with_prefix(PREFIX);
        let build = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        own.register("build", "The agent's version", build);
        own.register("decisions", "Decisions by request or action, and outcome", metrics.decisions.clone());
        own.register_with_unit(
            "decision_duration",
            "Time from a guest's request to the agent's verdict, without requests that need none",
            Unit::Seconds,
            metrics.decided.clone(),
        );
        own.register_with_unit(
            "commit_duration",
            "Time to store, make and read back the changes of a granted request",
            Unit::Seconds,
            metrics.committed.clone(),
        );
        own.register(
            "ports_unchecked",
            "Ports that cannot be compared with their PF: their drift is not corrected",
            metrics.unchecked.clone(),
        );
        own.register(
            "drift_repairs",
            "Foreign changes of PF settings (drift), by the result of their correction",
            metrics.repairs.clone(),
        );
        own.register(
            "api_requests",
            "Requests of the API; the route is empty for unknown paths",
            metrics.requests.clone(),
        );
        own.register_with_unit(
            "api_request_duration",
            "Time from the head of a request to the head of its response",
            Unit::Seconds,
            metrics.answered.clone(),
        );
        own.register(
            "api_turned_away",
            "Requests refused before they have a caller: no token, a foreign host name or a web page",
            metrics.turned_away.clone(),
        );
        drop(all);
        metrics
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Metrics")
    }
}

impl Metrics {
    /// Counts a recorded decision.
    pub fn decision(&self, decision: &Decision) {
        // The names of requests are a closed set.
        let labels = OfDecision { request: decision.request.clone(), verdict: verdict(decision.outcome) };
        self.decisions.get_or_create(&labels).inc_by(decision.count);
    }

    /// Counts a verdict and the time that it took.
    pub fn decided(&self, outcome: Outcome, elapsed: Duration) {
        self.decided.get_or_create(&OfVerdict { verdict: verdict(outcome) }).observe(elapsed.as_secs_f64());
    }

    /// Counts the commit of a granted request, and whether it succeeded.
    pub fn committed(&self, made: bool, elapsed: Duration) {
        let result = Word(if made { "made" } else { "failed" });
        self.committed.get_or_create(&OfResult { result }).observe(elapsed.as_secs_f64());
    }

    /// Counts a correction of a setting on the PF that differed from the policy.
    pub fn repaired(&self, setting: &'static str, made: bool) {
        let result = Word(if made { "repaired" } else { "failed" });
        self.repairs.get_or_create(&OfRepair { setting: Word(setting), result }).inc();
    }

    /// Sets the number of ports that cannot be compared with their PF.
    pub fn unchecked(&self, ports: usize) {
        self.unchecked.set(i64::try_from(ports).unwrap_or(i64::MAX));
    }

    /// Counts a call of the API that was answered.
    pub fn answered(&self, answered: &Answered<'_>) {
        let (route, method) = (answered.route.to_owned(), Word(answered.method));
        let labels = OfRequest { route: route.clone(), method: method.clone(), status: answered.status };
        self.requests.get_or_create(&labels).inc();
        self.answered.get_or_create(&OfRoute { route, method }).observe(answered.elapsed.as_secs_f64());
    }

    /// Counts a call of the API that was turned away before it had a caller.
    pub fn turned_away(&self, away: &TurnedAway) {
        let reason = Word(if away.code == ProblemCode::Unauthorized { "token" } else { "host" });
        self.turned_away.get_or_create(&OfReason { reason }).inc();
    }

    /// All metrics as text, with those of VMs.
    ///
    /// # Errors
    /// None: writing to a `String` does not fail.
    pub fn text(&self, vms: &[Vm]) -> Result<String, fmt::Error> {
        let memory = resident("self").and_then(|bytes| i64::try_from(bytes).ok());
        self.memory.set(memory.unwrap_or_default());
        let mut text = String::new();
        encode_registry(&mut text, &self.registry.lock().unwrap_or_else(PoisonError::into_inner))?;
        encode_registry(&mut text, &vms::registry(vms))?;
        encode_eof(&mut text)?;
        Ok(text)
    }
}

fn verdict(outcome: Outcome) -> Word {
    Word(match outcome {
        Outcome::Allowed => "allowed",
        Outcome::Denied => "denied",
        Outcome::Revoked => "taken_back",
        Outcome::Repaired => "repaired",
        Outcome::Reverted => "reverted",
    })
}

/// The resident memory in bytes of a process, by its directory in /proc; None if there is no such
/// process.
pub fn resident(process: &str) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{process}/statm")).ok()?;
    let pages: u64 = text.split(' ').nth(1)?.parse().ok()?;
    pages.checked_mul(u64::try_from(rustix::param::page_size()).ok()?)
}

#[cfg(test)]
mod tests;
