//! The `WWW-Authenticate` header (RFC 9110, section 11.6.1): which authentication a server asks for.

/// Longest header value that is looked at.
const MAX_HEADER: usize = 16 * 1024;
/// Most parameters of one challenge.
const MAX_PARAMETERS: usize = 32;

/// One challenge that hull can meet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Challenge {
    /// User name and password.
    Basic,
    /// A token from the service at `realm` (distribution, "Token Authentication").
    Bearer {
        realm: String,
        service: String,
        scope: String,
        /// `invalid_token`, `insufficient_scope`: why an earlier token was refused.
        error: String,
    },
}

/// The challenges in one header value, in order. Unknown schemes and malformed rests are left out.
pub(super) fn parse(header: &str) -> Vec<Challenge> {
    let mut challenges = Vec::new();
    if header.len() > MAX_HEADER {
        return challenges;
    }
    let mut scanner = Scanner { rest: header };
    while let Some(scheme) = scanner.scheme() {
        let Some(parameters) = scanner.parameters() else { break };
        let value = |name: &str| {
            let found = parameters.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
            found.map(|(_, value)| value.clone()).unwrap_or_default()
        };
        if scheme.eq_ignore_ascii_case("basic") {
            challenges.push(Challenge::Basic);
        } else if scheme.eq_ignore_ascii_case("bearer") && !value("realm").is_empty() {
            challenges.push(Challenge::Bearer {
                realm: value("realm"),
                service: value("service"),
                scope: value("scope"),
                error: value("error"),
            });
        }
    }
    challenges
}

struct Scanner<'a> {
    rest: &'a str,
}

impl<'a> Scanner<'a> {
    /// The next scheme name; separators before it are skipped.
    fn scheme(&mut self) -> Option<&'a str> {
        self.rest = self.rest.trim_start_matches([' ', '\t', ',']);
        self.token()
    }

    /// The parameters up to the next scheme or the end. None if there are too many.
    fn parameters(&mut self) -> Option<Vec<(&'a str, String)>> {
        let mut parameters = Vec::new();
        loop {
            let before = self.rest;
            self.rest = self.rest.trim_start_matches([' ', '\t', ',']);
            let Some(name) = self.token() else { break };
            self.skip_blanks();
            let Some(rest) = self.rest.strip_prefix('=') else {
                // Not a parameter but the next scheme, or a token68, which no scheme known here has.
                self.rest = before;
                break;
            };
            self.rest = rest;
            self.skip_blanks();
            let Some(value) = self.value() else { break };
            if parameters.len() == MAX_PARAMETERS {
                return None;
            }
            parameters.push((name, value));
        }
        Some(parameters)
    }

    fn skip_blanks(&mut self) {
        self.rest = self.rest.trim_start_matches([' ', '\t']);
    }

    fn token(&mut self) -> Option<&'a str> {
        let is_token = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c);
        let length = self.rest.find(|c| !is_token(c)).unwrap_or(self.rest.len());
        let (token, rest) = self.rest.split_at(length);
        self.rest = rest;
        (!token.is_empty()).then_some(token)
    }

    /// A token or a quoted string. An unterminated string is no value.
    fn value(&mut self) -> Option<String> {
        let Some(quoted) = self.rest.strip_prefix('"') else { return self.token().map(str::to_owned) };
        let mut value = String::new();
        let mut characters = quoted.char_indices();
        while let Some((position, character)) = characters.next() {
            match character {
                '"' => {
                    self.rest = &quoted[position + 1..];
                    return Some(value);
                }
                '\\' => value.push(characters.next()?.1),
                other => value.push(other),
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_usual_token_challenge_is_read() {
        let header = r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:library/busybox:pull""#;
        let expected = Challenge::Bearer {
            realm: "https://auth.docker.io/token".into(),
            service: "registry.docker.io".into(),
            scope: "repository:library/busybox:pull".into(),
            error: String::new(),
        };
        assert_eq!(parse(header), [expected]);
    }

    #[test]
    fn several_challenges_in_one_header_are_all_found() {
        let header = r#"Negotiate, Basic realm="a, Bearer b", bearer Realm=x , error = "in\"valid""#;
        let bearer = Challenge::Bearer {
            realm: "x".into(),
            service: String::new(),
            scope: String::new(),
            error: "in\"valid".into(),
        };
        assert_eq!(parse(header), [Challenge::Basic, bearer]);
    }

    #[test]
    fn broken_headers_give_nothing() {
        for header in ["", "Bearer", "Bearer realm=", r#"Bearer realm="x"#, ",,,", "=", "Bearer =x", "\u{e9}"]
        {
            assert_eq!(parse(header), [], "{header:?}");
        }
        assert_eq!(parse(&format!("Basic {}", "a=b,".repeat(33))), []);
        assert_eq!(parse(&"Basic,".repeat(4000)), []);
    }

    proptest! {
        #[test]
        fn any_header_is_read_without_panic(header in "\\PC{0,200}") {
            parse(&header);
        }

        #[test]
        fn headers_of_the_right_letters_are_read_without_panic(header in "([Bb]earer|[Bb]asic|realm|=|\"|\\\\|,| |x){0,40}") {
            parse(&header);
        }
    }
}
