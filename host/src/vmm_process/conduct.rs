// SPDX-License-Identifier: Apache-2.0

//! What a vmm may say on its connection. Its guest may have taken it over: what it says is a stranger's input, and what
//! this protocol does not have, no vmm of ours says.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use vmm::control::{ChannelError, Order, Outcome, ToAgent};

/// Most messages in a [`WINDOW`]. Relays ask for 50 changes a second each, and a console wakes its followers as often.
const FLOOD: u32 = 10_000;

/// Most questions in a [`WINDOW`]: those of 16 adapters, each of which may have 50 a second behind 64 at once. Each is recorded.
const ASKS: u32 = 2_000;

const WINDOW: Duration = Duration::from_secs(1);

/// Most orders that were never answered, timed out or not.
const UNANSWERED: usize = 1024;

/// What one connection has said, as far as what comes next depends on it.
#[derive(Debug, Default)]
pub(super) struct Conduct {
    /// Orders without an answer, also those that nobody waits for any more.
    orders: HashMap<u64, Answers>,
    report: u64,
    ask: u64,
    window: Option<Instant>,
    said: u32,
    asked: u32,
}

/// What an order may be answered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answers {
    Done,
    Stats,
    /// At most so many bytes.
    ConsoleTaken(usize),
    TakenBack,
}

impl Conduct {
    /// An order is sent.
    pub(super) fn ordered(&mut self, id: u64, order: &Order) -> Result<(), String> {
        if self.orders.len() >= UNANSWERED {
            return Err(format!("it has not answered {UNANSWERED} orders"));
        }
        let answers = match order {
            Order::Stats => Answers::Stats,
            Order::ConsoleInput { bytes } => Answers::ConsoleTaken(bytes.len()),
            Order::TakeBack { .. } => Answers::TakenBack,
            _ => Answers::Done,
        };
        self.orders.insert(id, answers);
        Ok(())
    }

    /// An order could not be sent.
    pub(super) fn withdrawn(&mut self, id: u64) {
        self.orders.remove(&id);
    }

    /// Whether this may come now.
    ///
    /// # Errors
    /// What is wrong with it, behind "it".
    pub(super) fn check(&mut self, message: &ToAgent) -> Result<(), String> {
        self.count(Instant::now(), matches!(message, ToAgent::Ask { .. }))?;
        match message {
            ToAgent::Hello { .. } | ToAgent::Refused { .. } => Err("it shook hands a second time".into()),
            ToAgent::Done { id, result } => {
                let answers = self.orders.remove(id);
                let answers =
                    answers.ok_or_else(|| format!("it answered the order {id}, which nobody gave"))?;
                match result {
                    Ok(outcome) if !fits(answers, outcome) => {
                        Err("it answered an order with another order's outcome".into())
                    }
                    _ => Ok(()),
                }
            }
            ToAgent::Report { seq, .. } => follows(&mut self.report, *seq, "report"),
            ToAgent::Ask { id, .. } => follows(&mut self.ask, *id, "question"),
        }
    }

    fn count(&mut self, now: Instant, asks: bool) -> Result<(), String> {
        let begun = *self.window.get_or_insert(now);
        if now.saturating_duration_since(begun) >= WINDOW {
            self.window = Some(now);
            (self.said, self.asked) = (0, 0);
        }
        self.said = self.said.saturating_add(1);
        self.asked = self.asked.saturating_add(asks.into());
        if self.said > FLOOD {
            return Err(format!("it said more than {FLOOD} things within a second"));
        }
        if self.asked > ASKS {
            return Err(format!("it asked more than {ASKS} questions within a second"));
        }
        Ok(())
    }
}

/// Numbers grow. (Not by one: a vmm without an agent drops its oldest reports.)
fn follows(last: &mut u64, number: u64, what: &str) -> Result<(), String> {
    if number <= *last {
        return Err(format!("its {what} {number} came after {last}", last = *last));
    }
    *last = number;
    Ok(())
}

fn fits(answers: Answers, outcome: &Outcome) -> bool {
    match (answers, outcome) {
        (Answers::Done, Outcome::Done)
        | (Answers::Stats, Outcome::Stats(_))
        | (Answers::TakenBack, Outcome::TakenBack { .. }) => true,
        (Answers::ConsoleTaken(most), Outcome::ConsoleTaken { taken }) => *taken <= most,
        _ => false,
    }
}

/// Whether a channel failed for what the vmm sent: no vmm of ours does.
pub(super) fn is_nonsense(error: &ChannelError) -> bool {
    matches!(error, ChannelError::Oversized | ChannelError::Malformed(_))
}

#[cfg(test)]
mod tests {
    use vmm::control::{Failure, FailureCode, Report, State};

    use super::*;

    fn done(id: u64, outcome: Outcome) -> ToAgent {
        ToAgent::Done { id, result: Ok(outcome) }
    }

    fn report(seq: u64) -> ToAgent {
        ToAgent::Report { seq, report: Report::State { state: State::Running, boots: 1 } }
    }

    #[test]
    fn each_order_has_one_answer_of_its_own_kind() {
        let mut conduct = Conduct::default();
        let taken = |taken| Outcome::ConsoleTaken { taken };
        for (id, order) in
            [Order::Pause, Order::Stats, Order::ConsoleInput { bytes: vec![0; 3] }].iter().enumerate()
        {
            conduct.ordered(id as u64, order).unwrap();
        }
        assert!(conduct.check(&done(7, Outcome::Done)).unwrap_err().contains("nobody gave"));
        assert!(conduct.check(&done(1, Outcome::Done)).unwrap_err().contains("another order's"));
        conduct.check(&done(2, taken(3))).unwrap();
        assert!(conduct.check(&done(2, taken(3))).is_err(), "twice");
        let failure = Failure { code: FailureCode::WrongState, detail: String::new() };
        conduct.check(&ToAgent::Done { id: 0, result: Err(failure) }).unwrap();
        conduct.ordered(9, &Order::ConsoleInput { bytes: vec![0; 3] }).unwrap();
        assert!(conduct.check(&done(9, taken(4))).is_err(), "more than there was");
    }

    #[test]
    fn numbers_grow_and_may_be_huge() {
        let mut conduct = Conduct::default();
        conduct.check(&report(5)).unwrap();
        conduct.check(&report(7)).unwrap();
        assert!(conduct.check(&report(7)).unwrap_err().contains("report 7"));
        conduct.check(&report(u64::MAX)).unwrap();
        assert!(conduct.check(&report(1)).is_err());
    }

    #[test]
    fn a_flood_is_noticed_and_a_long_life_is_none() {
        let (mut conduct, start) = (Conduct::default(), Instant::now());
        for n in 0..60 * FLOOD {
            conduct.count(start + WINDOW * (n / FLOOD), n % FLOOD < ASKS).unwrap();
        }
        let result = (0..=FLOOD).try_for_each(|_| conduct.count(start + WINDOW * 100, false));
        assert!(result.unwrap_err().contains("things"));
        let result = (0..=ASKS).try_for_each(|_| conduct.count(start + WINDOW * 102, true));
        assert!(result.unwrap_err().contains("questions"));
    }

    #[test]
    fn a_vmm_that_answers_nothing_is_given_up() {
        let mut conduct = Conduct::default();
        let result = (0..=UNANSWERED as u64).try_for_each(|id| conduct.ordered(id, &Order::Pause));
        assert!(result.is_err());
    }
}
