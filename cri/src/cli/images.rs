//! `hull images`

use clap::Args;

use super::client::{Client, answer};
use super::error::CliError;
use super::output::{Format, Table, print, print_json, short_id, size};
use crate::api::runtime::{ImageFilter, ImageSpec, ListImagesRequest};

/// List images
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hull images
  hull images --digests busybox
  hull -o json images | jq '.[] | {id, size}'")]
pub(super) struct Images {
    /// Only this image
    image: Option<String>,

    /// Only ids, one a line
    #[arg(short, long)]
    quiet: bool,

    /// A column with digests
    #[arg(long)]
    digests: bool,
}

impl Images {
    pub(super) async fn run(self, client: &mut Client, format: Format) -> Result<(), CliError> {
        let patience = client.patience();
        let filter =
            self.image.map(|image| ImageFilter { image: Some(ImageSpec { image, ..Default::default() }) });
        let list = client.image.list_images(ListImagesRequest { filter });
        let images = answer("list images", patience, list).await?.images;
        if self.quiet {
            return print(&images.iter().map(|image| format!("{}\n", image.id)).collect::<String>());
        }
        if format == Format::Json {
            return print_json(&images);
        }
        let mut table =
            Table::new(&["REPOSITORY", "TAG", "IMAGE ID", "SIZE", if self.digests { "DIGEST" } else { "" }]);
        for image in &images {
            let digest = image.repo_digests.first().and_then(|name| name.split_once('@'));
            for (repository, tag) in names(&image.repo_tags, digest.map(|(repository, _)| repository)) {
                let shown = digest.filter(|_| self.digests).map_or("", |(_, digest)| digest);
                table.row([repository, tag, short_id(&image.id).into(), size(image.size), shown.into()]);
            }
        }
        table.print()
    }
}

/// Repository and tag of each name; an image without a tag has one line all the same.
fn names(tags: &[String], repository: Option<&str>) -> Vec<(String, String)> {
    let split = |name: &String| match name.rsplit_once(':') {
        Some((repository, tag)) if !tag.contains('/') => (repository.to_owned(), tag.to_owned()),
        _ => (name.clone(), "<none>".into()),
    };
    match tags {
        [] => vec![(repository.unwrap_or("<none>").into(), "<none>".into())],
        tags => tags.iter().map(split).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_no_tag() {
        let tags = ["127.0.0.1:5000/team/app:1.2".to_owned(), "docker.io/library/busybox:latest".to_owned()];
        let split = names(&tags, None);
        assert_eq!(split[0], ("127.0.0.1:5000/team/app".into(), "1.2".into()));
        assert_eq!(split[1], ("docker.io/library/busybox".into(), "latest".into()));
        assert_eq!(names(&[], Some("quay.io/a")), [("quay.io/a".into(), "<none>".into())]);
    }
}
