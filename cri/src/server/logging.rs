//! Log lines on standard error, as text or JSON.

use std::io::{self, IsTerminal};

use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, fmt};

use crate::config::{LogConfig, LogFormat};

/// What every target of hull's own crates begins with.
const OWN: &str = "hull";

/// Starts logging for the whole process; only the first call has an effect.
pub fn start(config: &LogConfig) {
    let lines = fmt::layer().with_writer(io::stderr);
    let lines = match config.format {
        LogFormat::Text => lines.with_ansi(io::stderr().is_terminal()).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    let started = tracing_subscriber::registry().with(lines.with_filter(filter(&config.level))).try_init();
    if started.is_err() {
        tracing::debug!("logging was started before");
    }
}

/// A bare level is that of hull; libraries below stay at `info` or less unless they are named.
fn filter(levels: &str) -> Targets {
    let mut targets = Targets::new();
    for directive in levels.split(',') {
        let (target, level) = directive.split_once('=').unwrap_or(("", directive));
        // Levels have been checked with the configuration.
        let level: LevelFilter = level.parse().unwrap_or(LevelFilter::INFO);
        targets = match target {
            "" => targets.with_default(level.min(LevelFilter::INFO)).with_target(OWN, level),
            target => targets.with_target(target, level),
        };
    }
    targets
}

#[cfg(test)]
mod tests {
    use super::*;
    use tracing::Level;

    #[test]
    fn a_bare_level_is_hulls_and_a_named_module_has_its_own() {
        let targets = filter("debug,hull_network=trace,h2=error");
        for (target, level, wanted) in [
            ("hull_cri::server", Level::DEBUG, true),
            ("hull_cri::server", Level::TRACE, false),
            ("hull_network::bridge", Level::TRACE, true),
            ("h2", Level::INFO, false),
            ("hyper", Level::INFO, true),
            ("hyper", Level::DEBUG, false),
        ] {
            assert_eq!(targets.would_enable(target, &level), wanted, "{target} {level}");
        }
        assert!(!filter("error").would_enable("hyper", &Level::INFO));
    }
}
