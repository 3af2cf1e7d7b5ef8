// SPDX-License-Identifier: Apache-2.0

//! A policy's settings as options of the command line and as text. A value has the same text in both.

use clap::Args;
use netpolicy::{
    AccessVlan, EffectivePolicy, ForgedTransmits, MacChanges, MacPatterns, MacSharing, Mtu, MulticastLimit,
    OnDenied, Promiscuous, Qos, Rate, Setting, Settings, Source, UnicastLimit, VlanId, VlanLimit, VlanPolicy,
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};

/// An option for each setting.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Settings")]
pub(super) struct SettingsArgs {
    /// Changes of the effective address: reject, accept, or the addresses that are accepted, with masks
    /// (02:00:00:00:00:01,00:00:5e:00:01:00/ff:ff:ff:ff:ff:00).
    #[arg(long, value_name = "POLICY", value_parser = mac_changes)]
    mac_changes: Option<MacChanges>,
    /// The same address on two ports of one VM, each on another PF: reject or same_vm.
    #[arg(long, value_name = "POLICY", value_parser = word::<MacSharing>)]
    mac_sharing: Option<MacSharing>,
    /// Frames from other addresses than the effective one: reject or accept.
    #[arg(long, value_name = "POLICY", value_parser = word::<ForgedTransmits>)]
    forged_transmits: Option<ForgedTransmits>,
    /// Frames to other addresses: reject, multicast or accept.
    #[arg(long, value_name = "POLICY", value_parser = word::<Promiscuous>)]
    promiscuous: Option<Promiscuous>,
    /// none; a VLAN that the adapter tags (100, or 100/3 with a priority); or trunk:7,100-200, which the guest tags.
    #[arg(long, value_name = "VLAN", value_parser = vlan)]
    vlan: Option<VlanPolicy>,
    /// Multicast hashes, 0 to 30.
    #[arg(long, value_name = "COUNT", value_parser = number::<MulticastLimit>)]
    multicast_limit: Option<MulticastLimit>,
    /// Unicast addresses besides the effective one, 0 to 3.
    #[arg(long, value_name = "COUNT", value_parser = number::<UnicastLimit>)]
    unicast_limit: Option<UnicastLimit>,
    /// VLANs that the guest of a trunk port may join, 0 to 32.
    #[arg(long, value_name = "COUNT", value_parser = number::<VlanLimit>)]
    vlan_limit: Option<VlanLimit>,
    /// The largest MTU, 68 to 9216.
    #[arg(long, value_name = "BYTES", value_parser = number::<Mtu>)]
    mtu: Option<Mtu>,
    /// Sending rate: unlimited, or Mbit/s.
    #[arg(long, value_name = "MBIT", value_parser = rate)]
    rate: Option<Rate>,
    /// The response to a denied request: nack (the guest's driver reports an error) or silent.
    #[arg(long, value_name = "HOW", value_parser = word::<OnDenied>)]
    on_denied: Option<OnDenied>,
    /// Cuts ports off: true or false.
    #[arg(long, value_name = "BOOL")]
    blocked: Option<bool>,
}

impl SettingsArgs {
    /// Replaces the settings that options name.
    pub(super) fn apply(self, settings: &mut Settings) {
        macro_rules! put {
            ($($field:ident)*) => { $(if self.$field.is_some() { settings.$field = self.$field; })* };
        }
        put!(mac_changes mac_sharing forged_transmits promiscuous vlan multicast_limit unicast_limit vlan_limit mtu rate
            on_denied blocked);
    }
}

/// Settings as members of a merge patch; `unset` are left to the level above.
pub(super) fn patch(settings: &Settings, unset: &[Setting]) -> Map<String, Value> {
    let mut patch = match serde_json::to_value(settings) {
        Ok(Value::Object(members)) => members,
        // Settings are an object of words, numbers and lists.
        _ => Map::new(),
    };
    patch.extend(unset.iter().map(|setting| (setting.name().to_owned(), Value::Null)));
    patch
}

/// Leaves settings to the level above.
pub(super) fn unset(settings: &mut Settings, unset: &[Setting]) {
    macro_rules! clear {
        ($($field:ident)*) => {
            $(if unset.iter().any(|setting| setting.name() == stringify!($field)) { settings.$field = None; })*
        };
    }
    clear!(mac_changes mac_sharing forged_transmits promiscuous vlan multicast_limit unicast_limit vlan_limit mtu rate
        on_denied blocked);
}

/// The name of a setting.
pub(super) fn setting(text: &str) -> Result<Setting, String> {
    word(&text.replace('-', "_"))
}

/// A value that is a word in JSON. The error lists the words.
pub(super) fn word<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_value(Value::from(text)).map_err(|error| error.to_string())
}

fn number<T: TryFrom<i64, Error: ToString>>(text: &str) -> Result<T, String> {
    let number: i64 = text.parse().map_err(|_| format!("{text:?} is not a number"))?;
    T::try_from(number).map_err(|error| error.to_string())
}

fn mac_changes(text: &str) -> Result<MacChanges, String> {
    match text {
        "reject" => Ok(MacChanges::Reject),
        "accept" => Ok(MacChanges::Accept),
        _ => {
            let patterns = text.split(',').map(|pattern| pattern.trim().parse().map_err(|e| format!("{e}")));
            let patterns = patterns
                .collect::<Result<Vec<_>, _>>()
                .map_err(|error| format!("{error}; or write reject or accept"))?;
            MacPatterns::try_from(patterns).map(MacChanges::List).map_err(|error| error.to_string())
        }
    }
}

fn vlan(text: &str) -> Result<VlanPolicy, String> {
    if text == "none" {
        return Ok(VlanPolicy::None);
    }
    if let Some(trunk) = text.strip_prefix("trunk:") {
        return trunk.parse().map(VlanPolicy::Trunk).map_err(|error| format!("{error}"));
    }
    let not_a_vlan = || {
        format!(
            "{text:?} is not a VLAN policy: write none, a VLAN such as 100 or 100/3, or a trunk such as \
             trunk:7,100-200"
        )
    };
    let (id, qos) = text.split_once('/').unwrap_or((text, "0"));
    let id =
        VlanId::try_from(id.parse::<i64>().map_err(|_| not_a_vlan())?).map_err(|error| error.to_string())?;
    let qos =
        Qos::try_from(qos.parse::<i64>().map_err(|_| not_a_vlan())?).map_err(|error| error.to_string())?;
    Ok(VlanPolicy::Access(AccessVlan { id, qos }))
}

fn rate(text: &str) -> Result<Rate, String> {
    match text {
        "unlimited" => Ok(Rate::Unlimited),
        _ => text
            .parse()
            .map(Rate::MaxTxMbit)
            .map_err(|_| format!("{text:?} is neither unlimited nor a number of Mbit/s of at least 1")),
    }
}

/// A value that is a word or a number in JSON.
pub(super) fn plain<T: Serialize>(value: &T) -> String {
    match serde_json::to_value(value) {
        Ok(Value::String(word)) => word,
        Ok(value) => value.to_string(),
        Err(error) => error.to_string(),
    }
}

fn show_mac_changes(value: &MacChanges) -> String {
    match value {
        MacChanges::List(patterns) => {
            patterns.as_slice().iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
        }
        word => plain(word),
    }
}

fn show_vlan(value: &VlanPolicy) -> String {
    match value {
        VlanPolicy::None => "none".to_owned(),
        VlanPolicy::Access(AccessVlan { id, qos }) if qos.get() == 0 => id.to_string(),
        VlanPolicy::Access(AccessVlan { id, qos }) => format!("{id}/{}", qos.get()),
        VlanPolicy::Trunk(set) => format!("trunk:{set}"),
    }
}

fn show_rate(value: &Rate) -> String {
    match value {
        Rate::Unlimited => "unlimited".to_owned(),
        Rate::MaxTxMbit(mbit) => mbit.to_string(),
    }
}

/// The settings that a level decides, as `name=value`.
pub(super) fn brief(settings: &Settings) -> String {
    let mut parts = Vec::new();
    macro_rules! part {
        ($($field:ident $show:path;)*) => {
            $(if let Some(value) = &settings.$field {
                parts.push(format!(concat!(stringify!($field), "={}"), $show(value)));
            })*
        };
    }
    part! {
        mac_changes show_mac_changes; mac_sharing plain; forged_transmits plain; promiscuous plain;
        vlan show_vlan; multicast_limit plain; unicast_limit plain; vlan_limit plain; mtu plain; rate show_rate; on_denied plain;
        blocked plain;
    }
    parts.join(" ")
}

/// A line for each setting: its value and the level that decided it.
pub(super) fn lines(policy: &EffectivePolicy) -> Vec<(String, String)> {
    macro_rules! line {
        ($($field:ident $show:path;)*) => {
            vec![$((stringify!($field), $show(&policy.$field.value), policy.$field.source),)*]
        };
    }
    let lines: Vec<(&str, String, Source)> = line! {
        mac_changes show_mac_changes; mac_sharing plain; forged_transmits plain; promiscuous plain;
        vlan show_vlan; multicast_limit plain; unicast_limit plain; vlan_limit plain; mtu plain; rate show_rate; on_denied plain;
        blocked plain;
    };
    lines
        .into_iter()
        .map(|(name, value, source)| {
            let level = match source {
                Source::Default => "by default",
                Source::Switch => "by the switch",
                Source::PortGroup => "by the port group",
                Source::Port => "by the port",
            };
            (name.to_owned(), format!("{value} ({level})"))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        settings: SettingsArgs,
    }

    fn parse(line: &str) -> Result<Settings, String> {
        let line = Line::try_parse_from(["x"].into_iter().chain(line.split_whitespace()));
        let mut settings = Settings::default();
        line.map_err(|error| error.to_string())?.settings.apply(&mut settings);
        Ok(settings)
    }

    /// One of each setting, as its option takes it.
    const ALL: [(&str, &str); 12] = [
        ("mac_changes", "02:00:00:00:00:01,00:00:5e:00:01:00/ff:ff:ff:ff:ff:00"),
        ("mac_sharing", "same_vm"),
        ("forged_transmits", "accept"),
        ("promiscuous", "multicast"),
        ("vlan", "trunk:7,100-200"),
        ("multicast_limit", "3"),
        ("unicast_limit", "2"),
        ("vlan_limit", "32"),
        ("mtu", "9000"),
        ("rate", "100"),
        ("on_denied", "silent"),
        ("blocked", "true"),
    ];

    #[test]
    fn every_setting_has_an_option_that_takes_what_is_shown() {
        let known: Vec<_> = Setting::ALL.iter().map(|setting| setting.name()).collect();
        assert_eq!(ALL.map(|(name, _)| name).as_slice(), known);
        let line: String =
            ALL.iter().map(|(name, value)| format!("--{} {value} ", name.replace('_', "-"))).collect();
        let settings = parse(&line).unwrap();
        assert_eq!(settings.present().count(), ALL.len());
        let shown: Vec<_> = ALL.iter().map(|(name, value)| format!("{name}={value}")).collect();
        assert_eq!(brief(&settings), shown.join(" "));
        for setting in Setting::ALL {
            let mut others = settings.clone();
            unset(&mut others, &[*setting]);
            assert!(
                others.present().count() == ALL.len() - 1 && others.present().all(|other| other != *setting)
            );
        }
        for value in ["none", "100", "100/3", "trunk:1-4094"] {
            assert_eq!(brief(&parse(&format!("--vlan {value}")).unwrap()), format!("vlan={value}"));
        }
    }

    #[test]
    fn what_is_not_named_stays_and_what_is_unset_is_null() {
        let mut settings = parse("--mtu 1400 --rate unlimited").unwrap();
        let args = Line::try_parse_from(["x", "--mtu", "9000"]).unwrap().settings;
        args.apply(&mut settings);
        assert_eq!(brief(&settings), "mtu=9000 rate=unlimited");
        let patch = patch(&settings, &[setting("on-denied").unwrap(), setting("vlan").unwrap()]);
        assert_eq!(
            Value::from(patch),
            serde_json::json!({ "mtu": 9000, "rate": "unlimited", "on_denied": null, "vlan": null })
        );
    }

    #[test]
    fn errors_say_what_can_be_said() {
        for (line, expect) in [
            ("--mac-changes maybe", "or write reject or accept"),
            ("--forged-transmits list", "`reject` or `accept`"),
            ("--vlan 4095", "use 1 to 4094"),
            ("--vlan 100/8", "use 0 to 7"),
            (
                "--vlan trunk",
                "\"trunk\" is not a VLAN policy: write none, a VLAN such as 100 or 100/3, or a trunk",
            ),
            ("--vlan 70000", "VLAN 70000 does not exist: use 1 to 4094"),
            ("--mtu 70000", "70000 is out of range: use 68 to 9216"),
            ("--mtu large", "\"large\" is not a number"),
            ("--vlan trunk:200-100", "ends before it starts"),
            ("--mtu 67", "use 68 to 9216"),
            ("--vlan-limit 33", "use 0 to 32"),
            ("--rate 0", "at least 1"),
            ("--blocked perhaps", "true, false"),
        ] {
            let error = parse(line).unwrap_err();
            assert!(error.contains(expect), "{line}: {error}");
        }
        assert!(setting("colour").unwrap_err().contains("`mac_changes`"));
    }
}
