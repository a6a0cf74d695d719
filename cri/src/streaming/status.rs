//! How a remote command ended, as its client is told on the error stream.

use serde_json::json;

/// How it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It ended well.
    Success,
    /// It ended with this exit code, which is not 0.
    Exit(i32),
    /// It could not be done: what, and why.
    Failed(String),
}

impl Outcome {
    /// A Kubernetes Status (apimachinery, meta/v1) in JSON: what v4.channel.k8s.io and later put on the error stream.
    pub fn to_json(&self) -> Vec<u8> {
        let status = match self {
            Self::Success => json!({ "metadata": {}, "status": "Success" }),
            Self::Exit(code) => json!({
                "metadata": {},
                "status": "Failure",
                "message": self.to_text(),
                "reason": "NonZeroExitCode",
                "details": { "causes": [{ "reason": "ExitCode", "message": code.to_string() }] },
            }),
            Self::Failed(message) => json!({
                "metadata": {},
                "status": "Failure",
                "message": message,
                "reason": "InternalError",
                "details": { "causes": [{ "message": message }] },
                "code": 500,
            }),
        };
        status.to_string().into_bytes()
    }

    /// What earlier versions put there: nothing if it ended well.
    pub fn to_text(&self) -> String {
        match self {
            Self::Success => String::new(),
            Self::Exit(code) => {
                format!("command terminated with non-zero exit code: exit status {code}")
            }
            Self::Failed(message) => message.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exit_code_is_a_cause_as_kubectl_looks_for_it() {
        let status: serde_json::Value = serde_json::from_slice(&Outcome::Exit(7).to_json()).unwrap();
        assert_eq!(status["status"], "Failure");
        assert_eq!(status["reason"], "NonZeroExitCode");
        assert_eq!(status["details"]["causes"][0], json!({ "reason": "ExitCode", "message": "7" }));
        let status: serde_json::Value = serde_json::from_slice(&Outcome::Success.to_json()).unwrap();
        assert_eq!(status["status"], "Success");
    }
}
