//! Answers as text: bounded reading, and what of it may stand in messages.

use std::error::Error;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use serde::Deserialize;

use super::error::RegistryError;
use super::pace::Pace;

/// How much of an error answer is read.
const MAX_ERROR_ANSWER: u64 = 16 * 1024;
/// How much of it is shown.
const MAX_DETAIL: usize = 256;

/// How long an error answer is read: it is for people, and may be missing.
const ERROR_ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Reads a whole answer of at most `limit` bytes that keeps its pace.
pub(super) async fn read_bounded(
    mut response: reqwest::Response,
    mut pace: Pace,
    host: &str,
    what: &str,
    limit: u64,
) -> Result<Bytes, RegistryError> {
    let too_large = || RegistryError::TooLarge { host: host.to_owned(), what: what.to_owned(), limit };
    if response.content_length().is_some_and(|length| length > limit) {
        return Err(too_large());
    }
    let mut bytes = BytesMut::new();
    loop {
        let chunk = pace
            .chunk(&mut response)
            .await
            .map_err(|broken| RegistryError::Unreachable { host: host.to_owned(), reason: broken.reason })?;
        let Some(chunk) = chunk else { return Ok(bytes.freeze()) };
        if (bytes.len() + chunk.len()) as u64 > limit {
            return Err(too_large());
        }
        bytes.extend_from_slice(&chunk);
    }
}

#[derive(Deserialize)]
struct ErrorAnswer {
    #[serde(default)]
    errors: Vec<ErrorEntry>,
    /// Token services write their reason here.
    #[serde(default)]
    details: String,
}

#[derive(Deserialize)]
struct ErrorEntry {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

/// The registry's own words for a failure (distribution-spec, "Error Codes"), with a leading separator; empty if it has
/// none. Only the standard's form is shown: the body of an arbitrary server, reached by a redirect, is nobody's business.
pub(super) async fn error_detail(mut response: reqwest::Response) -> String {
    let mut bytes = Vec::new();
    let read = async {
        while let Ok(Some(chunk)) = response.chunk().await {
            if (bytes.len() + chunk.len()) as u64 > MAX_ERROR_ANSWER {
                return false;
            }
            bytes.extend_from_slice(&chunk);
        }
        true
    };
    if !tokio::time::timeout(ERROR_ANSWER_TIMEOUT, read).await.unwrap_or(false) {
        return String::new();
    }
    let Ok(answer) = serde_json::from_slice::<ErrorAnswer>(&bytes) else { return String::new() };
    let mut parts: Vec<String> = Vec::new();
    for error in answer.errors.iter().take(3) {
        parts.push(
            [error.code.as_str(), error.message.as_str()]
                .iter()
                .filter(|t| !t.is_empty())
                .copied()
                .collect::<Vec<_>>()
                .join(": "),
        );
    }
    if !answer.details.is_empty() {
        parts.push(answer.details);
    }
    let text = printable(&parts.join("; "), MAX_DETAIL);
    if text.is_empty() { text } else { format!(" ({text})") }
}

/// An error with all its causes, on one line.
pub(super) fn reasons(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    printable(&text, 2 * MAX_DETAIL)
}

/// At most `limit` characters, without control characters.
pub(super) fn printable(text: &str, limit: usize) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(limit).collect()
}
