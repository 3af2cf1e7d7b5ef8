// SPDX-License-Identifier: Apache-2.0

//! The steps of the demonstration.

use std::time::Duration;

use api::{Client, ClientError, types::*};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::{
    DemoError, RECORDED,
    console::Guest,
    private_agent::{KERNEL, PF, PrivateAgent},
    report::{Report, word},
};

const GROUP: &str = "demo";
const ALICE: &str = "alice";
const BOB: &str = "bob";
const ALICE_MAC: &str = "02:00:00:00:0a:01";
const BOB_MAC: &str = "02:00:00:00:0b:01";
/// Addresses that alice requests: one in each step, so that each has a decision of its own.
const REFUSED: &str = "02:00:00:00:0a:02";
const REFUSED_SILENTLY: &str = "02:00:00:00:0a:03";
const ACCEPTED: &str = "02:00:00:00:0a:04";
const FORGED: &str = "02:00:00:00:0a:66";
const BOB_IP: &str = "10.0.0.2";

const NO_ANSWER: &str = "0 of 3";
/// The time that a guest waits for packets that must not come, and for those that must, on a slow machine too.
const ABSENCE_MS: u32 = 200;
const PRESENCE_MS: u32 = 3000;
const BOOT: Duration = Duration::from_secs(30);
const AGAIN: Duration = Duration::from_millis(5);

/// Plays all steps.
pub(super) async fn play(agent: &PrivateAgent, report: &mut Report) -> Result<(), DemoError> {
    report.introduce(&format!(
        "The demo runs an agent of its own, with a simulated 82576 adapter ({PF}). The port group {GROUP} \
         decides\nwhich changes a guest may make on its VF; the guests, {ALICE} and {BOB}, drive their VFs \
         as Linux' igbvf does."
    ));
    agent.ready().await?;
    let client = &agent.client;
    set_up(client).await?;
    let (mut alice, mut bob) =
        tokio::try_join!(boot(client, ALICE, ALICE_MAC, "10.0.0.1"), boot(client, BOB, BOB_MAC, BOB_IP))?;
    let mut stage = Stage { agent, client, report, alice: &mut alice, bob: &mut bob };
    stage.traffic().await?;
    stage.refused().await?;
    stage.refused_silently().await?;
    stage.accepted().await?;
    stage.forged().await?;
    // The API lists the latest first; the story begins with the earliest.
    let mut decisions = client.decisions(&DecisionFilter::default()).await?;
    decisions.reverse();
    report.decisions(decisions);
    Ok(())
}

async fn set_up(client: &Client) -> Result<(), DemoError> {
    let spec = PortGroupSpec {
        switch: typed(json!("default"))?,
        settings: typed(json!({"mac_changes": "reject", "forged_transmits": "reject", "on_denied": "nack"}))?,
        port_overrides: Default::default(),
    };
    client.put_port_group(GROUP, &spec, None).await?;
    Ok(())
}

async fn boot(client: &Client, name: &str, mac: &str, ip: &str) -> Result<Guest, DemoError> {
    let spec: VmSpec = typed(json!({
        "name": name, "memory": "2MiB",
        "boot": { "kernel": KERNEL, "cmdline": format!("address {ip}; up") },
        "adapters": [{ "id": "eth0", "port_group": GROUP, "mac": mac }],
    }))?;
    client.create_vm(&spec).await?;
    client.act(name, VmAction::Boot, BOOT).await?;
    let mut guest = Guest::attach(client, name).await?;
    guest.ready().await?;
    Ok(guest)
}

/// A value of the API from its JSON.
fn typed<T: serde::de::DeserializeOwned>(value: Value) -> Result<T, DemoError> {
    serde_json::from_value(value.clone()).map_err(|error| {
        ClientError::Strange { request: format!("the demo's {value}"), what: error.to_string() }.into()
    })
}

/// All participants.
struct Stage<'a> {
    agent: &'a PrivateAgent,
    client: &'a Client,
    report: &'a mut Report,
    alice: &'a mut Guest,
    bob: &'a mut Guest,
}

impl Stage<'_> {
    async fn traffic(&mut self) -> Result<(), DemoError> {
        self.report.step("Two VMs talk through their VFs");
        self.check_ping("3 of 3").await
    }

    async fn refused(&mut self) -> Result<(), DemoError> {
        self.report.step("The policy denies a change of the MAC address, and the guest gets an error");
        let answer = self.ask_for(REFUSED, "nack").await?;
        self.report.check("the guest's driver reports", "nack", &answer);
        self.check_addresses(ALICE_MAC, ALICE_MAC).await
    }

    async fn refused_silently(&mut self) -> Result<(), DemoError> {
        self.report.step("Denied again, but silently: guest and device differ until the guest resets its VF");
        self.edit("on_denied", "silent").await?;
        let answer = self.ask_for(REFUSED_SILENTLY, "silent").await?;
        self.report.check("the guest's driver reports", "ok", &answer);
        self.check_addresses(REFUSED_SILENTLY, ALICE_MAC).await?;
        self.check_ping(NO_ANSWER).await?;
        self.report.stage("guest", format!("{ALICE} takes the interface down and up, which resets the VF"));
        self.alice.ask("down-up").await?;
        self.check_addresses(ALICE_MAC, ALICE_MAC).await?;
        self.check_ping("3 of 3").await
    }

    async fn accepted(&mut self) -> Result<(), DemoError> {
        self.report.step("The port group accepts changes from now on: the next request is committed");
        self.edit("mac_changes", "accept").await?;
        let answer = self.ask_for(ACCEPTED, "nack").await?;
        self.report.check("the guest's driver reports", "ok", &answer);
        self.check_addresses(ACCEPTED, ACCEPTED).await?;
        self.check_ping("3 of 3").await
    }

    async fn forged(&mut self) -> Result<(), DemoError> {
        self.report.step("The adapter drops a frame with a foreign source address");
        for (source, text, expected, patience) in
            [(FORGED, "forged", "nothing", ABSENCE_MS), (ACCEPTED, "honest", "the frame", PRESENCE_MS)]
        {
            self.report.stage("guest", format!("{ALICE} sends a frame from {source} to {BOB}"));
            self.alice.ask(&format!("send dst={BOB_MAC} src={source} text={text}")).await?;
            let seen = self.bob.ask(&format!("expect {patience} text={text}")).await?;
            let seen = if seen == "none" { "nothing" } else { "the frame" };
            self.report.check(&format!("{BOB} receives"), expected, seen);
        }
        Ok(())
    }

    /// Reports the way of a request for another address, and returns the final result of the guest's driver.
    async fn ask_for(&mut self, mac: &str, on_denied: &str) -> Result<String, DemoError> {
        self.report
            .stage("guest", format!("{ALICE}'s driver writes SET_MAC {mac} into the mailbox of its VF"));
        let answer = self.set_mac(mac).await?;
        let decision = self.decision(mac, &answer).await?;
        let port = self.port().await?;
        let counted = self.relayed("set_mac:").await?;
        self.report.stage(
            "relay",
            format!("the VM's process takes the message; the agent decides, or did so in advance ({counted} so far)"),
        );
        self.report.stage(
            "switch",
            format!("the message belongs to port {} of {}", port.name, port.status.port_group),
        );
        let verdict = word(&decision.verdict);
        let because = match (&decision.reason, &decision.decided_by) {
            (Some(reason), Some(by)) => {
                format!(": {} ({} of the {})", word(reason), by.setting, word(&by.source).replace('_', " "))
            }
            (Some(reason), None) => format!(": {}", word(reason)),
            (None, _) => String::new(),
        };
        self.report.stage("policy", format!("{verdict}{because}"));
        let expected = if mac == ACCEPTED { "allowed" } else { "denied" };
        self.report.stage(
            "adapter",
            match word(&decision.committed).as_str() {
                "pf" => format!("the PF programs {} for the VF", decision.effective_mac),
                _ => format!("nothing is committed, the VF keeps {}", decision.effective_mac),
            },
        );
        if verdict == "denied" {
            self.report.stage("answer", format!("on_denied is {on_denied}"));
        }
        self.report.check("the decision is recorded as", expected, &verdict);
        Ok(answer)
    }

    /// Requests an address, and returns the final result of alice's driver. On a busy machine the PF may not answer an earlier
    /// message in time, and the relay then hears nothing before the VF is reset. Linux' driver soon notices that by itself; the
    /// small guest needs a command.
    async fn set_mac(&mut self, mac: &str) -> Result<String, DemoError> {
        let command = format!("set-mac {mac}");
        let before = self.unheard().await?;
        let answer = self.alice.ask(&command).await?;
        if self.unheard().await? == before {
            return Ok(answer);
        }
        self.alice.ask("down-up").await?;
        self.alice.ask(&command).await
    }

    /// The number of alice's requests for an address that came when her VF had to be reset first.
    async fn unheard(&self) -> Result<u64, DemoError> {
        let stats = self.client.stats(ALICE).await?;
        let messages = stats.devices.values().flat_map(|device| &device.mailbox);
        Ok(messages.filter(|(name, _)| *name == "set_mac:not_reset").map(|(_, count)| *count).sum())
    }

    /// The relay's counts of alice's messages with this prefix of their name.
    async fn relayed(&self, prefix: &str) -> Result<String, DemoError> {
        let stats = self.client.stats(ALICE).await?;
        let messages = stats.devices.values().flat_map(|device| &device.mailbox);
        let some = messages.filter_map(|(name, count)| Some((name.strip_prefix(prefix)?, count)));
        Ok(some.map(|(name, count)| format!("{count} {name}")).collect::<Vec<_>>().join(", "))
    }

    /// The record of a request for an address, to which the guest's driver said `answer`.
    async fn decision(&self, mac: &str, answer: &str) -> Result<Decision, DemoError> {
        let filter = DecisionFilter { vm: Some(ALICE.to_owned()), ..DecisionFilter::default() };
        let deadline = Instant::now() + RECORDED;
        loop {
            let decisions = self.client.decisions(&filter).await?;
            let found = decisions
                .into_iter()
                .find(|decision| decision.request == "set_mac" && decision.requested.as_deref() == Some(mac));
            match found {
                Some(decision) => return Ok(decision),
                None if Instant::now() >= deadline => {
                    return Err(DemoError::NotRecorded {
                        mac: mac.to_owned(),
                        answer: answer.to_owned(),
                        log: self.agent.log_tail(20),
                    });
                }
                None => sleep(AGAIN).await,
            }
        }
    }

    async fn port(&self) -> Result<Port, ClientError> {
        self.client.get_port(&format!("{ALICE}/eth0")).await
    }

    async fn edit(&mut self, setting: &str, value: &str) -> Result<(), DemoError> {
        self.report.stage(
            "you",
            format!("PATCH /v1/port-groups/{GROUP} {{\"settings\": {{\"{setting}\": \"{value}\"}}}}"),
        );
        self.client.patch_port_group(GROUP, &json!({"settings": {setting: value}}), None).await?;
        Ok(())
    }

    /// Checks the address that the guest believes to have, the PF's address, and the agent's knowledge of both.
    async fn check_addresses(&mut self, guest: &str, device: &str) -> Result<(), DemoError> {
        let believed = self.alice.ask("mac").await?;
        self.report.check("the guest's driver has", guest, &believed);
        // The relay's event about the guest address arrives after the response.
        let deadline = Instant::now() + RECORDED;
        let mut status = self.port().await?.status;
        while status.guest_mac.to_string() != guest && Instant::now() < deadline {
            sleep(AGAIN).await;
            status = self.port().await?.status;
        }
        self.report.check("the agent's record of the guest's address", guest, &status.guest_mac.to_string());
        self.report.check("the device has", device, &status.effective_mac.to_string());
        Ok(())
    }

    async fn check_ping(&mut self, expected: &str) -> Result<(), DemoError> {
        let patience = if expected == NO_ANSWER { ABSENCE_MS } else { PRESENCE_MS };
        let result = self.alice.ask(&format!("ping {BOB_IP} count=3 timeout={patience}")).await?;
        let number = |name: &str| {
            result
                .split_whitespace()
                .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
                .unwrap_or("?")
        };
        let answered = format!("{} of {}", number("received"), number("sent"));
        self.report.check(&format!("{ALICE} pings {BOB}, answered"), expected, &answered);
        Ok(())
    }
}
