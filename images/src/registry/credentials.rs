//! What a client gives to authenticate at a registry.

use std::fmt;

use base64::Engine as _;

use crate::reference::same_registry;

/// Longest secret worth sending: bearer tokens are a few KiB.
const MAX_SECRET: usize = 64 * 1024;

/// Credentials for one registry, as CRI's AuthConfig has them. An empty string means absent. They are kept in memory
/// for one pull only and never shown in messages.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct Credentials {
    /// User name for Basic authentication and for token requests.
    pub username: String,
    /// Password that belongs to the user name.
    pub password: String,
    /// OAuth2 refresh token, exchanged for a bearer token at the registry's token service.
    pub identity_token: String,
    /// Bearer token sent to the registry as it is.
    pub registry_token: String,
    /// The registry the credentials are for (`https://index.docker.io/v1/`, `quay.io`); empty means the image's own.
    pub server_address: String,
}

/// Why credentials cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CredentialsError {
    /// `auth` is not the base64 form of `user:password`.
    #[error("the auth field is not base64 of user:password")]
    Auth,
    /// A secret is absurdly long or has control characters.
    #[error("{0} is longer than 64 KiB or has control characters")]
    Secret(&'static str),
}

impl Credentials {
    /// Credentials from the `auth` field of CRI and of Docker's config.json: base64 of `user:password`.
    pub fn from_auth(auth: &str) -> Result<Self, CredentialsError> {
        if auth.len() > MAX_SECRET {
            return Err(CredentialsError::Auth);
        }
        let bytes = base64::engine::general_purpose::STANDARD
            .decode(auth.trim())
            .map_err(|_| CredentialsError::Auth)?;
        let text = String::from_utf8(bytes).map_err(|_| CredentialsError::Auth)?;
        let (username, password) = text.split_once(':').ok_or(CredentialsError::Auth)?;
        Ok(Self {
            username: username.to_owned(),
            // Docker's own writer pads with NUL bytes.
            password: password.trim_end_matches('\0').to_owned(),
            ..Self::default()
        })
    }

    /// Whether nothing is given.
    pub fn is_empty(&self) -> bool {
        self.username.is_empty()
            && self.password.is_empty()
            && self.identity_token.is_empty()
            && self.registry_token.is_empty()
    }

    /// Refuses values that cannot stand in an HTTP header or a form.
    pub(crate) fn check(&self) -> Result<(), CredentialsError> {
        for (name, value) in [
            ("the user name", &self.username),
            ("the password", &self.password),
            ("the identity token", &self.identity_token),
            ("the registry token", &self.registry_token),
        ] {
            if value.len() > MAX_SECRET || value.chars().any(char::is_control) {
                return Err(CredentialsError::Secret(name));
            }
        }
        Ok(())
    }

    /// Whether these credentials name another registry than `host` (with port). An address that is not given fits all.
    pub(crate) fn are_for(&self, host: &str) -> Option<bool> {
        if self.server_address.is_empty() {
            return None;
        }
        let address = self.server_address.as_str();
        let rest = address.split_once("://").map_or(address, |(_, rest)| rest);
        let named = rest.split(['/', '?', '#']).next().unwrap_or_default();
        Some(same_registry(named, host))
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |value: &str| if value.is_empty() { "" } else { "[hidden]" };
        formatter
            .debug_struct("Credentials")
            .field("username", &self.username)
            .field("password", &shown(&self.password))
            .field("identity_token", &shown(&self.identity_token))
            .field("registry_token", &shown(&self.registry_token))
            .field("server_address", &self.server_address)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_auth_field_becomes_user_and_password() {
        let credentials = Credentials::from_auth("dXNlcjpwYTpzcw==").unwrap();
        assert_eq!((credentials.username.as_str(), credentials.password.as_str()), ("user", "pa:ss"));
        assert!(Credentials::from_auth("dXNlcg==").is_err());
        assert!(Credentials::from_auth("***").is_err());
    }

    #[test]
    fn secrets_are_not_shown() {
        let credentials = Credentials {
            username: "me".into(),
            password: "pw1".into(),
            identity_token: "id2".into(),
            registry_token: "rt3".into(),
            ..Credentials::default()
        };
        let shown = format!("{credentials:?}");
        assert!(shown.contains("me") && !["pw1", "id2", "rt3"].iter().any(|secret| shown.contains(secret)));
    }

    #[test]
    fn the_server_address_is_compared_by_host() {
        let at = |address: &str| Credentials { server_address: address.into(), ..Credentials::default() };
        assert_eq!(at("").are_for("quay.io"), None);
        assert_eq!(at("https://index.docker.io/v1/").are_for("docker.io"), Some(true));
        assert_eq!(at("quay.io").are_for("quay.io"), Some(true));
        assert_eq!(at("https://quay.io:443/v2").are_for("evil.io"), Some(false));
    }

    #[test]
    fn header_injection_is_refused() {
        let credentials = Credentials { registry_token: "a\r\nHost: b".into(), ..Credentials::default() };
        assert!(credentials.check().is_err());
    }
}
