// SPDX-License-Identifier: Apache-2.0

//! `portcullis ui`: the page in a browser, with guests behind it.

use std::{
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
};

use api::types::VmAction;
use failpoints::Point;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::fixture::{Agent, Held, Options, SmallGuest, agent::binary, browser::Browser};

const ALICE: &str = "02:00:00:00:0a:01";

/// A running `portcullis ui`.
struct Ui {
    child: Child,
    url: String,
}

impl Ui {
    fn start(agent: &Agent) -> Self {
        let mut child = Command::new(binary())
            .arg("--socket")
            .arg(agent.directory().join("api.sock"))
            .args(["ui", "--no-browser"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let url = line.trim().strip_prefix("Open:").expect("it prints its link").trim().to_owned();
        Ui { child, url }
    }
}

impl Drop for Ui {
    fn drop(&mut self) {
        kill_process(Pid::from_child(&self.child), Signal::INT).unwrap();
        let status = self.child.wait().unwrap();
        assert!(status.success() || std::thread::panicking(), "{status}");
    }
}

fn start() -> Agent {
    Agent::start_with(Options { arguments: vec!["--sim-pf".into(), "sim0=4".into()], ..Options::default() })
}

fn group(agent: &Agent, name: &str, settings: serde_json::Value) {
    let spec = json!({"switch": "default", "settings": settings, "port_overrides": ["mtu"]});
    agent.ask(agent.client.put_port_group(name, &serde_json::from_value(spec).unwrap(), None)).unwrap();
}

fn guest<'a>(agent: &'a Agent, name: &str, group: &str, mac: &str) -> SmallGuest<'a> {
    let mut guest = SmallGuest::boot(agent, name, json!([{"id": "eth0", "port_group": group, "mac": mac}]));
    assert_eq!(guest.ask("up"), format!("ok mac={mac} reply={mac}"));
    guest
}

fn row(port: &str) -> String {
    format!("tr[data-port='{port}']")
}

fn setting(group: &str, setting: &str) -> String {
    format!("[data-group='{group}'] tr[data-setting='{setting}']")
}

#[test]
fn a_click_on_accept_lets_the_next_request_through() {
    let agent = start();
    group(&agent, "demo", json!({"mac_changes": "reject"}));
    group(
        &agent,
        "quiet",
        json!({"on_denied": "silent", "vlan": {"trunk": [7, "100-200"]}, "rate": {"max_tx_mbit": 500}}),
    );
    let mut alice = guest(&agent, "alice", "demo", ALICE);
    let mut bob = guest(&agent, "bob", "quiet", "02:00:00:00:0b:01");
    agent.create(&SmallGuest::spec(&agent, "spare", json!([]), "")).unwrap();

    let ui = Ui::start(&agent);
    let mut browser = Browser::start();
    browser.open(&ui.url);
    browser.wait_for_text("#live", "Live");
    browser.wait_for_text("#vms", "alice");
    assert_eq!(browser.value("location.hash"), "", "the link's token does not stay in the address");
    assert_eq!(browser.text("#summary"), "2 of 3 VMs running\n2 ports\n0 MAC mismatches");

    // Decisions appear as they are made.
    assert_eq!(alice.ask("set-mac 02:00:00:00:0a:02"), "nack");
    browser.wait_for_text("#decisions", "02:00:00:00:0a:02");
    let first = browser.text("#decisions > li");
    for part in ["denied", "set_mac", "alice/eth0", "mac changes rejected (mac_changes of the port group)"] {
        assert!(first.contains(part), "{part}: {first}");
    }

    // A guest after a silent denial believes in an address that its device does not have.
    assert_eq!(bob.ask("set-mac 02:00:00:00:0b:77"), "ok");
    browser.wait_for(&format!("document.querySelector({:?}).className === 'mismatch'", row("bob/eth0")));
    browser.wait_for_text(&row("bob/eth0"), "not what the VF has");
    browser.wait_for_text("#alert", "bob/eth0: the guest believes");
    browser.wait_for_text("#summary", "1 MAC mismatch");
    assert_eq!(browser.value("document.querySelectorAll('tr.mismatch').length"), 1);
    assert_eq!(browser.text(&format!("{} .differs b", row("bob/eth0"))), "77", "the byte that differs");

    browser.picture("light", 1440, "light");
    browser.picture("dark", 1440, "dark");
    browser.picture("medium", 900, "light");
    browser.picture("narrow", 390, "light");
    browser.picture("narrow-dark", 390, "dark");
    assert_eq!(
        browser.value("document.documentElement.scrollWidth"),
        390,
        "nothing is wider than the screen"
    );

    // The source of each value.
    browser.picture("wide", 1440, "dark");
    assert!(browser.text(&setting("demo", "mac_changes")).contains("port group demo"));
    assert!(browser.text(&setting("demo", "mtu")).contains("built in"));
    assert!(browser.text(&setting("demo", "mtu")).contains("ports may override it"));
    assert!(browser.text(&setting("quiet", "vlan")).contains("trunk 7, 100-200"));

    // From reject to accept.
    browser.click(&format!("{} button", setting("demo", "mac_changes")));
    browser.wait_for("document.querySelector('dialog').open");
    browser.picture("editor-dark", 1440, "dark");
    browser.picture("editor", 1440, "light");
    browser.click("#choice-accept");
    browser.click("dialog button.primary");
    browser.wait_for("!document.querySelector('dialog').open");
    browser.wait_for_text(&setting("demo", "mac_changes"), "accept");
    browser.wait_for_text("#said", "Saved: MAC changes of demo");
    assert_eq!(alice.ask("set-mac 02:00:00:00:0a:02"), "ok");
    browser.wait_for_text(&row("alice/eth0"), "changed by the guest");
    browser.wait_for_text("#decisions > li", "allowed");

    // The guest takes its interface down and up: it has the effective address again, and the page updates by itself.
    bob.ask("down-up");
    browser.wait_for("document.querySelector('#alert').hidden");

    // From accept to reject: the guest loses the address.
    group(&agent, "demo", json!({"mac_changes": "reject"}));
    browser.wait_for_text("#decisions > li", "revoked");
    browser.wait_for_text(&row("alice/eth0"), "1 revoked");
    agent.act("bob", VmAction::Stop).unwrap();
    browser.wait_for_text("tr[data-vm='bob']", "stopped");
    assert_eq!(browser.complaints, Vec::<String>::new());
}

#[test]
fn an_operation_that_takes_long_is_shown_beside_the_state() {
    let held = Held::at(Point::PfSet);
    let agent = Agent::start_with(held.options());
    agent.create(&SmallGuest::spec(&agent, "web1", json!([{"id": "eth0"}]), "")).unwrap();
    let ui = Ui::start(&agent);
    let mut browser = Browser::start();
    browser.open(&ui.url);
    browser.wait_for_text("tr[data-vm='web1']", "defined");
    held.close();
    let boot = agent.client.act("web1", VmAction::Boot, std::time::Duration::ZERO);
    assert!(!agent.ask(boot).unwrap().complete);
    browser.wait_for_text("tr[data-vm='web1']", "starting");
    browser.wait_for_text("tr[data-vm='web1'] .operation", "boot: setting policy (4/7)");
    browser.picture("operation", 1000, "light");
    held.open();
    browser.wait_for_text("tr[data-vm='web1']", "running");
    browser.wait_for("!document.querySelector('.operation')");
    assert_eq!(browser.complaints, Vec::<String>::new());
}

#[test]
fn an_edit_is_never_lost_and_everything_can_be_done_with_keys() {
    let agent = start();
    group(&agent, "demo", json!({}));
    let revision = || agent.ask(agent.client.get_port_group("demo")).unwrap().revision;
    let first = revision();
    let ui = Ui::start(&agent);
    let mut browser = Browser::start();
    browser.open(&ui.url);
    browser.wait_for_text("#groups", "demo");

    // To the button, into the editor, and to the choice, without a mouse.
    let focus = "document.activeElement.dataset.focus";
    for _ in 0..100 {
        if browser.value(focus) == "edit:demo:on_denied" {
            break;
        }
        browser.press("Tab");
    }
    assert_eq!(browser.value(focus), "edit:demo:on_denied");
    browser.press("Enter");
    browser.wait_for("document.querySelector('dialog').open");
    assert_eq!(browser.value("document.activeElement.id"), "choice-", "what is in effect is chosen");
    browser.press("ArrowDown");
    browser.press("ArrowDown");
    assert_eq!(browser.value("document.activeElement.id"), "choice-silent");

    // Another user edits first.
    group(&agent, "demo", json!({"mtu": 9000, "on_denied": "nack"}));
    let theirs = revision();
    browser.press("Enter");
    browser.wait_for_text("dialog .message", "Not saved. demo was changed by uid");
    browser.wait_for_text("dialog .message", &format!("revision {first} is now {theirs}"));
    browser.wait_for_text("dialog .message", "On denied is nack there");
    browser.picture("conflict", 1000, "light");
    browser.press("Enter");
    browser.wait_for("!document.querySelector('dialog').open");
    let found = agent.ask(agent.client.get_port_group("demo")).unwrap();
    let settings = serde_json::to_value(&found.spec.settings).unwrap();
    assert_eq!(settings, json!({"mtu": 9000, "on_denied": "silent"}), "both edits are there");
    browser.wait_for(&format!("{focus} === 'edit:demo:on_denied'"));

    let ours = revision();

    // The page shows the agent's refusal in its words, and any content as text; Escape discards the edit.
    browser.click(&format!("{} button", setting("demo", "vlan")));
    browser.click("#choice-trunk");
    let hostile = "<img/src=x/onerror=document.title=1>";
    browser.value(&format!(
        "(() => {{ const field = document.querySelector('#field-trunk'); field.value = '7, {hostile}'; \
         field.dispatchEvent(new Event('input')); }})()"
    ));
    browser.click("dialog button.primary");
    browser.wait_for_text("dialog .message", &format!("settings.vlan.trunk: \"{hostile}\" is not a range"));
    assert_eq!(browser.value("document.images.length + document.title"), "0Portcullis");
    browser.press("Escape");
    browser.wait_for("!document.querySelector('dialog').open");
    assert_eq!(revision(), ours);
    assert_eq!(browser.complaints, Vec::<String>::new());
}

#[test]
fn it_goes_on_after_an_interruption_and_its_link_works_once() {
    let mut agent = start();
    group(&agent, "demo", json!({}));
    let ui = Ui::start(&agent);
    let mut browser = Browser::start();
    browser.open(&ui.url);
    browser.wait_for_text("#live", "Live");
    browser.wait_for_text("#groups", "demo");
    agent.kill();
    browser.wait_for_text("#live", "away");
    agent.restart();
    group(&agent, "later", json!({}));
    browser.wait_for_text("#live", "Live");
    browser.wait_for_text("#groups", "later");

    // A reload keeps the session; another browser has none, and the link is used.
    browser.call("Page.reload", json!({}));
    browser.wait_for_text("#groups", "later");
    let mut other = Browser::start();
    other.open(&ui.url);
    other.wait_for_text("#closed", "it works once");
    assert!(!other.value("document.body.innerText").as_str().unwrap().contains("later"));
    other.picture("closed", 1000, "light");

    // No page of another site can frame it, or read from it, even with a token.
    let (origin, _) = ui.url.split_once("/#").unwrap();
    other.open("about:blank");
    let asked = other.value(&format!("fetch('{origin}/v1/vms', {{headers: {{authorization: 'Bearer x'}}}}).then((a) => a.status, () => 'no')"));
    assert_eq!(asked, "no");
    let framed = other.value(&format!(
        "new Promise((done) => {{ const frame = document.createElement('iframe'); frame.onload = () => {{ try {{ \
         done(frame.contentDocument ? 'readable' : 'no'); }} catch {{ done('no'); }} }}; frame.src = '{origin}/'; \
         document.body.append(frame); }})"
    ));
    assert_eq!(framed, "no");
    drop(ui);
    browser.wait_for_text("#live", "portcullis ui has ended");
}

#[test]
fn the_page_names_the_disk_for_cloud_init_and_not_its_texts() {
    let agent = start();
    let mut spec = SmallGuest::spec(&agent, "web1", json!([]), "");
    spec["cloud_init"] = json!({ "user_data": "s3cret-user", "network_config": "s3cret-network" });
    agent.create(&spec).unwrap();
    let ui = Ui::start(&agent);
    let mut browser = Browser::start();
    browser.open(&ui.url);
    browser.wait_for_text("#vms", "cidata (cloud-init)");
    assert!(!browser.value("document.documentElement.outerHTML").to_string().contains("s3cret"));
}
