//! PullImage.

use hull_images::{Credentials, Reference};

use crate::api::runtime::{AuthConfig, PullImageRequest};
use crate::runtime::{Error, Result, Runtime};

impl Runtime {
    /// Pulls an image and returns its id. Giving up the call gives up the pull, unless others wait for it too; nothing
    /// half done stays behind.
    pub async fn pull_image(&self, request: PullImageRequest) -> Result<String> {
        let name = request.image.map(|spec| spec.image).unwrap_or_default();
        let (reference, credentials) = wanted(&name, request.auth)?;
        self.accept_for_pull(&reference)?;
        let image = self.images().pull(&reference, credentials, None).await?;
        tracing::info!(image = %reference, id = image.id, "pulled");
        Ok(image.id)
    }
}

/// What is to be pulled, and with whose rights.
pub(super) fn wanted(name: &str, auth: Option<AuthConfig>) -> Result<(Reference, Option<Credentials>)> {
    let reference = name.parse::<Reference>().map_err(|error| Error::Invalid(error.to_string()))?;
    Ok((reference, auth.map(credentials).transpose()?.flatten()))
}

/// What CRI's form of credentials says; None if it says nothing.
pub(super) fn credentials(auth: AuthConfig) -> Result<Option<Credentials>> {
    let mut credentials = if auth.username.is_empty() && auth.password.is_empty() && !auth.auth.is_empty() {
        Credentials::from_auth(&auth.auth).map_err(|error| Error::Invalid(error.to_string()))?
    } else {
        Credentials { username: auth.username, password: auth.password, ..Credentials::default() }
    };
    credentials.identity_token = auth.identity_token;
    credentials.registry_token = auth.registry_token;
    credentials.server_address = auth.server_address;
    Ok(if credentials.is_empty() { None } else { Some(credentials) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_come_in_each_of_cris_forms() {
        let of = |auth: AuthConfig| credentials(auth).unwrap();
        assert!(of(AuthConfig::default()).is_none());
        let plain = AuthConfig { username: "a".into(), password: "b".into(), ..Default::default() };
        assert_eq!(of(plain).unwrap().password, "b");
        let packed =
            AuthConfig { auth: "YTpi".into(), server_address: "quay.io".into(), ..Default::default() };
        let unpacked = of(packed).unwrap();
        assert_eq!((unpacked.username.as_str(), unpacked.server_address.as_str()), ("a", "quay.io"));
        let token = AuthConfig { registry_token: "t".into(), ..Default::default() };
        assert_eq!(of(token).unwrap().registry_token, "t");
        assert!(credentials(AuthConfig { auth: "%".into(), ..Default::default() }).is_err());
    }

    #[test]
    fn what_is_no_reference_is_refused() {
        for name in ["", "UPPER", "a b", "http://x/y"] {
            assert!(matches!(wanted(name, None), Err(Error::Invalid(_))), "{name}");
        }
    }
}
