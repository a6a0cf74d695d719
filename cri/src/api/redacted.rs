//! Secrets stay out of logs.

use std::fmt;

use super::runtime::AuthConfig;

impl fmt::Debug for AuthConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |secret: &str| if secret.is_empty() { "" } else { "[redacted]" };
        f.debug_struct("AuthConfig")
            .field("username", &self.username)
            .field("password", &shown(&self.password))
            .field("auth", &shown(&self.auth))
            .field("server_address", &self.server_address)
            .field("identity_token", &shown(&self.identity_token))
            .field("registry_token", &shown(&self.registry_token))
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use crate::api::runtime::{AuthConfig, PullImageRequest};

    #[test]
    fn a_request_printed_for_debugging_shows_no_secret() {
        let auth = AuthConfig {
            username: "anna".into(),
            password: "s3cret".into(),
            auth: "YW5uYTpzM2NyZXQ=".into(),
            identity_token: "token-1".into(),
            registry_token: "token-2".into(),
            ..Default::default()
        };
        let printed = format!("{:?}", PullImageRequest { auth: Some(auth), ..Default::default() });
        assert!(printed.contains("anna"));
        for secret in ["s3cret", "YW5u", "token-1", "token-2"] {
            assert!(!printed.contains(secret), "{printed}");
        }
    }
}
