//! What people call a pod, a container or an image: an id, its beginning, or a name.

use super::client::{Client, answer};
use super::error::CliError;
use super::output::short_id;
use crate::api::runtime::{
    Container, Image, ImageSpec, ImageStatusRequest, ListContainersRequest, ListPodSandboxRequest, PodSandbox,
};

const CONTAINER_HINT: &str = "`hull ps -a` lists containers.";
const POD_HINT: &str = "`hull pods` lists pods.";
const IMAGE_HINT: &str = "`hull images` lists images, `hull pull` fetches one.";

/// All containers.
pub(super) async fn containers(client: &mut Client) -> Result<Vec<Container>, CliError> {
    let patience = client.patience();
    let list = client.runtime.list_containers(ListContainersRequest::default());
    Ok(answer("list containers", patience, list).await?.containers)
}

/// All pods.
pub(super) async fn pods(client: &mut Client) -> Result<Vec<PodSandbox>, CliError> {
    let patience = client.patience();
    let list = client.runtime.list_pod_sandbox(ListPodSandboxRequest::default());
    Ok(answer("list pods", patience, list).await?.items)
}

/// The one container that `name` means.
pub(super) async fn container(client: &mut Client, name: &str) -> Result<Container, CliError> {
    let all = containers(client).await?;
    choose("container", CONTAINER_HINT, name, all, |container| (&container.id, container_name(container)))
}

/// The one pod that `name` means.
pub(super) async fn pod(client: &mut Client, name: &str) -> Result<PodSandbox, CliError> {
    let all = pods(client).await?;
    choose("pod", POD_HINT, name, all, |pod| (&pod.id, pod_name(pod)))
}

/// The image that `name` means, by reference or id; `None` if it is not here.
pub(super) async fn image_if_here(client: &mut Client, name: &str) -> Result<Option<Image>, CliError> {
    let patience = client.patience();
    let image = Some(ImageSpec { image: name.into(), ..Default::default() });
    let status = client.image.image_status(ImageStatusRequest { image, verbose: false });
    Ok(answer(format!("look for the image {name}"), patience, status).await?.image)
}

/// Like [`image_if_here`], with an error where it is not.
pub(super) async fn image(client: &mut Client, name: &str) -> Result<Image, CliError> {
    let found = image_if_here(client, name).await?;
    found.ok_or_else(|| CliError::NotFound { kind: "image", name: name.into(), hint: IMAGE_HINT })
}

/// Name of a container as its pod knows it.
pub(super) fn container_name(container: &Container) -> &str {
    container.metadata.as_ref().map_or("", |metadata| &metadata.name)
}

/// Name of a pod within its namespace.
pub(super) fn pod_name(pod: &PodSandbox) -> &str {
    pod.metadata.as_ref().map_or("", |metadata| &metadata.name)
}

/// An exact id wins over a name, a name over the beginning of an id.
fn choose<T>(
    kind: &'static str,
    hint: &'static str,
    name: &str,
    all: Vec<T>,
    called: impl Fn(&T) -> (&String, &str),
) -> Result<T, CliError> {
    let not_found = || CliError::NotFound { kind, name: name.into(), hint };
    if name.is_empty() {
        return Err(not_found());
    }
    let rank = |item: &T| match called(item) {
        (id, _) if id == name => 0,
        (_, own) if own == name => 1,
        (id, _) if id.starts_with(name) => 2,
        _ => 3,
    };
    let best = all.iter().map(&rank).min().filter(|best| *best < 3).ok_or_else(not_found)?;
    let mut matching: Vec<T> = all.into_iter().filter(|item| rank(item) == best).collect();
    match (matching.pop(), matching.is_empty()) {
        (Some(only), true) => Ok(only),
        (last, _) => {
            matching.extend(last);
            let line = |item: &T| format!("  {}  {}", short_id(called(item).0), called(item).1);
            let candidates = matching.iter().map(line).collect::<Vec<_>>().join("\n");
            Err(CliError::Ambiguous { kind, name: name.into(), candidates })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(name: &str) -> Result<String, String> {
        let all = vec![("aa11".to_owned(), "web"), ("aa22".to_owned(), "aa1"), ("bb33".to_owned(), "web")];
        let found = choose("container", CONTAINER_HINT, name, all, |(id, name)| (id, name));
        found.map(|(id, _)| id).map_err(|error| error.to_string())
    }

    #[test]
    fn an_id_a_name_or_the_beginning_of_an_id_will_do() {
        assert_eq!(find("aa11").unwrap(), "aa11");
        assert_eq!(find("bb").unwrap(), "bb33");
        assert_eq!(find("aa1").unwrap(), "aa22", "a name wins over the beginning of an id");
    }

    #[test]
    fn what_is_ambiguous_or_missing_is_said_with_a_way_on() {
        let error = find("aa").unwrap_err();
        assert!(error.contains("could be any of these containers") && error.contains("aa22"), "{error}");
        assert!(find("web").unwrap_err().contains("bb33"));
        assert!(find("zz").unwrap_err().contains("`hull ps -a` lists containers"));
        assert!(find("").is_err());
    }
}
