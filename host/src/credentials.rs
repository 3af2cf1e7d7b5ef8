// SPDX-License-Identifier: Apache-2.0

//! A VM's credentials as systemd in the guest finds them: OEM strings of the SMBIOS tables (systemd.system-credentials(7),
//! systemd(1), "System credentials").

use std::{fs::File, io};

use api::types::Credentials;
use base64::{Engine as _, engine::general_purpose::STANDARD};

use crate::seed::sealed;

/// Makes the file with the strings of a VM, each with a NUL behind it, in memory. None without credentials.
///
/// # Errors
/// Those of making a file in memory.
pub fn oem_strings(credentials: &Credentials) -> io::Result<Option<File>> {
    if credentials.is_empty() {
        return Ok(None);
    }
    sealed("oem-strings", strings(credentials).as_bytes()).map(Some)
}

fn strings(credentials: &Credentials) -> String {
    let string = |(name, value): (_, &api::types::Secret)| {
        let value = value.reveal();
        // Programs between the tables and systemd may take other bytes for an end, or leave them out.
        match value.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ') {
            true => format!("io.systemd.credential:{name}={value}\0"),
            false => format!("io.systemd.credential.binary:{name}={}\0", STANDARD.encode(value)),
        }
    };
    credentials.iter().map(string).collect()
}

#[cfg(test)]
mod tests {
    use api::types::{MAX_CREDENTIAL_BYTES, MAX_CREDENTIALS, Secret};
    use protocol::files::OEM_STRINGS_MAX;

    use super::*;

    fn credentials(all: &[(&str, &str)]) -> Credentials {
        let one = |(name, value): &(&str, &str)| (name.parse().unwrap(), Secret::new((*value).to_owned()));
        all.iter().map(one).collect()
    }

    #[test]
    fn each_credential_is_a_string_that_smbios_can_hold() {
        for (value, expect) in [
            ("secret text=1", "io.systemd.credential:a=secret text=1"),
            ("", "io.systemd.credential:a="),
            ("two\nlines", "io.systemd.credential.binary:a=dHdvCmxpbmVz"),
            ("a\0b", "io.systemd.credential.binary:a=YQBi"),
            ("ä", "io.systemd.credential.binary:a=w6Q="),
        ] {
            assert_eq!(strings(&credentials(&[("a", value)])), format!("{expect}\0"));
        }
        let two = strings(&credentials(&[("b", "2"), ("a", "1")]));
        assert_eq!(two, "io.systemd.credential:a=1\0io.systemd.credential:b=2\0");
        assert!(oem_strings(&credentials(&[])).unwrap().is_none());
    }

    #[test]
    fn the_largest_credentials_fit_the_file_of_a_machine() {
        let names: Vec<String> = (10..10 + MAX_CREDENTIALS).map(|n| format!("c{n}")).collect();
        let value = "\n".repeat(MAX_CREDENTIAL_BYTES / MAX_CREDENTIALS - 3);
        let all: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), value.as_str())).collect();
        let size = strings(&credentials(&all)).len();
        assert!(size > MAX_CREDENTIAL_BYTES && size <= OEM_STRINGS_MAX, "{size}");
    }
}
