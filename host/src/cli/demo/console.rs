// SPDX-License-Identifier: Apache-2.0

//! A conversation with the small guest on its serial console (`resources/guest/README.md`).

use std::time::Duration;

use api::{Client, client::Console};
use tokio::time::{Instant, sleep, timeout_at};

use super::{DemoError, tail};

/// For one answer. A guest whose mailbox is dead says so after 2 s.
const ANSWER: Duration = Duration::from_secs(20);
/// Between two tries to type what the guest did not take.
const AGAIN: Duration = Duration::from_millis(5);
/// Of what the guest said, kept for messages and for answers in the making.
const KEPT: usize = 64 << 10;

/// A guest, from the beginning of its console on.
pub(super) struct Guest {
    client: Client,
    vm: String,
    console: Console,
    /// What it said and nobody asked for yet.
    said: String,
}

impl Guest {
    pub(super) async fn attach(client: &Client, vm: &str) -> Result<Self, DemoError> {
        let console = client.read_console(vm, Some(0), true).await?;
        Ok(Self { client: client.clone(), vm: vm.to_owned(), console, said: String::new() })
    }

    /// Waits until it takes commands.
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

    /// The first line that `wanted` makes something of; those before it go.
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
                // The end of the console, of our patience, or a line without end.
                _ => return Err(self.silent(command)),
            }
        }
    }

    fn silent(&self, command: &str) -> DemoError {
        DemoError::Silent { vm: self.vm.clone(), command: command.to_owned(), said: tail(&self.said, 5) }
    }
}
