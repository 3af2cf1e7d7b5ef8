// SPDX-License-Identifier: Apache-2.0

//! A conversation with the small guest on its serial console (`resources/guest/README.md`).

use std::time::Duration;

use api::{Client, client::Console};
use tokio::time::{Instant, sleep, timeout_at};

use super::{DemoError, tail};

/// The time for a response. A guest with a dead mailbox reports it after 2 s.
const ANSWER: Duration = Duration::from_secs(20);
/// The pause before typing the rest of a command that the guest took only in part.
const AGAIN: Duration = Duration::from_millis(5);
/// The most output of the guest that is kept, for messages and for incomplete responses.
const KEPT: usize = 64 << 10;

/// A guest, with its console from the beginning on.
pub(super) struct Guest {
    client: Client,
    vm: String,
    console: Console,
    /// Output of the guest that no command has used yet.
    said: String,
}

impl Guest {
    pub(super) async fn attach(client: &Client, vm: &str) -> Result<Self, DemoError> {
        let console = client.read_console(vm, Some(0), true).await?;
        Ok(Self { client: client.clone(), vm: vm.to_owned(), console, said: String::new() })
    }

    /// Waits until the guest takes commands.
    pub(super) async fn ready(&mut self) -> Result<(), DemoError> {
        self.line("start", |line| (line == "ready").then(String::new)).await.map(drop)
    }

    /// Gives a command and returns its result.
    pub(super) async fn ask(&mut self, command: &str) -> Result<String, DemoError> {
        let deadline = Instant::now() + ANSWER;
        let typed = format!("{command}\n");
        let mut rest = typed.as_bytes();
        while !rest.is_empty() {
            let taken = self.client.write_console(&self.vm, rest.to_vec()).await?;
            rest = rest.get(taken..).unwrap_or_default();
            if !rest.is_empty() {
                if Instant::now() >= deadline {
                    return Err(self.silent(command));
                }
                sleep(AGAIN).await;
            }
        }
        let words: Vec<&str> = command.split_whitespace().filter(|word| !word.contains('=')).collect();
        let prefix = format!("{}: ", words.join(" "));
        self.line(command, |line| line.strip_prefix(&prefix).map(str::to_owned)).await
    }

    /// The first line from which `wanted` makes a result; lines before it are dropped.
    async fn line(
        &mut self,
        command: &str,
        wanted: impl Fn(&str) -> Option<String>,
    ) -> Result<String, DemoError> {
        let deadline = Instant::now() + ANSWER;
        loop {
            while let Some(end) = self.said.find('\n') {
                let line: String = self.said.drain(..=end).collect();
                if let Some(found) = wanted(line.trim_end()) {
                    return Ok(found);
                }
            }
            match timeout_at(deadline, self.console.chunk()).await {
                Ok(Ok(Some(bytes))) if self.said.len() < KEPT => {
                    self.said.push_str(&String::from_utf8_lossy(&bytes));
                }
                Ok(Err(error)) => return Err(error.into()),
                // The console has ended, the time is over, or a line has no end.
                _ => return Err(self.silent(command)),
            }
        }
    }

    fn silent(&self, command: &str) -> DemoError {
        DemoError::Silent { vm: self.vm.clone(), command: command.to_owned(), said: tail(&self.said, 5) }
    }
}
