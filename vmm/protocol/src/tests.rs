// SPDX-License-Identifier: Apache-2.0

//! The JSON of each message, as text. Processes of VMs outlive their agent, so these texts must never change.

use std::fmt::Debug;

use netpolicy::{Change, MacAddress, OnDenied, Reason, Request, StandingRefusal};
use passthrough::relay::{
    Cancelled, Decision, Forwarded, GuestRequest, How, RelayEvent, RelayStats, Verdict,
};
use serde::{Serialize, de::DeserializeOwned};
use uuid::Uuid;

use super::*;

/// Each value is written as its text, and the text is read as the value.
fn hold<T: Serialize + DeserializeOwned + PartialEq + Debug>(values: &[(T, &str)]) {
    for (value, text) in values {
        assert_eq!(serde_json::to_string(value).unwrap(), *text);
        assert_eq!(serde_json::from_str::<T>(text).unwrap(), *value, "{text}");
    }
}

/// Fails if a variant has no value. A new variant does not compile without a pattern.
macro_rules! each_has_a_text {
    ($values:expr; $($pattern:pat),+ $(,)?) => {
        let seen: Vec<&str> = $values.iter().map(|(value, _)| match value {
            $($pattern => stringify!($pattern),)+
        }).collect();
        for pattern in [$(stringify!($pattern)),+] {
            assert!(seen.contains(&pattern), "{pattern} has no text");
        }
    };
}

fn mac() -> MacAddress {
    "02:00:00:00:00:09".parse().unwrap()
}

#[test]
fn messages_to_a_vmm_keep_their_text() {
    let command = |command| ToVmm::Command { id: 1, command };
    let response = |decision| ToVmm::Response {
        id: 5,
        response: AgentResponse::Mailbox {
            adapter: "eth0".into(),
            verdict: Verdict { seq: 6, effective_mac: mac(), decision },
        },
    };
    let refusal = StandingRefusal {
        unless: vec!["02:00:00:00:00:00/ff:ff:ff:00:00:00".parse().unwrap()],
        reason: Reason::MacNotAllowed,
        on_denied: OnDenied::Nack,
    };
    let messages = [
        (
            ToVmm::Hello { oldest: 1, newest: 4, vm: Uuid::from_u128(7) },
            r#"{"type":"hello","oldest":1,"newest":4,"vm":"00000000-0000-0000-0000-000000000007"}"#,
        ),
        (command(VmmCommand::Stop), r#"{"type":"order","id":1,"order":{"order":"stop"}}"#),
        (
            response(Decision::Grant { how: How::Local }),
            r#"{"type":"answer","id":5,"answer":{"answer":"mailbox","adapter":"eth0","verdict":{"seq":6,"effective_mac":"02:00:00:00:00:09","decision":{"grant":{"how":"local"}}}}}"#,
        ),
        (
            response(Decision::Grant { how: How::Forward }),
            r#"{"type":"answer","id":5,"answer":{"answer":"mailbox","adapter":"eth0","verdict":{"seq":6,"effective_mac":"02:00:00:00:00:09","decision":{"grant":{"how":"forward"}}}}}"#,
        ),
        (
            response(Decision::Refuse { tell: OnDenied::Nack, reason: Reason::MacInUse }),
            r#"{"type":"answer","id":5,"answer":{"answer":"mailbox","adapter":"eth0","verdict":{"seq":6,"effective_mac":"02:00:00:00:00:09","decision":{"refuse":{"tell":"nack","reason":"mac_in_use"}}}}}"#,
        ),
        (
            response(Decision::Refuse { tell: OnDenied::Silent, reason: Reason::MacInUse }),
            r#"{"type":"answer","id":5,"answer":{"answer":"mailbox","adapter":"eth0","verdict":{"seq":6,"effective_mac":"02:00:00:00:00:09","decision":{"refuse":{"tell":"silent","reason":"mac_in_use"}}}}}"#,
        ),
        (
            ToVmm::Standing { adapter: "eth0".into(), refusal: Some(refusal) },
            r#"{"type":"standing","adapter":"eth0","refusal":{"unless":["02:00:00:00:00:00/ff:ff:ff:00:00:00"],"reason":"mac_not_allowed","on_denied":"nack"}}"#,
        ),
        (
            ToVmm::Standing { adapter: "eth0".into(), refusal: None },
            r#"{"type":"standing","adapter":"eth0","refusal":null}"#,
        ),
        (ToVmm::Noted { upto: 8 }, r#"{"type":"noted","upto":8}"#),
    ];
    hold(&messages);
    each_has_a_text!(messages;
        ToVmm::Hello { .. }, ToVmm::Command { .. }, ToVmm::Response { response: AgentResponse::Mailbox { .. }, .. },
        ToVmm::Standing { .. }, ToVmm::Noted { .. },
    );
}

/// A specification that places nothing has the text of one of an older agent: the test of commands.
#[test]
fn a_place_keeps_its_text_and_fits_into_a_message() {
    let place = PlacementSpec {
        cpus: vec![(0, vec![(4, 5), (9, 9)])],
        io_cpus: vec![(2, 3)],
        node: Some(1),
        giant_pages: true,
    };
    hold(&[(place, r#"{"cpus":[[0,[[4,5],[9,9]]]],"io_cpus":[[2,3]],"node":1,"giant_pages":true}"#)]);
    hold(&[(CpuFeatures { nested: true, pmu: false }, r#"{"nested":true,"pmu":false}"#)]);
    // The most that the agent's API takes: 1024 ranges in lists of 254 vCPUs.
    let cpus = (0..254).map(|vcpu| (vcpu, vec![(8190, 8191); if vcpu == 0 { 1024 - 253 } else { 1 }]));
    let largest = PlacementSpec { cpus: cpus.collect(), ..PlacementSpec::default() };
    assert!(serde_json::to_string(&largest).unwrap().len() < FRAME_MAX / 3);
}

#[test]
fn commands_keep_their_text() {
    let spec = MachineSpec {
        vm: Uuid::from_u128(7),
        name: "web1".into(),
        cpus: 2,
        memory: 4 << 20,
        hugepages: false,
        cmdline: "quiet".into(),
        initramfs: 1,
        boot_disk: None,
        devices: Vec::new(),
        disks: Vec::new(),
        nics: Vec::new(),
        entropy: true,
        sandbox: SandboxSpec::of_threads(),
        placement: PlacementSpec::default(),
        features: CpuFeatures::default(),
    };
    let limits = DiskLimits { bytes: None, operations: Some(DiskRate { per_second: 50, burst: 60 }) };
    let commands = [
        (
            VmmCommand::Configure { spec: Box::new(spec), files: vec!["kvm".into()] },
            r#"{"order":"configure","spec":{"vm":"00000000-0000-0000-0000-000000000007","name":"web1","cpus":2,"memory":4194304,"hugepages":false,"cmdline":"quiet","initramfs":1,"devices":[],"disks":[],"nics":[],"entropy":true,"sandbox":{"uid":null,"gid":null,"limits":false,"namespaces":false,"empty_root":false,"seccomp":true,"landlock":true}},"files":["kvm"]}"#,
        ),
        (VmmCommand::Run, r#"{"order":"run"}"#),
        (VmmCommand::Pause, r#"{"order":"pause"}"#),
        (VmmCommand::PowerButton, r#"{"order":"power_button"}"#),
        (VmmCommand::Reboot, r#"{"order":"reboot"}"#),
        (VmmCommand::Stop, r#"{"order":"stop"}"#),
        (VmmCommand::Stats, r#"{"order":"stats"}"#),
        (VmmCommand::ConsoleInput { bytes: vec![1, 2] }, r#"{"order":"console_input","bytes":[1,2]}"#),
        (VmmCommand::ConsoleWait { offset: 9 }, r#"{"order":"console_wait","offset":9}"#),
        (
            VmmCommand::Revoke { adapter: "eth0".into(), changes: vec![Change::SetMac(mac())] },
            r#"{"order":"take_back","adapter":"eth0","changes":[{"set_mac":"02:00:00:00:00:09"}]}"#,
        ),
        (
            VmmCommand::EffectiveMac { adapter: "eth0".into(), mac: mac() },
            r#"{"order":"effective_mac","adapter":"eth0","mac":"02:00:00:00:00:09"}"#,
        ),
        (
            VmmCommand::MakeGuestReset { adapter: "eth0".into() },
            r#"{"order":"make_guest_reset","adapter":"eth0"}"#,
        ),
        (
            VmmCommand::LimitDisk { disk: "root".into(), limits },
            r#"{"order":"limit_disk","disk":"root","limits":{"bytes":null,"operations":{"per_second":50,"burst":60}}}"#,
        ),
        (
            VmmCommand::GrowDisk { disk: "root".into(), size: 1 << 20 },
            r#"{"order":"grow_disk","disk":"root","size":1048576}"#,
        ),
    ];
    hold(&commands);
    each_has_a_text!(commands;
        VmmCommand::Configure { .. }, VmmCommand::Run, VmmCommand::Pause, VmmCommand::PowerButton, VmmCommand::Reboot, VmmCommand::Stop,
        VmmCommand::Stats, VmmCommand::ConsoleInput { .. }, VmmCommand::ConsoleWait { .. }, VmmCommand::Revoke { .. },
        VmmCommand::EffectiveMac { .. }, VmmCommand::MakeGuestReset { .. }, VmmCommand::LimitDisk { .. },
        VmmCommand::GrowDisk { .. },
    );
}

#[test]
fn messages_of_a_vmm_keep_their_text() {
    let guest_request = GuestRequest { seq: 6, request: Request::SetMac(mac()) };
    let failure = Failure { code: FailureCode::Kernel, detail: "x".into() };
    let messages = [
        (
            ToAgent::Hello { version: 4, state: State::Running, boots: 2 },
            r#"{"type":"hello","version":4,"state":"running","boots":2}"#,
        ),
        (ToAgent::Refused { reason: "no".into() }, r#"{"type":"refused","reason":"no"}"#),
        (
            ToAgent::Done { id: 3, result: Ok(Outcome::Done) },
            r#"{"type":"done","id":3,"result":{"Ok":{"outcome":"done"}}}"#,
        ),
        (
            ToAgent::Done { id: 3, result: Err(failure) },
            r#"{"type":"done","id":3,"result":{"Err":{"code":"kernel","detail":"x"}}}"#,
        ),
        (
            ToAgent::Request {
                id: 5,
                request: AgentRequest::Mailbox { adapter: "eth0".into(), guest_request },
            },
            r#"{"type":"ask","id":5,"ask":{"ask":"mailbox","adapter":"eth0","question":{"seq":6,"request":{"set_mac":"02:00:00:00:00:09"}}}}"#,
        ),
        (
            ToAgent::Event { seq: 7, event: VmmEvent::DiskFull { disk: "root".into() } },
            r#"{"type":"report","seq":7,"report":{"report":"disk_full","disk":"root"}}"#,
        ),
    ];
    hold(&messages);
    each_has_a_text!(messages;
        ToAgent::Hello { .. }, ToAgent::Refused { .. }, ToAgent::Done { result: Ok(_), .. },
        ToAgent::Done { result: Err(_), .. }, ToAgent::Request { request: AgentRequest::Mailbox { .. }, .. },
        ToAgent::Event { .. },
    );
}

#[test]
fn results_of_commands_keep_their_text() {
    let failed = vec![Change::LeaveVlan(100.try_into().unwrap())];
    let stats = Stats { memory: 4096, boots: 1, ..Stats::default() };
    let outcomes = [
        (Outcome::Done, r#"{"outcome":"done"}"#),
        (Outcome::ConsoleTaken { taken: 2 }, r#"{"outcome":"console_taken","taken":2}"#),
        (
            Outcome::Stats(Box::new(stats)),
            r#"{"outcome":"stats","exits":{},"devices":{},"memory":4096,"boots":1,"first_entry_ns":null}"#,
        ),
        (
            Outcome::Revoked { failed, deferred: true },
            r#"{"outcome":"taken_back","failed":[{"leave_vlan":100}],"deferred":true}"#,
        ),
    ];
    hold(&outcomes);
    each_has_a_text!(outcomes;
        Outcome::Done, Outcome::ConsoleTaken { .. }, Outcome::Stats(_), Outcome::Revoked { .. },
    );
}

#[test]
fn events_of_the_machine_keep_their_text() {
    let lost = |why| VmmEvent::DeviceLost { bdf: "0000:01:10.0".into(), why };
    let events = [
        (
            VmmEvent::State { state: State::Rebooting, boots: 2 },
            r#"{"report":"state","state":"rebooting","boots":2}"#,
        ),
        (VmmEvent::Ended { end: End::PoweredOff }, r#"{"report":"ended","end":{"end":"powered_off"}}"#),
        (VmmEvent::Ended { end: End::Stopped }, r#"{"report":"ended","end":{"end":"stopped"}}"#),
        (
            VmmEvent::Ended { end: End::Failed { detail: "x".into() } },
            r#"{"report":"ended","end":{"end":"failed","detail":"x"}}"#,
        ),
        (lost(DeviceLoss::Requested), r#"{"report":"device_lost","bdf":"0000:01:10.0","why":"requested"}"#),
        (lost(DeviceLoss::Failed), r#"{"report":"device_lost","bdf":"0000:01:10.0","why":"failed"}"#),
        (VmmEvent::DiskFull { disk: "root".into() }, r#"{"report":"disk_full","disk":"root"}"#),
        (
            VmmEvent::Relay { adapter: "eth0".into(), event: RelayEvent::PfReset },
            r#"{"report":"relay","adapter":"eth0","notice":{"notice":"pf_reset"}}"#,
        ),
    ];
    hold(&events);
    each_has_a_text!(events;
        VmmEvent::State { .. }, VmmEvent::Ended { end: End::PoweredOff }, VmmEvent::Ended { end: End::Stopped },
        VmmEvent::Ended { end: End::Failed { .. } },
        VmmEvent::DeviceLost { why: DeviceLoss::Requested, .. },
        VmmEvent::DeviceLost { why: DeviceLoss::Failed, .. },
        VmmEvent::DiskFull { .. }, VmmEvent::Relay { .. },
    );
}

#[test]
fn events_of_relays_keep_their_text() {
    let reason = Reason::MacChangesRejected;
    let cancelled = |why| RelayEvent::Cancelled { seq: 6, request: Request::Reset, why };
    let forwarded = |outcome| RelayEvent::Forwarded { seq: 6, outcome };
    let events = [
        (
            cancelled(Cancelled::Deadline),
            r#"{"notice":"cancelled","seq":6,"request":"reset","why":"deadline"}"#,
        ),
        (
            cancelled(Cancelled::GuestReset),
            r#"{"notice":"cancelled","seq":6,"request":"reset","why":"guest_reset"}"#,
        ),
        (
            cancelled(Cancelled::Stopped),
            r#"{"notice":"cancelled","seq":6,"request":"reset","why":"stopped"}"#,
        ),
        (
            cancelled(Cancelled::Withdrawn),
            r#"{"notice":"cancelled","seq":6,"request":"reset","why":"withdrawn"}"#,
        ),
        (forwarded(Forwarded::Accepted), r#"{"notice":"forwarded","seq":6,"outcome":"accepted"}"#),
        (forwarded(Forwarded::Refused), r#"{"notice":"forwarded","seq":6,"outcome":"refused"}"#),
        (forwarded(Forwarded::Unanswered), r#"{"notice":"forwarded","seq":6,"outcome":"unanswered"}"#),
        (
            RelayEvent::Refused { request: Some(Request::Reset), word: 1, reason, count: 2 },
            r#"{"notice":"refused","request":"reset","word":1,"reason":"mac_changes_rejected","count":2}"#,
        ),
        (
            RelayEvent::Refused { request: None, word: 1, reason, count: 2 },
            r#"{"notice":"refused","request":null,"word":1,"reason":"mac_changes_rejected","count":2}"#,
        ),
        (
            RelayEvent::Declined { mac: mac(), reason, silent: true },
            r#"{"notice":"declined","mac":"02:00:00:00:00:09","reason":"mac_changes_rejected","silent":true}"#,
        ),
        (RelayEvent::GuestMac { mac: mac() }, r#"{"notice":"guest_mac","mac":"02:00:00:00:00:09"}"#),
        (RelayEvent::PfReset, r#"{"notice":"pf_reset"}"#),
        (
            RelayEvent::Revoked { id: 1, failed: vec![Change::ClearUnicast], deferred: false },
            r#"{"notice":"taken_back","id":1,"failed":["clear_unicast"],"deferred":false}"#,
        ),
    ];
    hold(&events);
    each_has_a_text!(events;
        RelayEvent::Cancelled { why: Cancelled::Deadline, .. }, RelayEvent::Cancelled { why: Cancelled::GuestReset, .. },
        RelayEvent::Cancelled { why: Cancelled::Stopped, .. }, RelayEvent::Cancelled { why: Cancelled::Withdrawn, .. },
        RelayEvent::Forwarded { outcome: Forwarded::Accepted, .. },
        RelayEvent::Forwarded { outcome: Forwarded::Refused, .. },
        RelayEvent::Forwarded { outcome: Forwarded::Unanswered, .. },
        RelayEvent::Refused { .. }, RelayEvent::Declined { .. }, RelayEvent::GuestMac { .. }, RelayEvent::PfReset,
        RelayEvent::Revoked { .. },
    );
}

#[test]
fn states_and_codes_keep_their_text() {
    let states = [
        (State::Empty, r#""empty""#),
        (State::Ready, r#""ready""#),
        (State::Running, r#""running""#),
        (State::Paused, r#""paused""#),
        (State::Rebooting, r#""rebooting""#),
        (State::Ended, r#""ended""#),
    ];
    hold(&states);
    each_has_a_text!(states;
        State::Empty, State::Ready, State::Running, State::Paused, State::Rebooting, State::Ended,
    );
    let codes = [
        (FailureCode::WrongState, r#""wrong_state""#),
        (FailureCode::Kvm, r#""kvm""#),
        (FailureCode::Memory, r#""memory""#),
        (FailureCode::Placement, r#""placement""#),
        (FailureCode::CpuFeature, r#""cpu_feature""#),
        (FailureCode::Kernel, r#""kernel""#),
        (FailureCode::Memlock, r#""memlock""#),
        (FailureCode::GroupNotViable, r#""group_not_viable""#),
        (FailureCode::Disk, r#""disk""#),
        (FailureCode::NoKernelOnDisk, r#""no_kernel_on_disk""#),
        (FailureCode::Device, r#""device""#),
        (FailureCode::Sandbox, r#""sandbox""#),
        (FailureCode::Invalid, r#""invalid""#),
        (FailureCode::Internal, r#""internal""#),
    ];
    hold(&codes);
    each_has_a_text!(codes;
        FailureCode::WrongState, FailureCode::Kvm, FailureCode::Memory, FailureCode::Kernel,
        FailureCode::Memlock, FailureCode::GroupNotViable, FailureCode::NoKernelOnDisk, FailureCode::Disk, FailureCode::Device,
        FailureCode::Sandbox, FailureCode::Invalid, FailureCode::Internal, FailureCode::Placement,
        FailureCode::CpuFeature,
    );
}

/// Changes and requests are the policy's, and part of messages.
#[test]
fn changes_and_requests_keep_their_text() {
    use netpolicy::PromiscuousMode;
    let vlan = || 100.try_into().unwrap();
    let changes = [
        (Change::Reset, r#""reset""#),
        (Change::SetMac(mac()), r#"{"set_mac":"02:00:00:00:00:09"}"#),
        (Change::AddUnicast(mac()), r#"{"add_unicast":"02:00:00:00:00:09"}"#),
        (Change::ClearUnicast, r#""clear_unicast""#),
        (Change::SetMulticast(vec![1, 2]), r#"{"set_multicast":[1,2]}"#),
        (Change::JoinVlan(vlan()), r#"{"join_vlan":100}"#),
        (Change::LeaveVlan(vlan()), r#"{"leave_vlan":100}"#),
        (Change::SetMaxFrame(1522), r#"{"set_max_frame":1522}"#),
        (
            Change::SetPromiscuous(PromiscuousMode { multicast: true, unicast: false }),
            r#"{"set_promiscuous":{"multicast":true,"unicast":false}}"#,
        ),
        (Change::SetPortVlan(None), r#"{"set_port_vlan":null}"#),
        (Change::SetSpoofCheck(true), r#"{"set_spoof_check":true}"#),
        (Change::SetTrust(false), r#"{"set_trust":false}"#),
        (Change::SetMaxTxRate(None), r#"{"set_max_tx_rate":null}"#),
        (Change::SetLink(netpolicy::LinkState::Down), r#"{"set_link":"down"}"#),
    ];
    hold(&changes);
    each_has_a_text!(changes;
        Change::Reset, Change::SetMac(_), Change::AddUnicast(_), Change::ClearUnicast,
        Change::SetMulticast(_), Change::JoinVlan(_), Change::LeaveVlan(_), Change::SetMaxFrame(_),
        Change::SetPromiscuous(_), Change::SetPortVlan(_), Change::SetSpoofCheck(_), Change::SetTrust(_),
        Change::SetMaxTxRate(_), Change::SetLink(_),
    );
    let requests = [
        (Request::Reset, r#""reset""#),
        (Request::SetMac(mac()), r#"{"set_mac":"02:00:00:00:00:09"}"#),
        (Request::ClearUnicastFilters, r#""clear_unicast_filters""#),
        (Request::AddUnicastFilter(mac()), r#"{"add_unicast_filter":"02:00:00:00:00:09"}"#),
        (
            Request::SetMulticast { count: 3, hashes: vec![1, 2] },
            r#"{"set_multicast":{"count":3,"hashes":[1,2]}}"#,
        ),
        (Request::SetVlan { vid: 100, add: true }, r#"{"set_vlan":{"vid":100,"add":true}}"#),
        (Request::SetMaxFrame(1522), r#"{"set_max_frame":1522}"#),
        (
            Request::SetPromiscuous(PromiscuousMode::OFF),
            r#"{"set_promiscuous":{"multicast":false,"unicast":false}}"#,
        ),
        (Request::Unknown { opcode: 9 }, r#"{"unknown":{"opcode":9}}"#),
    ];
    hold(&requests);
    each_has_a_text!(requests;
        Request::Reset, Request::SetMac(_), Request::ClearUnicastFilters, Request::AddUnicastFilter(_),
        Request::SetMulticast { .. }, Request::SetVlan { .. }, Request::SetMaxFrame(_),
        Request::SetPromiscuous(_), Request::Unknown { .. },
    );
}

#[test]
fn agents_of_earlier_versions_understand_the_counters_of_their_families() {
    let mut stats = RelayStats::default();
    let text = serde_json::to_string(&stats).unwrap();
    assert!(!text.contains("passed"), "{text}");
    assert_eq!(serde_json::from_str::<RelayStats>(&text).unwrap(), stats);
    stats.passed.writes = 1;
    let text = serde_json::to_string(&stats).unwrap();
    assert!(text.contains(r#""passed":{"reads":0,"writes":1}"#), "{text}");
    assert_eq!(serde_json::from_str::<RelayStats>(&text).unwrap(), stats);
}
