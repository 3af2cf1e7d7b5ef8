// SPDX-License-Identifier: Apache-2.0

//! The switch's policy: port groups, ports, settings, requests, verdicts. Pure: no I/O, clock, threads or randomness.
//!
//! * [`mac`], [`vlan`], [`ident`]: values that cannot be invalid.
//! * [`policy`]: the settings, and how switch, port group and port inherit them.
//! * [`objects`]: switches, port groups, ports, and the state that a port's VF has been given.
//! * [`request`]: a VF's requests, the verdicts on them, and the changes that follow.
//! * [`state`]: all of them together, [`SwitchState`]: the agent's switch actor owns one.
//! * [`capabilities`]: the settings that PF drivers can enforce.
//! * [`decision`]: the records of decisions.
#![forbid(unsafe_code)]

pub mod capabilities;
pub mod decision;
pub mod ident;
pub mod mac;
pub mod objects;
pub mod policy;
pub mod request;
pub mod state;
pub mod vlan;

pub use capabilities::{PfCapabilities, Rates, ResetClears, SIMULATED, Unenforceable};
pub use decision::{Committed, Decision, Outcome, Weight};
pub use ident::{Name, NameError, PortGroupId, PortId, SwitchId, VfRef, VmId, clipped};
pub use mac::{MacAddress, MacError, MacPattern};
pub use objects::{DeviceState, PfSettings, Port, PortGroup, Switch, SwitchKind, VmRef};
pub use policy::{
    EffectivePolicy, ForgedTransmits, Limit, MacChanges, MacPatterns, MacSharing, Mtu, MulticastLimit,
    OnDenied, Promiscuous, RangeError, Rate, Setting, Settings, Source, Sourced, UnicastLimit, VlanLimit,
    VlanPolicy,
};
pub use request::{
    Change, DecidedBy, Denial, Evaluation, LinkState, PromiscuousMode, Reason, Request, Route,
    StandingRefusal, Verdict,
};
pub use state::{Correction, Corrections, Entity, StateError, SwitchState};
pub use vlan::{AccessVlan, Qos, VlanError, VlanId, VlanSet};
