// SPDX-License-Identifier: Apache-2.0

//! Schemas of values that do not derive them: bytes, and `netpolicy`'s values. That crate does not use OpenAPI; a
//! test here compares the two.

use utoipa::{
    PartialSchema, ToSchema,
    openapi::{
        ArrayBuilder, KnownFormat, ObjectBuilder, OneOfBuilder, Ref, RefOr, Schema, SchemaFormat, Type,
        schema::{AdditionalProperties, AnyOfBuilder},
    },
};

fn words(values: &[&str]) -> ObjectBuilder {
    ObjectBuilder::new().schema_type(Type::String).enum_values(Some(values.iter().copied()))
}

fn number(least: u32, most: u32) -> ObjectBuilder {
    ObjectBuilder::new().schema_type(Type::Integer).minimum(Some(least)).maximum(Some(most))
}

fn text(example: &str) -> ObjectBuilder {
    ObjectBuilder::new().schema_type(Type::String).examples([example])
}

/// An object with one property.
fn only(name: &str, value: impl Into<RefOr<Schema>>) -> ObjectBuilder {
    let object = ObjectBuilder::new().additional_properties(Some(AdditionalProperties::FreeForm(false)));
    object.property(name, value).required(name)
}

/// The schema of each setting by its name, and the name of the schema if it has one; a test compares the names with
/// `netpolicy::Setting::ALL`.
fn described() -> Vec<(&'static str, Option<&'static str>, RefOr<Schema>)> {
    let patterns = ArrayBuilder::new().items(text("00:00:5e:00:01:00/ff:ff:ff:ff:ff:00")).max_items(Some(64));
    let mac_changes = OneOfBuilder::new().item(words(&["reject", "accept"])).item(only("list", patterns));
    let range = OneOfBuilder::new().item(number(1, 4094)).item(text("100-200"));
    let trunk = ArrayBuilder::new().items(range).min_items(Some(1));
    let short = number(1, 4094).description(Some(
        "The number of an access VLAN: a short form for requests. Responses have the object `access`.",
    ));
    let vlan = OneOfBuilder::new()
        .item(words(&["none"]))
        .item(short)
        .item(only("access", Ref::from_schema_name(ACCESS)))
        .item(only("trunk", trunk));
    let rate = OneOfBuilder::new().item(words(&["unlimited"])).item(only("max_tx_mbit", number(1, u32::MAX)));
    vec![
        ("mac_changes", Some("MacChanges"), mac_changes.into()),
        ("mac_sharing", Some("MacSharing"), words(&["reject", "same_vm"]).into()),
        ("forged_transmits", Some("ForgedTransmits"), words(&["reject", "accept"]).into()),
        ("promiscuous", Some("Promiscuous"), words(&["reject", "multicast", "accept"]).into()),
        ("vlan", Some("Vlan"), vlan.into()),
        ("multicast_limit", None, number(0, 30).into()),
        ("unicast_limit", None, number(0, 3).into()),
        ("vlan_limit", None, number(0, 32).into()),
        ("mtu", None, number(68, 9216).into()),
        ("rate", Some("Rate"), rate.into()),
        ("on_denied", Some("OnDenied"), words(&["nack", "silent"]).into()),
        ("blocked", None, ObjectBuilder::new().schema_type(Type::Boolean).into()),
    ]
}

/// Each setting by its name: a reference to its schema if that has a name.
fn settings() -> Vec<(&'static str, RefOr<Schema>)> {
    let referred = |(setting, name, schema): (_, Option<&str>, _)| {
        (setting, name.map_or(schema, |name| Ref::from_schema_name(name).into()))
    };
    described().into_iter().map(referred).collect()
}

/// Adds the schemas that [`settings`] refers to.
fn add_settings(schemas: &mut Vec<(String, RefOr<Schema>)>) {
    schemas.extend(described().into_iter().filter_map(|(_, name, schema)| Some((name?.to_owned(), schema))));
    let access = only("id", number(1, 4094)).property("qos", number(0, 7));
    let access = access.description(Some("The VLAN of an access port, and the priority in the tag."));
    schemas.push((ACCESS.to_owned(), access.into()));
}

/// The schema's name of an access port's VLAN.
const ACCESS: &str = "AccessVlan";

/// The schema's name of [`source`].
const SOURCE: &str = "SettingSource";

/// The level that decided a setting.
fn source() -> RefOr<Schema> {
    words(&["default", "switch", "port_group", "port"]).into()
}

/// The settings that one level (switch, port group, port) decides; the level above decides the others.
pub(super) struct Settings;

impl PartialSchema for Settings {
    fn schema() -> RefOr<Schema> {
        let object = ObjectBuilder::new()
            .description(Some("Settings of one level; the level above decides those that are left out."));
        let object = object.additional_properties(Some(AdditionalProperties::FreeForm(false)));
        let or_null =
            |schema| OneOfBuilder::new().item(ObjectBuilder::new().schema_type(Type::Null)).item(schema);
        settings()
            .into_iter()
            .fold(object, |object, (name, schema)| object.property(name, or_null(schema)))
            .into()
    }
}

impl ToSchema for Settings {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        add_settings(schemas);
    }
}

/// A merge patch of these members of a specification.
fn patch(members: Vec<(&str, RefOr<Schema>)>) -> RefOr<Schema> {
    let object = ObjectBuilder::new().additional_properties(Some(AdditionalProperties::FreeForm(false)));
    members.into_iter().fold(object, |object, (name, schema)| object.property(name, schema)).into()
}

fn settings_or_null() -> RefOr<Schema> {
    OneOfBuilder::new()
        .item(ObjectBuilder::new().schema_type(Type::Null))
        .item(Ref::from_schema_name("Settings"))
        .into()
}

/// A merge patch of a port group's specification.
pub(crate) struct PortGroupPatch;

impl PartialSchema for PortGroupPatch {
    fn schema() -> RefOr<Schema> {
        let names = ArrayBuilder::new().items(Ref::from_schema_name("SettingName"));
        let names = OneOfBuilder::new().item(ObjectBuilder::new().schema_type(Type::Null)).item(names);
        patch(vec![
            ("switch", Ref::from_schema_name("Name").into()),
            ("settings", settings_or_null()),
            ("port_overrides", names.into()),
        ])
    }
}

impl ToSchema for PortGroupPatch {}

/// A merge patch of a port's specification.
pub(crate) struct PortPatch;

impl PartialSchema for PortPatch {
    fn schema() -> RefOr<Schema> {
        patch(vec![("settings", settings_or_null())])
    }
}

impl ToSchema for PortPatch {}

/// A merge patch of a VM's specification.
pub(crate) struct VmPatch;

impl PartialSchema for VmPatch {
    fn schema() -> RefOr<Schema> {
        let mut members = patch_of::<super::VmSpec>();
        for (name, schema) in &mut members {
            match name.as_str() {
                "boot" => *schema = patch_members(patch_of::<super::BootSpec>()),
                "limits" => *schema = or_null(patch_members(patch_of::<super::VmLimits>())),
                "credentials" => *schema = or_null(texts_or_null()),
                "placement" => *schema = or_null(placement()),
                "cpu_features" => *schema = or_null(patch_members(patch_of::<super::CpuFeatures>())),
                "cloud_init" => *schema = or_null(patch_members(patch_of::<super::CloudInitSpec>())),
                _ => {}
            }
        }
        patch_members(members)
    }
}

impl ToSchema for VmPatch {}

/// The members of an object in a merge patch: null takes an optional one back to its default.
fn patch_of<T: PartialSchema>() -> Vec<(String, RefOr<Schema>)> {
    let RefOr::T(Schema::Object(object)) = T::schema() else { return Vec::new() };
    let required = object.required;
    let member =
        |(name, schema)| if required.contains(&name) { (name, schema) } else { (name, or_null(schema)) };
    object.properties.into_iter().map(member).collect()
}

fn patch_members(members: Vec<(String, RefOr<Schema>)>) -> RefOr<Schema> {
    patch(members.iter().map(|(name, schema)| (name.as_str(), schema.clone())).collect())
}

/// A merge patch of a placement: null takes the CPUs of a vCPU away.
fn placement() -> RefOr<Schema> {
    let mut members = patch_of::<super::PlacementSpec>();
    for (_, schema) in members.iter_mut().filter(|(name, _)| name == "cpus") {
        let list = or_null(Ref::from_schema_name("CpuList").into());
        *schema = or_null(ObjectBuilder::new().additional_properties(Some(list)).into());
    }
    patch_members(members)
}

/// Texts by their names; null takes one away.
fn texts_or_null() -> RefOr<Schema> {
    let text = or_null(ObjectBuilder::new().schema_type(Type::String).into());
    ObjectBuilder::new().additional_properties(Some(text)).into()
}

fn or_null(schema: RefOr<Schema>) -> RefOr<Schema> {
    // Any of, not one of: the schema of an optional value may itself allow null.
    AnyOfBuilder::new().item(ObjectBuilder::new().schema_type(Type::Null)).item(schema).into()
}

/// The address of a function that is no VF. Its example is not that of a VF, so that no function is named twice.
pub(super) struct DeviceBdf;

impl PartialSchema for DeviceBdf {
    fn schema() -> RefOr<Schema> {
        match super::Bdf::schema() {
            RefOr::T(Schema::Object(mut object)) => {
                object.examples = vec!["0000:02:00.0".into()];
                object.into()
            }
            other => other,
        }
    }
}

impl ToSchema for DeviceBdf {}

/// The kind of a switch. `distributed` is for a later release: the agent refuses it by name.
pub(super) struct Kind;

impl PartialSchema for Kind {
    fn schema() -> RefOr<Schema> {
        words(&["standard"]).into()
    }
}

impl ToSchema for Kind {}

/// Every setting of a port with the level that decided it.
pub(super) struct EffectivePolicy;

impl PartialSchema for EffectivePolicy {
    fn schema() -> RefOr<Schema> {
        let object = ObjectBuilder::new().description(Some("Every setting with the level that decided it."));
        let sourced = |schema| {
            ObjectBuilder::new()
                .property("value", schema)
                .required("value")
                .property("source", Ref::from_schema_name(SOURCE))
                .required("source")
        };
        let with = |object: ObjectBuilder, (name, schema): (&str, _)| {
            object.property(name, sourced(schema)).required(name)
        };
        settings().into_iter().fold(object, with).into()
    }
}

impl ToSchema for EffectivePolicy {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        add_settings(schemas);
        schemas.push((SOURCE.to_owned(), source()));
    }
}

/// The setting that decided, and its level.
pub(super) struct DecidedBy;

impl PartialSchema for DecidedBy {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new()
            .property("setting", Ref::from_schema_name("SettingName"))
            .required("setting")
            .property("source", Ref::from_schema_name(SOURCE))
            .required("source")
            .into()
    }
}

impl ToSchema for DecidedBy {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        schemas.push((SOURCE.to_owned(), source()));
        schemas.push(("SettingName".to_owned(), SettingName::schema()));
    }
}

/// The revision of `If-Match`.
pub(crate) struct Etag;

impl PartialSchema for Etag {
    fn schema() -> RefOr<Schema> {
        text("\"3\"").pattern(Some(r#"^(\*|"[0-9]{1,19}"|[0-9]{1,19})$"#)).into()
    }
}

impl ToSchema for Etag {}

/// The name of a setting.
pub(super) struct SettingName;

impl PartialSchema for SettingName {
    fn schema() -> RefOr<Schema> {
        let names: Vec<_> = settings().iter().map(|(name, _)| *name).collect();
        words(&names).into()
    }
}

impl ToSchema for SettingName {}

/// The result of a request.
pub(super) struct Verdict;

impl PartialSchema for Verdict {
    fn schema() -> RefOr<Schema> {
        words(&["allowed", "denied", "taken_back", "repaired", "reverted"]).into()
    }
}

impl ToSchema for Verdict {}

/// Bytes, not text.
pub(crate) struct Binary;

impl PartialSchema for Binary {
    fn schema() -> RefOr<Schema> {
        let format = SchemaFormat::KnownFormat(KnownFormat::Binary);
        ObjectBuilder::new().schema_type(Type::String).format(Some(format)).into()
    }
}

impl ToSchema for Binary {}

#[cfg(test)]
mod tests {
    use utoipa::{PartialSchema as _, openapi};

    #[test]
    fn every_setting_has_a_schema() {
        let described: Vec<_> = super::settings().into_iter().map(|(name, _)| name).collect();
        let known: Vec<_> = netpolicy::Setting::ALL.iter().map(|setting| setting.name()).collect();
        assert_eq!(described, known);
    }

    #[test]
    fn every_verdict_of_the_schema_is_one() {
        let openapi::RefOr::T(openapi::Schema::Object(schema)) = super::Verdict::schema() else { panic!() };
        for word in schema.enum_values.unwrap() {
            serde_json::from_value::<netpolicy::Outcome>(word).unwrap();
        }
    }

    /// The readers accept exactly the forms that the schemas describe.
    #[test]
    fn the_described_forms_are_read() {
        for (json, valid) in [
            (r#"{"mac_changes": {"list": ["00:00:5e:00:01:00/ff:ff:ff:ff:ff:00"]}}"#, true),
            (r#"{"mac_changes": "reject", "forged_transmits": "accept", "promiscuous": "multicast"}"#, true),
            (r#"{"vlan": {"access": {"id": 4094, "qos": 7}}}"#, true),
            (r#"{"vlan": {"access": {"id": 4095}}}"#, false),
            (r#"{"vlan": 4094}"#, true),
            (r#"{"vlan": 0}"#, false),
            (r#"{"vlan": "100"}"#, false),
            (r#"{"vlan": {"trunk": [7, "100-200"]}}"#, true),
            (r#"{"vlan": "none", "rate": "unlimited", "on_denied": "silent", "blocked": true}"#, true),
            (r#"{"multicast_limit": 30, "unicast_limit": 3, "vlan_limit": 32, "mtu": 9216}"#, true),
            (r#"{"multicast_limit": 31}"#, false),
            (r#"{"unicast_limit": 4}"#, false),
            (r#"{"vlan_limit": 33}"#, false),
            (r#"{"mtu": 67}"#, false),
            (r#"{"mtu": 9217}"#, false),
            (r#"{"rate": {"max_tx_mbit": 1}}"#, true),
            (r#"{"rate": {"max_tx_mbit": 0}}"#, false),
            (r#"{"mac_change": "reject"}"#, false),
        ] {
            let value = serde_json::from_str(json).unwrap();
            assert_eq!(crate::document::read::<netpolicy::Settings>(value).is_ok(), valid, "{json}");
        }
    }
}
