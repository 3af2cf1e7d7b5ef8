// SPDX-License-Identifier: Apache-2.0

//! A guest that drives a simulated VF, behind the same relay and function as hardware.

use std::{os::fd::OwnedFd, thread::JoinHandle};

use netpolicy::{MacAddress, OnDenied, Reason, Request, StandingRefusal};
use passthrough::relay::{Decision, How, RelayEvent, Verdict};
use simnic::{
    SimPf,
    pf::{Options, listen, serve},
    vf_bdf,
};
use sriov::{PfControl, VfChange};

use super::*;

// Finds the VF in slot 1, resets it and sends RESET, prints the address from the reply in hexadecimal; requests
// another address (SET_MAC) and prints the highest byte of the reply; then powers off.
core::arch::global_asm!(
    ".pushsection .rodata",
    ".code32",
    ".globl guest_mailbox, guest_mailbox_end",
    "guest_mailbox:",
    "  mov esp, 0x170000",
    "  mov ebx, 0xe0008000",
    "  cmp dword ptr [ebx], 0x10ca8086",
    "  jne 9f",
    "  mov word ptr [ebx + 4], 6",
    "  mov ebx, [ebx + 0x10]",
    "  and ebx, -16",
    "  mov dword ptr [ebx], 0x4000000", // VTCTRL.RST
    "  call 20f",
    "  mov dword ptr [ebx + 0x800], 1", // RESET
    "  call 30f",
    "  mov eax, [ebx + 0x804]",
    "  mov ecx, 4",
    "  call 40f",
    "  mov eax, [ebx + 0x808]",
    "  mov ecx, 2",
    "  call 40f",
    "  mov dword ptr [ebx + 0xc40], 2", // ACK
    "  call 20f",
    "  mov dword ptr [ebx + 0x800], 2", // SET_MAC
    "  mov dword ptr [ebx + 0x804], 0x00000002",
    "  mov dword ptr [ebx + 0x808], 0x9900",
    "  call 30f",
    "  mov eax, [ebx + 0x800]",
    "  shr eax, 24",
    "  mov ecx, 1",
    "  call 40f",
    "  mov dword ptr [ebx + 0xc40], 2",
    "9:",
    "  mov dx, 0x624",
    "  mov al, 0x34",
    "  out dx, al",
    "8: hlt",
    "  jmp 8b",
    // Takes the buffer.
    "20:",
    "  mov dword ptr [ebx + 0xc40], 4",
    "  mov eax, [ebx + 0xc40]",
    "  test al, 4",
    "  jz 20b",
    "  ret",
    // Sends the message in the buffer and waits for the reply.
    "30:",
    "  mov dword ptr [ebx + 0xc40], 1",
    "31: mov eax, [ebx + 0xc40]",
    "  test al, 0x10",
    "  jz 31b",
    "  ret",
    // Prints ecx bytes of eax, the lowest first.
    "40:",
    "  mov dx, 0x3f8",
    "41: push eax",
    "  shr al, 4",
    "  call 50f",
    "  mov eax, [esp]",
    "  and al, 15",
    "  call 50f",
    "  pop eax",
    "  shr eax, 8",
    "  dec ecx",
    "  jnz 41b",
    "  ret",
    "50: cmp al, 10",
    "  jb 51f",
    "  add al, 39",
    "51: add al, 48",
    "  out dx, al",
    "  ret",
    "guest_mailbox_end:",
    ".code64",
    ".popsection",
);

const MAC: MacAddress = MacAddress::new([2, 0, 0, 0, 0, 0x11]);
const OTHER: MacAddress = MacAddress::new([2, 0, 0, 0, 0, 0x99]);

/// The process of a PF, here a thread.
struct Adapter {
    pf: SimPf,
    thread: Option<JoinHandle<std::io::Result<()>>>,
    _dir: tempfile::TempDir,
}

impl Adapter {
    fn new() -> (Self, File) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pf.sock");
        let listener = listen(&path).unwrap();
        let options = Options { name: "sim0".into(), vfs: 1, listener, tap: None, linger: None };
        let thread = Some(thread::spawn(move || serve(options)));
        let mut pf = SimPf::connect(&path).unwrap();
        pf.apply(0, &[VfChange::Mac(Some(MAC))]).unwrap();
        let connection: OwnedFd = pf.attach(0).unwrap();
        (Self { pf, thread, _dir: dir }, connection.into())
    }

    fn stop(&mut self) {
        self.pf.stop().unwrap();
        self.thread.take().unwrap().join().unwrap().unwrap();
    }
}

fn device() -> DeviceSpec {
    DeviceSpec {
        bdf: vf_bdf(0, 0).unwrap().to_string(),
        backend: DeviceBackend::Simulated,
        adapter: Some("eth0".into()),
    }
}

fn connection_name() -> String {
    files::connection(&device().bdf)
}

#[test]
fn a_guest_s_mailbox_is_answered_through_the_relay() {
    let (asked, declined) = refused_address(None, false);
    assert!(asked.contains(&Request::Reset) && asked.contains(&Request::SetMac(OTHER)), "{asked:?}");
    assert_eq!(declined, []);
}

#[test]
fn what_the_agent_refuses_in_any_case_is_not_asked() {
    let (unless, reason) = (vec![MAC.into()], Reason::MacChangesRejected);
    let refusal = Some(StandingRefusal { unless, reason, on_denied: OnDenied::Nack });
    let (asked, declined) = refused_address(refusal.clone(), false);
    assert_eq!(asked, [Request::Reset]);
    assert_eq!(declined, [RelayEvent::Declined { mac: OTHER, reason, silent: false }]);
    // The refusal ends with the connection that brought it.
    let (asked, declined) = refused_address(refusal, true);
    assert!(asked.contains(&Request::SetMac(OTHER)) && declined.is_empty(), "{asked:?} {declined:?}");
}

/// A guest requests another address and is denied. Returns the requests that the agent was asked about, and the
/// events.
fn refused_address(refusal: Option<StandingRefusal>, connect_again: bool) -> (Vec<Request>, Vec<RelayEvent>) {
    let (mut adapter, connection) = Adapter::new();
    let mut vm = Fixture::new();
    // The agent sends it before a relay exists, too.
    vm.channel.send(&ToVmm::Standing { adapter: "eth0".into(), refusal }, &[]).unwrap();
    if connect_again {
        vm.reconnect();
    }
    let guest = guest!(guest_mailbox, guest_mailbox_end);
    vm.configure_with(&guest, vec![device()], &[(&connection_name(), &connection)]).unwrap();
    vm.command(VmmCommand::Run, &[]).unwrap();
    let (mut asked, mut declined) = (Vec::new(), Vec::new());
    let mut ended = false;
    // A relay's last event may arrive after the machine's end.
    while !ended || (asked.len() + declined.len() < 2) {
        match vm.receive() {
            ToAgent::Request { id, request: AgentRequest::Mailbox { adapter, guest_request } } => {
                assert_eq!(adapter, "eth0");
                let decision = match guest_request.request {
                    Request::Reset => Decision::Grant { how: How::Local },
                    _ => Decision::Refuse { tell: OnDenied::Nack, reason: Reason::MacChangesRejected },
                };
                let verdict = Verdict { seq: guest_request.seq, effective_mac: MAC, decision };
                vm.channel
                    .send(&ToVmm::Response { id, response: AgentResponse::Mailbox { adapter, verdict } }, &[])
                    .unwrap();
                asked.push(guest_request.request);
            }
            ToAgent::Event { event: VmmEvent::Ended { end }, .. } => {
                assert_eq!(end, End::PoweredOff);
                ended = true;
            }
            ToAgent::Event { event: VmmEvent::Relay { event, .. }, .. } => declined.push(event),
            ToAgent::Event { .. } => {}
            other => panic!("{other:?}"),
        }
    }
    // The address, then the reply to SET_MAC: NACK and clear to send.
    assert_eq!(vm.output(), "02000000001160");
    let counters = adapter.pf.counters().unwrap()[&0];
    assert_eq!((counters.messages, counters.refused), (1, 0), "the PF hears of the reset only");
    vm.exit();
    adapter.stop();
    (asked, declined)
}

#[test]
fn a_pf_that_ends_takes_its_vf_from_the_guest() {
    let (mut adapter, connection) = Adapter::new();
    let mut vm = Fixture::new();
    vm.configure_with(
        &guest!(guest_reset, guest_reset_end),
        vec![device()],
        &[(&connection_name(), &connection)],
    )
    .unwrap();
    drop(connection);
    vm.command(VmmCommand::Run, &[]).unwrap();
    adapter.stop();
    vm.wait_for(|event| {
        matches!(event, VmmEvent::DeviceLost { bdf, why: DeviceLoss::Failed } if *bdf == device().bdf)
    });
    vm.command(VmmCommand::Stop, &[]).unwrap();
    vm.process.take().unwrap().join().unwrap();
}

#[test]
fn without_its_connection_there_is_no_machine() {
    let mut vm = Fixture::new();
    let failure = vm.configure_with(&guest!(guest_hello, guest_hello_end), vec![device()], &[]).unwrap_err();
    assert_eq!(failure.code, FailureCode::Device);
    assert!(failure.detail.contains("f51a0000:01:10.0"), "{failure}");
    vm.exit();
}
