//! `hull pull`

use clap::Args;
use tonic::{Code, Status};

use super::client::{Client, answer};
use super::error::CliError;
use super::login;
use super::output::{Format, print, print_json};
use super::progress::Progress;
use crate::api::hull::{PullRequest, pull_progress};
use crate::api::runtime::{AuthConfig, ImageSpec, PullImageRequest};

/// Fetch an image from its registry
///
/// Names are completed as usual: busybox is docker.io/library/busybox:latest. Mirrors, certificates and plain-HTTP
/// registries are configured in /etc/hull/certs.d. Without --creds or --auth, what `docker login` and `podman login` have
/// saved counts: $REGISTRY_AUTH_FILE or $DOCKER_CONFIG/config.json if set, else podman's own file and ~/.docker/config.json,
/// credential helpers included.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hull pull busybox
  hull pull registry.example:5000/team/app@sha256:…
  hull pull --creds user:password ghcr.io/team/app:1.2
  id=$(hull pull -q busybox)")]
pub(super) struct Pull {
    #[command(flatten)]
    credentials: Credentials,

    /// No progress, only the image's id
    #[arg(short, long)]
    quiet: bool,

    /// The image, e.g. busybox, quay.io/team/app:1.2, registry:5000/app@sha256:…
    image: String,
}

/// How to log in to the registry
#[derive(Clone, Debug, Default, Args)]
pub(super) struct Credentials {
    /// User and password for the registry
    #[arg(long, value_name = "USER:PASSWORD", conflicts_with = "auth")]
    creds: Option<String>,

    /// The same in base64, as in a docker configuration file
    #[arg(long, value_name = "BASE64", env = "HULL_REGISTRY_AUTH", hide_env_values = true)]
    auth: Option<String>,
}

impl Credentials {
    /// With user and password, if given.
    pub(super) fn of(creds: Option<String>) -> Self {
        Credentials { creds, auth: None }
    }

    /// What the flags say, else what was saved for the registry of `image`.
    pub(super) async fn config(&self, image: &str) -> Result<Option<AuthConfig>, CliError> {
        if let Some(creds) = &self.creds {
            let (username, password) = creds.split_once(':').ok_or_else(|| {
                CliError::Refused("--creds wants USER:PASSWORD, with a colon between them".into())
            })?;
            let (username, password) = (username.into(), password.into());
            return Ok(Some(AuthConfig { username, password, ..Default::default() }));
        }
        match &self.auth {
            Some(auth) => Ok(Some(AuthConfig { auth: auth.clone(), ..Default::default() })),
            None => login::saved(image).await,
        }
    }
}

impl Pull {
    pub(super) async fn run(self, client: &mut Client, format: Format) -> Result<(), CliError> {
        let id = pull(client, &self.image, &self.credentials, self.quiet).await?;
        match format {
            Format::Table => print(&format!("{id}\n")),
            Format::Json => print_json(&serde_json::json!({ "image": self.image, "id": id })),
        }
    }
}

/// Pulls an image with progress on standard error, and returns its id.
pub(super) async fn pull(
    client: &mut Client,
    image: &str,
    credentials: &Credentials,
    quiet: bool,
) -> Result<String, CliError> {
    let doing = || format!("pull {image}");
    let failed = |status: Status| hinted(CliError::Call { doing: doing(), status: Box::new(status) });
    let auth = credentials.config(image).await?;
    let patience = client.endless();
    let request = PullRequest { image: image.into(), auth: auth.clone() };
    let mut events = match answer(doing(), patience, client.hull.pull(request)).await {
        // Another runtime than hulld: CRI knows no progress.
        Err(CliError::Call { status, .. }) if status.code() == Code::Unimplemented => {
            let image = Some(ImageSpec { image: image.into(), ..Default::default() });
            let call = client.image.pull_image(PullImageRequest { image, auth, sandbox_config: None });
            return Ok(answer(doing(), patience, call).await.map_err(hinted)?.image_ref);
        }
        events => events.map_err(hinted)?,
    };
    let mut progress = Progress::new(image, quiet);
    while let Some(event) = events.message().await.map_err(failed)? {
        let Some(event) = event.event else { continue };
        if let pull_progress::Event::Done(done) = event {
            progress.finish(&done);
            return Ok(done.image_id);
        }
        progress.show(event);
    }
    Err(failed(Status::unavailable("it ended before the image was complete")))
}

/// What to do about a pull that failed.
fn hinted(error: CliError) -> CliError {
    error
        .hint(Code::NotFound, "Are the name and the tag right? Names without a registry mean docker.io.")
        .hint(
            Code::Unauthenticated,
            "Is it private, or misspelt? --creds USER:PASSWORD logs in; registries tell the two apart only then.",
        )
        .hint(
            Code::Unavailable,
            "Mirrors, certificates and plain HTTP are configured per registry in /etc/hull/certs.d.",
        )
        .hint(Code::ResourceExhausted, "`hull rmi` makes room.")
}
