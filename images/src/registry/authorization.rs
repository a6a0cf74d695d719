//! Authentication at one host: from a challenge to the `Authorization` header of the next request.

use std::time::Duration;

use base64::Engine as _;
use reqwest::header::HeaderValue;
use serde::Deserialize;
use url::Url;

use super::challenge::Challenge;
use super::credentials::Credentials;
use super::error::RegistryError;
use super::pace::Pace;
use super::text::{error_detail, read_bounded, reasons};

/// Largest answer of a token service.
const MAX_TOKEN_ANSWER: u64 = 1 << 20;
/// Longest token; it must fit in a header.
const MAX_TOKEN: usize = 64 * 1024;
/// A token service answers at once or not at all.
const TOKEN_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
}

/// The header that meets the first of `challenges` that can be met. `host` names the registry in messages, `secure`
/// says that it was reached over HTTPS, `scope` is asked for when the challenge names none.
pub(super) async fn answer(
    client: &reqwest::Client,
    host: &str,
    secure: bool,
    scope: &str,
    credentials: Option<&Credentials>,
    challenges: &[Challenge],
) -> Result<HeaderValue, RegistryError> {
    let unauthorized =
        |reason: &str| RegistryError::Unauthorized { host: host.to_owned(), reason: reason.to_owned() };
    if let Some(Challenge::Bearer { realm, service, scope: asked, error }) =
        challenges.iter().find(|challenge| matches!(challenge, Challenge::Bearer { .. }))
    {
        // A challenge knows of the one request; a push needs the rights of all that follow.
        let scope = if asked.is_empty() || is_for_push(scope) { scope } else { asked };
        let realm = realm_url(realm, secure).map_err(|reason| unauthorized(&reason))?;
        tracing::debug!(host, %realm, service, scope, error, "asking for a token");
        let token = fetch_token(client, host, realm, service, scope, credentials).await?;
        return header("Bearer ", &token)
            .ok_or_else(|| unauthorized("the token service sent an unusable token"));
    }
    if challenges.contains(&Challenge::Basic) {
        let credentials = credentials.filter(|credentials| !credentials.username.is_empty());
        let credentials = credentials.ok_or_else(|| unauthorized("it asks for a user name and password"))?;
        return header("Basic ", &basic(credentials))
            .ok_or_else(|| unauthorized("the credentials are too long"));
    }
    Err(unauthorized("it names no way to authenticate that is known here (Basic or Bearer)"))
}

/// Whether one of the scopes has the action `push`; a repository may well be called so (`prom/pushgateway`).
pub(super) fn is_for_push(scopes: &str) -> bool {
    let actions = scopes.split_ascii_whitespace().filter_map(|scope| scope.rsplit(':').next());
    actions.flat_map(|actions| actions.split(',')).any(|action| action == "push")
}

/// The header for a token that the client brought along.
pub(super) fn with_registry_token(token: &str) -> Option<HeaderValue> {
    header("Bearer ", token)
}

fn header(scheme: &str, value: &str) -> Option<HeaderValue> {
    if value.is_empty() || value.len() > MAX_TOKEN {
        return None;
    }
    let mut header = HeaderValue::from_str(&format!("{scheme}{value}")).ok()?;
    header.set_sensitive(true);
    Some(header)
}

fn basic(credentials: &Credentials) -> String {
    let text = format!("{}:{}", credentials.username, credentials.password);
    base64::engine::general_purpose::STANDARD.encode(text)
}

/// A token service is never asked in clear on behalf of a registry that is not.
fn realm_url(realm: &str, secure: bool) -> Result<Url, String> {
    let url =
        Url::parse(realm).map_err(|error| format!("its token service has no valid address: {error}"))?;
    match url.scheme() {
        "https" => Ok(url),
        "http" if !secure => Ok(url),
        _ => Err("its token service is not reached over https".to_owned()),
    }
}

/// Asks the token service: with a refresh token by OAuth2 (distribution, "OAuth2 Token Authentication"), else by GET
/// with user name and password or anonymously ("Token Authentication").
async fn fetch_token(
    client: &reqwest::Client,
    host: &str,
    mut realm: Url,
    service: &str,
    scope: &str,
    credentials: Option<&Credentials>,
) -> Result<String, RegistryError> {
    let refresh = credentials.map(|credentials| credentials.identity_token.as_str()).unwrap_or_default();
    let request = if refresh.is_empty() {
        let login = credentials.filter(|credentials| !credentials.username.is_empty());
        {
            let mut query = realm.query_pairs_mut();
            if !service.is_empty() {
                query.append_pair("service", service);
            }
            scope.split_ascii_whitespace().take(16).for_each(|scope| {
                query.append_pair("scope", scope);
            });
            if let Some(login) = login {
                query.append_pair("account", &login.username);
            }
        }
        match login {
            Some(login) => client.get(realm.clone()).basic_auth(&login.username, Some(&login.password)),
            None => client.get(realm.clone()),
        }
    } else {
        let form = [
            ("grant_type", "refresh_token"),
            ("service", service),
            ("scope", scope),
            ("client_id", "hull"),
            ("refresh_token", refresh),
        ];
        client.post(realm.clone()).form(&form)
    };
    let place = realm.host_str().unwrap_or_default().to_owned();
    let unreachable = |error: reqwest::Error| RegistryError::Unreachable {
        host: format!("token service {place} of {host}"),
        reason: reasons(&error.without_url()),
    };
    let response = request.timeout(TOKEN_TIMEOUT).send().await.map_err(unreachable)?;
    let status = response.status();
    if status.is_client_error() && status != reqwest::StatusCode::TOO_MANY_REQUESTS {
        let detail = error_detail(response).await;
        return Err(RegistryError::Unauthorized {
            host: host.to_owned(),
            reason: format!("the token service {place} answered {}{detail}", status.as_u16()),
        });
    }
    if !status.is_success() {
        return Err(RegistryError::Status {
            host: place,
            status: status.as_u16(),
            what: "a token".to_owned(),
            detail: error_detail(response).await,
        });
    }
    let bytes = read_bounded(response, Pace::new(TOKEN_TIMEOUT), host, "a token", MAX_TOKEN_ANSWER).await?;
    let answer: TokenAnswer = serde_json::from_slice(&bytes).map_err(|_| RegistryError::Protocol {
        host: host.to_owned(),
        reason: format!("the token service {place} sent no token"),
    })?;
    // `token` and `access_token` mean the same; either may be missing or empty.
    let token = answer.token.filter(|token| !token.is_empty()).or(answer.access_token);
    token.filter(|token| !token.is_empty()).ok_or_else(|| RegistryError::Protocol {
        host: host.to_owned(),
        reason: format!("the token service {place} sent no token"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_service_in_clear_is_refused_for_a_secure_registry() {
        assert!(realm_url("http://auth.example/token", true).is_err());
        assert!(realm_url("http://127.0.0.1/token", false).is_ok());
        assert!(realm_url("https://auth.example/token", true).is_ok());
        assert!(realm_url("file:///etc/passwd", false).is_err());
    }

    #[test]
    fn only_an_action_makes_a_scope_one_of_a_push() {
        assert!(is_for_push("repository:a/b:pull,push repository:c:pull"));
        assert!(is_for_push("repository:a/b:push"));
        for scopes in
            ["", "repository:prom/pushgateway:pull", "repository:push:pull", "repository:a:pull,pushed"]
        {
            assert!(!is_for_push(scopes), "{scopes}");
        }
    }

    #[test]
    fn a_token_that_would_break_the_header_is_refused() {
        assert!(with_registry_token("a\r\nX: y").is_none());
        assert!(with_registry_token("").is_none());
        assert!(with_registry_token("abc").is_some_and(|header| header.is_sensitive()));
    }
}
