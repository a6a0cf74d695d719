//! Changes of an image's configuration, as lines of a Dockerfile say them (docker commit --change).

use hull_images::store::ImageChange;

/// What is wrong with a line.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{line:?} cannot be a change: {reason}")]
pub(super) struct WrongChange {
    line: String,
    reason: &'static str,
}

const KNOWN: &str =
    "it begins with none of CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, STOPSIGNAL, USER, VOLUME, WORKDIR";

/// The changes of one line: ENV, EXPOSE, LABEL and VOLUME may name several things.
pub(super) fn parse(line: &str) -> Result<Vec<ImageChange>, WrongChange> {
    let wrong = |reason| WrongChange { line: line.chars().take(200).collect(), reason };
    let (keyword, rest) =
        line.trim().split_once(char::is_whitespace).ok_or_else(|| wrong("it says nothing"))?;
    let rest = rest.trim();
    let one = |change: fn(String) -> ImageChange| match rest.contains(char::is_whitespace) {
        true => Err(wrong("it has more than one word")),
        false => Ok(vec![change(rest.to_owned())]),
    };
    let words = || rest.split_whitespace().map(str::to_owned);
    match keyword.to_ascii_uppercase().as_str() {
        "CMD" => Ok(vec![ImageChange::Cmd(command(rest).map_err(wrong)?)]),
        "ENTRYPOINT" => Ok(vec![ImageChange::Entrypoint(command(rest).map_err(wrong)?)]),
        "ENV" => pairs(rest).map(|all| all.map_variables(ImageChange::Env)).map_err(wrong),
        "LABEL" => pairs(rest).map(|all| all.map_variables(ImageChange::Label)).map_err(wrong),
        "EXPOSE" => Ok(words().map(|port| ImageChange::Expose(with_protocol(port))).collect()),
        "VOLUME" if rest.starts_with('[') => {
            Ok(list(rest).map_err(wrong)?.into_iter().map(ImageChange::Volume).collect())
        }
        "VOLUME" => Ok(words().map(ImageChange::Volume).collect()),
        "STOPSIGNAL" => one(ImageChange::StopSignal),
        "USER" => one(ImageChange::User),
        "WORKDIR" => match rest.starts_with('/') {
            true => Ok(vec![ImageChange::WorkingDir(rest.to_owned())]),
            false => Err(wrong("the directory is not absolute")),
        },
        _ => Err(wrong(KNOWN)),
    }
}

/// A JSON list is the command itself, anything else goes to a shell, as with docker.
fn command(text: &str) -> Result<Vec<String>, &'static str> {
    if text.starts_with('[') {
        return list(text);
    }
    Ok(vec!["/bin/sh".to_owned(), "-c".to_owned(), text.to_owned()])
}

fn list(text: &str) -> Result<Vec<String>, &'static str> {
    serde_json::from_str(text).map_err(|_| "it is no JSON list of strings")
}

fn with_protocol(port: String) -> String {
    if port.contains('/') { port } else { format!("{port}/tcp") }
}

struct Pairs(Vec<(String, String)>);

impl Pairs {
    fn map_variables(self, change: fn(String, String) -> ImageChange) -> Vec<ImageChange> {
        self.0.into_iter().map(|(name, value)| change(name, value)).collect()
    }
}

/// `A=1 B="two words"`, or in the old form `A all the rest`.
fn pairs(text: &str) -> Result<Pairs, &'static str> {
    let first = text.split_whitespace().next().unwrap_or_default();
    if !first.contains('=') {
        let (name, value) = text.split_once(char::is_whitespace).ok_or("it has no value")?;
        return Ok(Pairs(vec![(name.to_owned(), value.trim().to_owned())]));
    }
    let mut found = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let (name, value) = rest.split_once('=').ok_or("a word has no =")?;
        if name.is_empty() || name.contains(char::is_whitespace) {
            return Err("a name is empty or has a space");
        }
        let (value, after) = value_of(value)?;
        found.push((name.to_owned(), value));
        rest = after.trim_start();
    }
    Ok(Pairs(found))
}

/// A value up to the next space that no quotes or backslash protect, and what follows.
fn value_of(text: &str) -> Result<(String, &str), &'static str> {
    let mut value = String::new();
    let mut quote = None;
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        match (character, quote) {
            ('\\', Some('"') | None) => value.push(characters.next().ok_or("it ends with a backslash")?.1),
            ('"' | '\'', None) => quote = Some(character),
            (closing, Some(open)) if closing == open => quote = None,
            (space, None) if space.is_whitespace() => return Ok((value, &text[at..])),
            (other, _) => value.push(other),
        }
    }
    if quote.is_some() { Err("a quote is not closed") } else { Ok((value, "")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_a_dockerfile_are_understood() {
        let text = |text: &str| text.to_owned();
        for (line, expected) in [
            ("CMD [\"a\", \"b c\"]", ImageChange::Cmd(vec![text("a"), text("b c")])),
            ("cmd echo $A", ImageChange::Cmd(vec![text("/bin/sh"), text("-c"), text("echo $A")])),
            ("ENTRYPOINT [\"/x\"]", ImageChange::Entrypoint(vec![text("/x")])),
            ("ENV A=b=c", ImageChange::Env(text("A"), text("b=c"))),
            ("ENV A b c", ImageChange::Env(text("A"), text("b c"))),
            ("LABEL k=\"v w\"", ImageChange::Label(text("k"), text("v w"))),
            ("EXPOSE 80", ImageChange::Expose(text("80/tcp"))),
            ("EXPOSE 53/udp", ImageChange::Expose(text("53/udp"))),
            ("USER 7:8", ImageChange::User(text("7:8"))),
            ("VOLUME /data", ImageChange::Volume(text("/data"))),
            ("WORKDIR /a b", ImageChange::WorkingDir(text("/a b"))),
            ("STOPSIGNAL SIGINT", ImageChange::StopSignal(text("SIGINT"))),
        ] {
            assert_eq!(parse(line).unwrap(), [expected], "{line}");
        }
        let two = parse("ENV A=1 B='x y' C=a\\ b").unwrap();
        assert_eq!(two[1], ImageChange::Env(text("B"), text("x y")));
        assert_eq!(two[2], ImageChange::Env(text("C"), text("a b")));
    }

    #[test]
    fn other_lines_are_refused() {
        for line in
            ["", "CMD", "RUN x", "ENV A", "ENV =1", "ENV A=\"b", "CMD [1]", "USER a b", "WORKDIR a", "FROM x"]
        {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
