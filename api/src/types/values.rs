// SPDX-License-Identifier: Apache-2.0

//! Small values of the wire types that cannot be invalid.

use std::{fmt, str::FromStr, time::Duration};

use serde::{Deserialize, Serialize};
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{ObjectBuilder, OneOfBuilder, RefOr, Schema, Type},
};

/// Why a text is not the value that it should be; the text names the rule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Invalid(pub String);

/// Gives a type that parses from and prints as text the conversions to and from `String` for serde, and its schema.
macro_rules! as_string {
    ($type:ident, pattern $pattern:literal, example $example:literal) => {
        impl TryFrom<String> for $type {
            type Error = Invalid;
            fn try_from(text: String) -> Result<Self, Invalid> {
                text.parse()
            }
        }
        impl From<$type> for String {
            fn from(value: $type) -> String {
                value.to_string()
            }
        }
        impl PartialSchema for $type {
            fn schema() -> RefOr<Schema> {
                let text = ObjectBuilder::new().schema_type(Type::String);
                text.pattern(Some($pattern)).examples([$example]).into()
            }
        }
        impl ToSchema for $type {}
    };
}

/// A name: lower case letters, digits, `-`, `_`, `.`; 1 to 63 bytes; begins with a letter or digit.
///
/// A UUID is not a name, so that `{name}` in a path can be a name or an id.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

impl Name {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = Invalid;
    fn from_str(text: &str) -> Result<Self, Invalid> {
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let right = matches!(text.as_bytes(), [first, rest @ ..] if rest.len() <= 62
            && plain(*first) && rest.iter().all(|&b| plain(b) || matches!(b, b'-' | b'_' | b'.')));
        if !right {
            return Err(Invalid(format!(
                "{:?} is not a name: use 1 to 63 of a-z, 0-9, '-', '_', '.', beginning with a letter or digit",
                clipped(text)
            )));
        }
        if uuid::Uuid::try_parse(text).is_ok() {
            return Err(Invalid(format!("{text:?} is not a name: it reads as an id")));
        }
        Ok(Name(text.to_owned()))
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

as_string!(Name, pattern "^[a-z0-9][a-z0-9._-]{0,62}$", example "web1");

/// An Ethernet address that an adapter can have: unicast and not zero. Text: `02:00:00:00:00:11`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct UnicastMac([u8; 6]);

impl UnicastMac {
    /// The address with these bytes, if it is unicast and not zero.
    pub fn new(octets: [u8; 6]) -> Option<Self> {
        (octets[0] & 1 == 0 && octets != [0; 6]).then_some(UnicastMac(octets))
    }

    /// The six bytes, in the order of transmission.
    pub fn octets(self) -> [u8; 6] {
        self.0
    }
}

impl FromStr for UnicastMac {
    type Err = Invalid;
    fn from_str(text: &str) -> Result<Self, Invalid> {
        let wrong = || Invalid(format!("{:?} is not a MAC address such as 02:00:00:00:00:11", clipped(text)));
        let mut octets = [0; 6];
        let mut parts = text.split(':');
        for octet in &mut octets {
            let part = parts.next().ok_or_else(wrong)?;
            if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(wrong());
            }
            *octet = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        if parts.next().is_some() {
            return Err(wrong());
        }
        UnicastMac::new(octets).ok_or_else(|| {
            Invalid(format!("{text:?} cannot be an adapter's address: it must be unicast and not zero"))
        })
    }
}

impl fmt::Display for UnicastMac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

as_string!(UnicastMac, pattern "^[0-9a-f]{2}(:[0-9a-f]{2}){5}$", example "02:00:00:00:00:11");

/// A PCI function of the host, `dddd:bb:dd.f` in hexadecimal. `bb:dd.f` is in domain 0000.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Bdf {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

impl Bdf {
    /// Domain, bus, device (0 to 31) and function (0 to 7).
    pub fn parts(self) -> (u32, u8, u8, u8) {
        (self.domain, self.bus, self.device, self.function)
    }
}

impl FromStr for Bdf {
    type Err = Invalid;
    fn from_str(text: &str) -> Result<Self, Invalid> {
        let hex = |part: &str, digits: usize| {
            (part.len() == digits && part.bytes().all(|b| b.is_ascii_hexdigit()))
                .then(|| u16::from_str_radix(part, 16).ok())
                .flatten()
        };
        let parse = || {
            let (front, function) = text.rsplit_once('.')?;
            let (front, device) = front.rsplit_once(':')?;
            let (domain, bus) = front.split_once(':').unwrap_or(("0000", front));
            // Domains made up by software have up to eight digits, as the kernel prints them.
            let made_up = (5..=8).contains(&domain.len()) && !domain.starts_with('0');
            let high = if made_up { hex(domain.get(..domain.len() - 4)?, domain.len() - 4)? } else { 0 };
            let low = hex(if made_up { domain.get(domain.len() - 4..)? } else { domain }, 4)?;
            let bdf = Bdf {
                domain: u32::from(high) << 16 | u32::from(low),
                bus: u8::try_from(hex(bus, 2)?).ok()?,
                device: u8::try_from(hex(device, 2)?).ok()?,
                function: u8::try_from(hex(function, 1)?).ok()?,
            };
            (bdf.device < 32 && bdf.function < 8).then_some(bdf)
        };
        parse()
            .ok_or_else(|| Invalid(format!("{:?} is not a PCI address such as 0000:01:10.0", clipped(text))))
    }
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{:x}", self.domain, self.bus, self.device, self.function)
    }
}

as_string!(Bdf, pattern r"^([1-9a-f][0-9a-f]{0,3})?[0-9a-f]{4}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]$", example "0000:01:10.0");

/// A number of bytes. Reads a number, or text such as `512MiB` (KiB, MiB, GiB, TiB); writes text in the largest
/// unit that loses nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "ByteSizeWire", into = "String")]
pub struct ByteSize(u64);

/// Both forms of a [`ByteSize`].
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a number of bytes or a text such as \"512MiB\"")]
enum ByteSizeWire {
    Bytes(u64),
    Text(String),
}

impl PartialSchema for ByteSize {
    fn schema() -> RefOr<Schema> {
        let text = ObjectBuilder::new().schema_type(Type::String);
        let bytes = ObjectBuilder::new().schema_type(Type::Integer).minimum(Some(0));
        OneOfBuilder::new()
            .item(text.pattern(Some("^[0-9]+ ?([KMGT]iB)?$")).examples(["512MiB"]))
            .item(bytes)
            .into()
    }
}

impl ToSchema for ByteSize {}

const UNITS: [(&str, u64); 4] = [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];

impl ByteSize {
    /// This many bytes.
    pub const fn new(bytes: u64) -> Self {
        ByteSize(bytes)
    }

    /// This many MiB; saturates.
    pub const fn mib(count: u64) -> Self {
        ByteSize(count.saturating_mul(1 << 20))
    }

    /// The number of bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }
}

impl FromStr for ByteSize {
    type Err = Invalid;
    fn from_str(text: &str) -> Result<Self, Invalid> {
        let wrong = || {
            Invalid(format!(
                "{:?} is not a size: write a number of bytes, or a number and KiB, MiB, GiB or TiB",
                clipped(text)
            ))
        };
        let text = text.trim();
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let factor = match unit.trim_start() {
            "" => 1,
            unit => UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(wrong)?.1,
        };
        number.parse::<u64>().ok().and_then(|n| n.checked_mul(factor)).map(ByteSize).ok_or_else(wrong)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match UNITS.iter().find(|(_, unit)| self.0 != 0 && self.0.is_multiple_of(*unit)) {
            Some((name, unit)) => write!(f, "{}{name}", self.0 / unit),
            None => write!(f, "{}", self.0),
        }
    }
}

impl TryFrom<ByteSizeWire> for ByteSize {
    type Error = Invalid;
    fn try_from(wire: ByteSizeWire) -> Result<Self, Invalid> {
        match wire {
            ByteSizeWire::Bytes(bytes) => Ok(ByteSize(bytes)),
            ByteSizeWire::Text(text) => text.parse(),
        }
    }
}

impl From<ByteSize> for String {
    fn from(size: ByteSize) -> String {
        size.to_string()
    }
}

/// A moment: milliseconds since 1970-01-01 UTC, as RFC 3339 text on the wire (`2026-01-31T12:00:00.250Z`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Timestamp(u64);

/// 9999-12-31T23:59:59.999Z, the last moment that RFC 3339 can write.
const LAST_MOMENT_MS: u64 = 253_402_300_799_999;

impl Timestamp {
    /// The moment this many milliseconds after 1970-01-01 UTC, at most the end of the year 9999.
    pub fn from_unix_ms(ms: u64) -> Self {
        Timestamp(ms.min(LAST_MOMENT_MS))
    }

    /// Milliseconds since 1970-01-01 UTC.
    pub fn unix_ms(self) -> u64 {
        self.0
    }

    /// This moment by the host's clock.
    pub fn now() -> Self {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Timestamp::from_unix_ms(u64::try_from(since.as_millis()).unwrap_or(LAST_MOMENT_MS))
    }
}

impl FromStr for Timestamp {
    type Err = Invalid;
    fn from_str(text: &str) -> Result<Self, Invalid> {
        humantime::parse_rfc3339(text)
            .ok()
            .and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok())
            .and_then(|since| u64::try_from(since.as_millis()).ok())
            .map(Timestamp::from_unix_ms)
            .ok_or_else(|| {
                Invalid(format!("{:?} is not a time such as 2026-01-31T12:00:00Z (in UTC)", clipped(text)))
            })
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // In range by construction; `checked_add` because SystemTime's own range depends on the platform.
        match std::time::UNIX_EPOCH.checked_add(Duration::from_millis(self.0)) {
            Some(time) => humantime::format_rfc3339_millis(time).fmt(f),
            None => f.write_str("9999-12-31T23:59:59.999Z"),
        }
    }
}

as_string!(Timestamp, pattern r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z$", example "2026-01-31T12:00:00.250Z");

/// A foreign text, clipped for a message.
fn clipped(text: &str) -> String {
    netpolicy::clipped(text, 80)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `expect` is the canonical text, or None where the text must be refused.
    fn check<T: FromStr + fmt::Display>(cases: &[(&str, Option<&str>)]) {
        for (text, expect) in cases {
            let parsed = text.parse::<T>().ok().map(|value| value.to_string());
            assert_eq!(parsed.as_deref(), *expect, "{text:?}");
        }
    }

    #[test]
    fn names() {
        let longest = "a".repeat(63);
        check::<Name>(&[
            ("web1", Some("web1")),
            ("0.a-b_c", Some("0.a-b_c")),
            (&longest, Some(&longest)),
            (&"a".repeat(64), None),
            ("", None),
            ("-a", None),
            (".a", None),
            ("Web", None),
            ("a/b", None),
            ("ä", None),
            ("67e55044-10b1-426f-9247-bb680e5fe0c8", None),
            ("67e5504410b1426f9247bb680e5fe0c8", None),
        ]);
    }

    #[test]
    fn macs() {
        check::<UnicastMac>(&[
            ("02:00:00:00:00:11", Some("02:00:00:00:00:11")),
            ("0A:bC:00:00:00:11", Some("0a:bc:00:00:00:11")),
            ("01:00:5e:00:00:01", None),
            ("ff:ff:ff:ff:ff:ff", None),
            ("00:00:00:00:00:00", None),
            ("02:00:00:00:00", None),
            ("02:00:00:00:00:11:22", None),
            ("2:0:0:0:0:11", None),
            ("+2:00:00:00:00:11", None),
            ("02-00-00-00-00-11", None),
        ]);
    }

    #[test]
    fn pci_addresses() {
        check::<Bdf>(&[
            ("0000:01:10.0", Some("0000:01:10.0")),
            ("01:1F.7", Some("0000:01:1f.7")),
            ("ffff:ff:1f.7", Some("ffff:ff:1f.7")),
            ("f51a0000:01:10.2", Some("f51a0000:01:10.2")),
            ("10000:E1:00.0", Some("10000:e1:00.0")),
            ("00001:01:10.0", None),
            ("100000000:01:10.0", None),
            ("+0000:01:10.0", None),
            ("é000:01:10.0", None),
            ("éé0000:01:10.0", None),
            ("0000:01:20.0", None),
            ("0000:01:10.8", None),
            ("0000:01:10", None),
            ("0:1:0.0", None),
            ("0000:0000:01:10.0", None),
            ("../0:01:10.0", None),
            ("", None),
        ]);
    }

    #[test]
    fn sizes() {
        check::<ByteSize>(&[
            ("512MiB", Some("512MiB")),
            ("1024 MiB", Some("1GiB")),
            ("1048577", Some("1048577")),
            ("0", Some("0")),
            ("512MB", None),
            ("512M", None),
            ("-1", None),
            ("MiB", None),
            ("", None),
            ("1.5GiB", None),
            ("99999999999TiB", None),
            ("99999999999999999999", None),
        ]);
        assert_eq!(serde_json::from_str::<ByteSize>("1048576").unwrap(), ByteSize::mib(1));
        let error = serde_json::from_str::<ByteSize>("true").unwrap_err().to_string();
        assert!(error.contains("512MiB"), "{error}");
    }

    #[test]
    fn moments() {
        check::<Timestamp>(&[
            ("2026-01-31T12:00:00.250Z", Some("2026-01-31T12:00:00.250Z")),
            ("2026-01-31T12:00:00Z", Some("2026-01-31T12:00:00.000Z")),
            ("2026-02-31T12:00:00Z", None),
            ("yesterday", None),
        ]);
        assert_eq!(Timestamp::from_unix_ms(u64::MAX).to_string(), "9999-12-31T23:59:59.999Z");
    }

    proptest::proptest! {
        #[test]
        fn sizes_print_what_they_read(bytes: u64) {
            proptest::prop_assert_eq!(ByteSize::new(bytes).to_string().parse::<ByteSize>().unwrap().bytes(), bytes);
        }

        #[test]
        fn no_text_panics(text in ".{0,120}") {
            let _ = (text.parse::<Name>(), text.parse::<UnicastMac>(), text.parse::<Bdf>());
            let _ = (text.parse::<ByteSize>(), text.parse::<Timestamp>());
        }
    }
}
