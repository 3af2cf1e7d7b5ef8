// SPDX-License-Identifier: Apache-2.0

//! A console that is read across restarts of the agent.

use std::time::{Duration, Instant};

use api::{Client, ClientError, ProblemCode, client::Console, types::VmState};
use axum::body::Bytes;
use tokio::time::sleep;

use super::super::{
    lease::{AGAIN, is_away},
    output::warn_raw,
};

/// The output of a VM's console.
pub(super) struct Followed<'a> {
    client: &'a Client,
    vm: &'a str,
    /// None while the agent is away.
    console: Option<Console>,
    /// The offset of the first byte that was not read.
    next: u64,
    /// The longest wait for an agent that is away. With zero its end is an error.
    patience: Duration,
    /// The moment at which the agent was last found away; None once it has sent something since.
    away: Option<Instant>,
}

impl<'a> Followed<'a> {
    pub(super) async fn open(
        client: &'a Client,
        vm: &'a str,
        offset: Option<u64>,
        follow: bool,
        patience: Duration,
    ) -> Result<Self, ClientError> {
        let console = client.read_console(vm, offset, follow).await?;
        let next = console.start;
        Ok(Self { client, vm, console: Some(console), next, patience, away: None })
    }

    /// The next bytes; None when the VM is at rest or gone. Nothing is lost if it is not awaited to its end.
    pub(super) async fn chunk(&mut self) -> Result<Option<Bytes>, ClientError> {
        loop {
            let Some(console) = &mut self.console else {
                self.reopen().await?;
                continue;
            };
            match console.chunk().await {
                Ok(Some(bytes)) => {
                    self.away = None;
                    self.next = self.next.saturating_add(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
                    return Ok(Some(bytes));
                }
                Ok(None) if self.patience.is_zero() || self.is_over().await? => return Ok(None),
                Err(error) if self.patience.is_zero() || !is_away(&error) => return Err(error),
                Ok(None) | Err(_) => {
                    if self.away.is_none() {
                        warn_raw("portcullis: the agent does not respond: this command waits for it");
                    }
                    self.console = None;
                    self.away = Some(Instant::now());
                    sleep(AGAIN).await;
                }
            }
        }
    }

    /// Whether the VM has ended. An agent that has just started may not know yet that it runs.
    async fn is_over(&self) -> Result<bool, ClientError> {
        match self.client.get_vm(self.vm).await {
            Ok(vm) => Ok(matches!(vm.status.state, VmState::Stopped | VmState::Failed)),
            Err(error) if is_away(&error) => Ok(false),
            Err(error) if error.problem().is_some_and(|problem| problem.code == ProblemCode::NotFound) => {
                Ok(true)
            }
            Err(error) => Err(error),
        }
    }

    async fn reopen(&mut self) -> Result<(), ClientError> {
        match self.client.read_console(self.vm, Some(self.next), true).await {
            Ok(console) => {
                self.next = console.start;
                self.console = Some(console);
                Ok(())
            }
            Err(error) if is_away(&error) && self.away.is_some_and(|away| away.elapsed() < self.patience) => {
                sleep(AGAIN).await;
                Ok(())
            }
            Err(error) => Err(error),
        }
    }
}
