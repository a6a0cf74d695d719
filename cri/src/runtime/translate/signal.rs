//! The signal that asks a container to end: CRI's choice, or the image's STOPSIGNAL, or SIGTERM.

use super::invalid;
use crate::api::runtime::Signal;
use crate::runtime::Error;

const SIGTERM: u32 = 15;
/// SIGRTMIN and SIGRTMAX as programs see them (signal(7): glibc keeps 32 and 33 for itself).
const RTMIN: u32 = 34;
const RTMAX: u32 = 64;

/// Numbers on every architecture that hull runs on (signal(7), "x86/ARM").
const NAMES: [(&str, u32); 36] = [
    ("ABRT", 6),
    ("ALRM", 14),
    ("BUS", 7),
    ("CHLD", 17),
    ("CLD", 17),
    ("CONT", 18),
    ("FPE", 8),
    ("HUP", 1),
    ("ILL", 4),
    ("INT", 2),
    ("IO", 29),
    ("IOT", 6),
    ("KILL", 9),
    ("PIPE", 13),
    ("POLL", 29),
    ("PROF", 27),
    ("PWR", 30),
    ("QUIT", 3),
    ("SEGV", 11),
    ("STKFLT", 16),
    ("STOP", 19),
    ("SYS", 31),
    ("TERM", SIGTERM),
    ("TRAP", 5),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("USR1", 10),
    ("USR2", 12),
    ("VTALRM", 26),
    ("WINCH", 28),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("RTMIN", RTMIN),
    ("RTMAX", RTMAX),
];

/// The number of the signal that stops the container.
pub fn stop_signal(asked: Signal, image: &str) -> Result<u32, Error> {
    if asked != Signal::RuntimeDefault {
        // SIGNAL_SIGRTMINPLUS3
        let name = asked.as_str_name().trim_start_matches("SIGNAL_");
        let name = name.replace("PLUS", "+").replace("MINUS", "-");
        return parse(&name);
    }
    if image.is_empty() { Ok(SIGTERM) } else { parse(image) }
}

/// The same as CRI shows it in ContainerStatus.
pub fn effective(asked: Signal, image: &str) -> Signal {
    if asked != Signal::RuntimeDefault {
        return asked;
    }
    let Ok(number) = stop_signal(asked, image) else { return Signal::Sigterm };
    let all = (1..=65).filter_map(|value| Signal::try_from(value).ok());
    let mut same = all.filter(|signal| stop_signal(*signal, "").is_ok_and(|found| found == number));
    same.next().unwrap_or(Signal::Sigterm)
}

/// `SIGTERM`, `TERM`, `15`, `SIGRTMIN+3`.
pub fn parse(text: &str) -> Result<u32, Error> {
    let unknown = || invalid(format!("{text:?} is not a signal"));
    if let Ok(number) = text.parse::<u32>() {
        return if (1..=RTMAX).contains(&number) { Ok(number) } else { Err(unknown()) };
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let (name, offset) = match name.find(['+', '-']) {
        Some(at) => {
            let offset: u32 = name[at + 1..].parse().map_err(|_| unknown())?;
            (&name[..at], Some((name.as_bytes()[at], offset)))
        }
        None => (name, None),
    };
    let (_, number) = NAMES.iter().find(|(known, _)| *known == name).ok_or_else(unknown)?;
    let number = match (name, offset) {
        (_, None) => Some(*number),
        ("RTMIN", Some((b'+', offset))) => number.checked_add(offset),
        ("RTMAX", Some((b'-', offset))) => number.checked_sub(offset),
        _ => None,
    };
    number.filter(|number| (1..=RTMAX).contains(number)).ok_or_else(unknown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_read_in_every_spelling() {
        for (text, number) in [
            ("SIGTERM", 15),
            ("term", 15),
            ("9", 9),
            ("SIGRTMIN+3", 37),
            ("RTMAX-1", 63),
            ("SIGRTMIN", 34),
            ("sigquit", 3),
        ] {
            assert_eq!(parse(text).unwrap(), number, "{text}");
        }
        for text in ["", "SIG", "0", "65", "-1", "SIGTERM+1", "SIGRTMIN+99", "RTMAX-99", "TERM;reboot"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn every_signal_of_cri_has_a_number() {
        for value in 1..=65 {
            let signal = Signal::try_from(value).unwrap();
            assert!(stop_signal(signal, "").is_ok(), "{signal:?}");
        }
        assert_eq!(stop_signal(Signal::Sigrtminplus3, "").unwrap(), 37);
        assert_eq!(stop_signal(Signal::Sigrtmaxminus14, "").unwrap(), 50);
    }

    #[test]
    fn cri_wins_over_the_image_and_term_is_the_default() {
        assert_eq!(stop_signal(Signal::Sigint, "SIGQUIT").unwrap(), 2);
        assert_eq!(stop_signal(Signal::RuntimeDefault, "SIGQUIT").unwrap(), 3);
        assert_eq!(stop_signal(Signal::RuntimeDefault, "").unwrap(), 15);
        assert_eq!(effective(Signal::RuntimeDefault, "SIGRTMIN+3"), Signal::Sigrtminplus3);
        assert_eq!(effective(Signal::RuntimeDefault, ""), Signal::Sigterm);
    }
}
