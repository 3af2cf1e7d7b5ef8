// SPDX-License-Identifier: Apache-2.0

//! Progress of a command that takes long: one line on the terminal, rewritten in place and erased at the end. It goes to
//! standard error, so that responses on standard output stay unchanged, and only if standard error is a terminal.

use std::{
    io::{self, IsTerminal as _, Write},
    pin::pin,
    time::Duration,
};

use api::{
    Client,
    types::{OperationAction, Vm, VmAction},
};
use rustix::termios::tcgetwinsize;
use text::printable;
use tokio::time::{Instant, timeout};

/// The times of a line.
struct Pace {
    /// A command that ends before this time gets no line.
    quiet: Duration,
    /// The time between two looks.
    between: Duration,
}

const PACE: Pace = Pace { quiet: Duration::from_millis(500), between: Duration::from_millis(200) };

/// Columns of a terminal that does not report its size.
const COLUMNS: usize = 80;

/// The current activity, with its step and the number of steps.
pub(super) struct Doing {
    pub(super) what: String,
    pub(super) step: Option<(usize, usize)>,
}

/// Waits for the end of `work`, a request about a VM. `verb` describes it while the VM itself reports nothing.
pub(super) async fn of_vm<T>(client: &Client, vm: &str, verb: &str, work: impl Future<Output = T>) -> T {
    let look = async || match client.get_vm(vm).await {
        Ok(vm) => doing(&vm, verb),
        // The VM may be gone by now, or the agent: the request's response has the reason.
        Err(_) => Doing { what: format!("{verb} {vm}"), step: None },
    };
    during(work, look).await
}

/// Waits for the end of `work`, and shows the results of `look` meanwhile.
pub(super) async fn during<T>(work: impl Future<Output = T>, look: impl AsyncFnMut() -> Doing) -> T {
    match Line::of_terminal() {
        Some(line) => show(line, PACE, work, look).await,
        None => work.await,
    }
}

async fn show<T>(
    mut line: Line<impl Write>,
    pace: Pace,
    work: impl Future<Output = T>,
    mut look: impl AsyncFnMut() -> Doing,
) -> T {
    let begun = Instant::now();
    let mut work = pin!(work);
    let mut pause = pace.quiet;
    loop {
        if let Ok(done) = timeout(pause, &mut work).await {
            return done;
        }
        pause = pace.between;
        tokio::select! {
            biased;
            done = &mut work => return done,
            doing = look() => line.write(&text(&doing, begun.elapsed())),
        }
    }
}

fn doing(vm: &Vm, verb: &str) -> Doing {
    let Some(operation) = vm.status.operation else {
        return Doing { what: format!("{verb} {}", vm.name), step: None };
    };
    let verb = match operation.action {
        OperationAction::Boot => verb_of(VmAction::Boot),
        OperationAction::Shutdown => verb_of(VmAction::Shutdown),
        OperationAction::Stop => verb_of(VmAction::Stop),
        OperationAction::Reboot => verb_of(VmAction::Reboot),
        OperationAction::Delete => DELETING,
        OperationAction::Release => "ending",
    };
    let stage = operation.stage.as_str().replace('_', " ");
    let number = |n: u32| usize::try_from(n).unwrap_or(usize::MAX);
    Doing {
        what: format!("{verb} {}: {stage}", vm.name),
        step: Some((number(operation.step), number(operation.steps))),
    }
}

/// The verb of a deletion, as [`verb_of`] gives for actions.
pub(super) const DELETING: &str = "deleting";

/// The verb for an action under way.
pub(super) fn verb_of(action: VmAction) -> &'static str {
    match action {
        VmAction::Boot => "booting",
        VmAction::Pause => "pausing",
        VmAction::Resume => "resuming",
        VmAction::Reboot => "rebooting",
        VmAction::Shutdown => "shutting down",
        VmAction::Stop => "stopping",
    }
}

fn text(doing: &Doing, since: Duration) -> String {
    let step = doing.step.map(|(step, steps)| format!("{step}/{steps}, ")).unwrap_or_default();
    format!("{} ({step}{:.1} s)", doing.what, since.as_secs_f64())
}

/// The last line of a terminal. Dropping this erases it.
struct Line<W: Write> {
    to: W,
    columns: fn() -> usize,
    used: bool,
}

impl Line<io::Stderr> {
    /// None if the terminal cannot rewrite a line.
    fn of_terminal() -> Option<Self> {
        let able = io::stderr().is_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb");
        let columns = || match tcgetwinsize(io::stderr()) {
            Ok(size) if size.ws_col > 0 => size.ws_col.into(),
            _ => COLUMNS,
        };
        able.then(|| Line { to: io::stderr(), columns, used: false })
    }
}

impl<W: Write> Line<W> {
    fn write(&mut self, text: &str) {
        // A longer line would become two, of which only the second is erased.
        let room = (self.columns)().saturating_sub(1);
        let text: String = printable(text).chars().take(room).collect();
        self.used = true;
        self.put(&format!("\r{text}\x1b[K"));
    }

    fn put(&mut self, bytes: &str) {
        // A line that cannot be shown loses nothing: the response has it all.
        let _ = self.to.write_all(bytes.as_bytes()).and_then(|()| self.to.flush());
    }
}

impl<W: Write> Drop for Line<W> {
    fn drop(&mut self) {
        if self.used {
            self.put("\r\x1b[K");
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::Notify;

    use super::*;

    /// The output during work that ends after this many looks.
    async fn written(looks: usize) -> String {
        let mut bytes = Vec::new();
        let enough = Notify::new();
        let mut step = 0;
        let line = Line { to: &mut bytes, columns: || 20, used: false };
        let work = async {
            if looks > 0 {
                enough.notified().await;
            }
            7
        };
        let look = async || {
            step += 1;
            if step == looks {
                enough.notify_one();
            }
            Doing { what: format!("booting web{}", "\n".repeat(step - 1)), step: Some((step, 9)) }
        };
        let pace = Pace { quiet: Duration::from_millis(2), between: Duration::from_millis(1) };
        assert_eq!(show(line, pace, work, look).await, 7);
        String::from_utf8(bytes).unwrap()
    }

    #[tokio::test]
    async fn what_takes_long_is_one_line_that_is_gone_at_the_end() {
        assert_eq!(written(0).await, "");
        let (first, last) = ("\rbooting web (1/9, 0\x1b[K", "\r\x1b[K");
        assert_eq!(written(1).await, format!("{first}{last}"));
        let second = "\rbooting web\\n (2/9,\x1b[K";
        assert_eq!(written(2).await, format!("{first}{second}{last}"));
    }

    #[test]
    fn a_line_says_what_is_known() {
        let seconds = Duration::from_millis(1_230);
        let doing = |step| Doing { what: "booting web1".into(), step };
        assert_eq!(text(&doing(Some((2, 7))), seconds), "booting web1 (2/7, 1.2 s)");
        assert_eq!(text(&doing(None), seconds), "booting web1 (1.2 s)");
    }
}
