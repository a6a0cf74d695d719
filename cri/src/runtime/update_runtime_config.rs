//! UpdateRuntimeConfig: kubelet tells the node's pod ranges.

use ipnet::IpNet;

use super::{Error, Result, Runtime};
use crate::api::runtime::UpdateRuntimeConfigRequest;

impl Runtime {
    /// Gives the ranges to the network. A request without any changes nothing.
    pub async fn update_runtime_config(&self, request: &UpdateRuntimeConfigRequest) -> Result<()> {
        let text = request
            .runtime_config
            .as_ref()
            .and_then(|config| config.network_config.as_ref())
            .map_or("", |network| network.pod_cidr.as_str());
        let ranges = parse(text)?;
        if !ranges.is_empty() {
            self.network.set_pod_cidrs(&ranges).await?;
        }
        Ok(())
    }
}

/// kubelet separates the ranges of a dual-stack node by commas.
fn parse(text: &str) -> Result<Vec<IpNet>> {
    let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
    parts
        .map(|part| part.parse().map_err(|_| Error::Invalid(format!("{part:?} is not a range of addresses"))))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_come_separated_by_commas() {
        assert_eq!(parse("10.1.0.0/24, fd00::/64").unwrap().len(), 2);
        assert!(parse("").unwrap().is_empty());
        assert!(parse("10.1.0.0").is_err());
    }
}
