use std::collections::BTreeMap;

use crate::Bandwidth;

const INGRESS: &str = "kubernetes.io/ingress-bandwidth";
const EGRESS: &str = "kubernetes.io/egress-bandwidth";
/// Kubernetes allows rates between 1k and 1P (pkg/util/bandwidth).
const LEAST: u64 = 1_000;
const MOST: u64 = 1_000_000_000_000_000;
/// Kubernetes has no annotation for the burst; what its runtimes give to CNI.
const BURST: u64 = u32::MAX as u64;

impl Bandwidth {
    /// Reads `kubernetes.io/ingress-bandwidth` and `kubernetes.io/egress-bandwidth`: quantities such as `10M` in bits
    /// per second, between 1k and 1P. `None` if neither is there; the error is a sentence.
    pub fn from_annotations(annotations: &BTreeMap<String, String>) -> Result<Option<Self>, String> {
        let rate = |name: &str| match annotations.get(name) {
            None => Ok(0),
            Some(text) => match quantity(text) {
                Some(rate) if (LEAST..=MOST).contains(&rate) => Ok(rate),
                _ => Err(format!(
                    "annotation {name}: {text:?} is not a rate between 1k and 1P bits per second"
                )),
            },
        };
        let (ingress_rate, egress_rate) = (rate(INGRESS)?, rate(EGRESS)?);
        let burst = |rate| if rate == 0 { 0 } else { BURST };
        Ok((ingress_rate != 0 || egress_rate != 0).then(|| Self {
            ingress_rate,
            ingress_burst: burst(ingress_rate),
            egress_rate,
            egress_burst: burst(egress_rate),
        }))
    }
}

/// A non-negative Kubernetes quantity, rounded up to a whole number; `None` if it is none or too large.
fn quantity(text: &str) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let scale: f64 = match suffix {
        "" => 1.0,
        "k" => 1e3,
        "M" => 1e6,
        "G" => 1e9,
        "T" => 1e12,
        "P" => 1e15,
        "Ki" => 1024.0,
        "Mi" => 1024f64.powi(2),
        "Gi" => 1024f64.powi(3),
        "Ti" => 1024f64.powi(4),
        exponent => 10f64.powi(exponent.strip_prefix(['e', 'E'])?.parse().ok()?),
    };
    let value = (number.parse::<f64>().ok()? * scale).ceil();
    (value <= MOST as f64).then_some(value as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(value: &str) -> Result<Option<Bandwidth>, String> {
        Bandwidth::from_annotations(&BTreeMap::from([(INGRESS.to_owned(), value.to_owned())]))
    }

    #[test]
    fn rates_are_kubernetes_quantities() {
        for (text, rate) in [("10M", 10_000_000), ("1.5G", 1_500_000_000), ("8Ki", 8192), ("5e3", 5000)] {
            let bandwidth = parse(text).unwrap().unwrap();
            assert_eq!((bandwidth.ingress_rate, bandwidth.egress_rate), (rate, 0), "{text}");
            assert_eq!((bandwidth.ingress_burst, bandwidth.egress_burst), (BURST, 0));
        }
        assert_eq!(Bandwidth::from_annotations(&BTreeMap::new()), Ok(None));
    }

    #[test]
    fn a_rate_that_is_none_is_an_error() {
        for text in ["", "-1M", "0", "10", "2P", "1e99", "10X", "1.2.3M", "e3", "NaN", "1e"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
