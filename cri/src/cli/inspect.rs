//! `hull inspect`

use std::collections::BTreeMap;

use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::client::{Client, answer};
use super::error::CliError;
use super::find;
use super::output::print_json;
use crate::api::runtime::{ContainerStatusRequest, ImageSpec, ImageStatusRequest, PodSandboxStatusRequest};

/// Print everything known of containers, pods or images as JSON
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hull inspect web
  hull inspect --type image busybox
  hull inspect web | jq .status.exitCode")]
pub(super) struct Inspect {
    /// Look only among these
    #[arg(long, value_name = "KIND")]
    r#type: Option<Kind>,

    /// Ids, beginnings of ids, or names
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    Container,
    Pod,
    Image,
}

impl Inspect {
    pub(super) async fn run(self, client: &mut Client) -> Result<(), CliError> {
        let mut found = Vec::new();
        for name in &self.names {
            found.push(self.one(client, name).await?);
        }
        // One name, one object; several make a list.
        match found.as_slice() {
            [only] => print_json(only),
            all => print_json(&all),
        }
    }

    async fn one(&self, client: &mut Client, name: &str) -> Result<Value, CliError> {
        let kinds = match self.r#type {
            Some(kind) => vec![kind],
            None => vec![Kind::Container, Kind::Pod, Kind::Image],
        };
        for kind in kinds {
            let result = match kind {
                Kind::Container => container(client, name).await,
                Kind::Pod => pod(client, name).await,
                Kind::Image => image(client, name).await,
            };
            match result {
                Err(CliError::NotFound { .. }) => {}
                result => return result,
            }
        }
        let kind = self.r#type.map_or("container, pod or image", |kind| match kind {
            Kind::Container => "container",
            Kind::Pod => "pod",
            Kind::Image => "image",
        });
        let hint = "`hull ps -a`, `hull pods` and `hull images` list what there is.";
        Err(CliError::NotFound { kind, name: name.into(), hint })
    }
}

async fn container(client: &mut Client, name: &str) -> Result<Value, CliError> {
    let container_id = find::container(client, name).await?.id;
    let patience = client.patience();
    let status = client.runtime.container_status(ContainerStatusRequest { container_id, verbose: true });
    let answer = answer(format!("inspect the container {name}"), patience, status).await?;
    Ok(json!({ "status": answer.status, "info": parsed(answer.info) }))
}

async fn pod(client: &mut Client, name: &str) -> Result<Value, CliError> {
    let pod_sandbox_id = find::pod(client, name).await?.id;
    let patience = client.patience();
    let status = client.runtime.pod_sandbox_status(PodSandboxStatusRequest { pod_sandbox_id, verbose: true });
    let answer = answer(format!("inspect the pod {name}"), patience, status).await?;
    Ok(json!({ "status": answer.status, "info": parsed(answer.info) }))
}

async fn image(client: &mut Client, name: &str) -> Result<Value, CliError> {
    find::image(client, name).await?;
    let patience = client.patience();
    let image = Some(ImageSpec { image: name.into(), ..Default::default() });
    let status = client.image.image_status(ImageStatusRequest { image, verbose: true });
    let answer = answer(format!("inspect the image {name}"), patience, status).await?;
    Ok(json!({ "status": answer.image, "info": parsed(answer.info) }))
}

/// Verbose information is text that is usually JSON itself; then it is shown as such.
fn parsed(info: BTreeMap<String, String>) -> Value {
    info.into_iter()
        .map(|(key, text)| (key, serde_json::from_str(&text).unwrap_or(Value::String(text))))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_within_verbose_information_is_unfolded() {
        let info = BTreeMap::from([("a".into(), "{\"pid\": 7}".into()), ("b".into(), "not { json".into())]);
        assert_eq!(parsed(info), json!({ "a": { "pid": 7 }, "b": "not { json" }));
    }
}
