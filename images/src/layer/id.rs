use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// A layer's diffID: `sha256:` and 64 lower-case hex digits over the uncompressed archive.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LayerId(String);

/// A string that is no diffID.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not a layer's diffID (\"sha256:\" and 64 lower-case hex digits)")]
pub struct InvalidLayerId(String);

impl LayerId {
    /// The whole id, as in the image configuration.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The 64 hex digits: safe as a file name.
    pub fn hex(&self) -> &str {
        &self.0["sha256:".len()..]
    }

    pub(super) fn of(hash: Sha256) -> Self {
        Self(format!("sha256:{}", hex::encode(hash.finalize())))
    }
}

impl FromStr for LayerId {
    type Err = InvalidLayerId;

    fn from_str(text: &str) -> Result<Self, InvalidLayerId> {
        let valid = text.strip_prefix("sha256:").is_some_and(|hex| {
            hex.len() == 64 && hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
        });
        if valid { Ok(Self(text.to_owned())) } else { Err(InvalidLayerId(text.chars().take(100).collect())) }
    }
}

impl TryFrom<String> for LayerId {
    type Error = InvalidLayerId;

    fn try_from(text: String) -> Result<Self, InvalidLayerId> {
        text.parse()
    }
}

impl From<LayerId> for String {
    fn from(id: LayerId) -> Self {
        id.0
    }
}

impl fmt::Display for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_full_lower_case_sha256_is_a_layer_id() {
        let good = format!("sha256:{}", "0123456789abcdef".repeat(4));
        assert_eq!(good.parse::<LayerId>().unwrap().hex().len(), 64);
        let escape = format!("sha256:{}", "../".repeat(22));
        for bad in ["", "sha256:", "sha512:00", &good[..70], &good.to_uppercase(), &escape] {
            assert!(bad.parse::<LayerId>().is_err(), "{bad}");
        }
    }
}
