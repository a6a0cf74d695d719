//! Which entry of an image index fits this machine (image-spec image-index.md, "platform").

use std::fmt;

/// A platform in Go's names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Platform {
    pub(crate) os: String,
    pub(crate) architecture: String,
    pub(crate) variant: String,
}

impl Platform {
    /// This machine's platform.
    pub(crate) fn host() -> Self {
        Self {
            os: "linux".to_owned(),
            architecture: go_architecture(std::env::consts::ARCH).to_owned(),
            variant: host_variant(),
        }
    }

    /// How well `offered` fits this machine: None if it does not run here, otherwise more is better.
    pub(crate) fn fit(&self, offered: &Platform) -> Option<u32> {
        if offered.os != self.os || go_architecture(&offered.architecture) != self.architecture {
            return None;
        }
        let level = variant_level(&self.architecture, &offered.variant)?;
        let own = variant_level(&self.architecture, &self.variant).unwrap_or(level);
        (level <= own).then_some(level)
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.os, self.architecture)?;
        if !self.variant.is_empty() {
            write!(formatter, "/{}", self.variant)?;
        }
        Ok(())
    }
}

/// Go's name of an architecture that goes by several.
fn go_architecture(name: &str) -> &str {
    match name {
        "x86_64" | "x86-64" => "amd64",
        "aarch64" => "arm64",
        "powerpc64" => "ppc64le",
        "loongarch64" => "loong64",
        other => other,
    }
}

/// Variants as ordered levels; a missing one is the architecture's baseline. None for an unknown variant.
fn variant_level(architecture: &str, variant: &str) -> Option<u32> {
    match (architecture, variant) {
        ("amd64", "" | "v1") => Some(1),
        ("amd64", "v2") => Some(2),
        ("amd64", "v3") => Some(3),
        ("amd64", "v4") => Some(4),
        ("arm64", "" | "8" | "v8") => Some(1),
        ("amd64" | "arm64", _) => None,
        (_, "") => Some(1),
        _ => None,
    }
}

#[cfg(target_arch = "x86_64")]
fn host_variant() -> String {
    // System V ABI, "Micro-Architecture Levels".
    macro_rules! has {
        ($($feature:tt),*) => { true $(&& std::arch::is_x86_feature_detected!($feature))* };
    }
    let v2 = has!("cmpxchg16b", "popcnt", "sse3", "sse4.1", "sse4.2", "ssse3");
    let v3 = v2 && has!("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "lzcnt", "movbe");
    let v4 = v3 && has!("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl");
    match (v4, v3, v2) {
        (true, ..) => "v4",
        (_, true, _) => "v3",
        (_, _, true) => "v2",
        _ => "v1",
    }
    .to_owned()
}

#[cfg(not(target_arch = "x86_64"))]
fn host_variant() -> String {
    String::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn platform(text: &str) -> Platform {
        let mut parts = text.split('/').map(str::to_owned);
        Platform {
            os: parts.next().unwrap(),
            architecture: parts.next().unwrap(),
            variant: parts.next().unwrap_or_default(),
        }
    }

    #[test]
    fn the_best_variant_that_runs_here_fits_best() {
        let host = platform("linux/amd64/v3");
        let fit = |text: &str| host.fit(&platform(text));
        assert_eq!(fit("linux/amd64"), fit("linux/amd64/v1"));
        assert!(fit("linux/amd64/v3") > fit("linux/amd64/v2") && fit("linux/amd64/v2") > fit("linux/amd64"));
        assert_eq!(fit("linux/x86_64"), fit("linux/amd64"));
        for other in ["linux/amd64/v4", "linux/amd64/v9", "linux/arm64", "windows/amd64", "unknown/unknown"] {
            assert_eq!(fit(other), None, "{other}");
        }
    }

    #[test]
    fn the_host_runs_its_own_baseline() {
        let host = Platform::host();
        assert!(host.fit(&Platform { variant: String::new(), ..host.clone() }).is_some());
        assert!(host.fit(&host).is_some());
    }
}
