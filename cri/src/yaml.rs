//! YAML documents as JSON values: as much of the language as configuration files use.

use saphyr_parser::{Event, Parser, ScalarStyle, Tag};
use serde_json::{Map, Number, Value};

/// Deepest nesting.
const MAX_DEPTH: usize = 64;
/// Most values of a document.
const MAX_VALUES: usize = 200_000;

/// The one document of `text`. Aliases are refused: a few lines of them can stand for terabytes.
pub(crate) fn parse(text: &str) -> Result<Value, String> {
    let mut events = Events { parser: Parser::new_from_str(text), values: 0 };
    loop {
        match events.next()? {
            Event::StreamStart | Event::DocumentStart(_) | Event::Nothing => {}
            Event::StreamEnd | Event::DocumentEnd => return Ok(Value::Null),
            first => {
                let value = events.value(first, 0)?;
                return events.only_one().map(|()| value);
            }
        }
    }
}

struct Events<'a, I: saphyr_parser::Input> {
    parser: Parser<'a, I>,
    values: usize,
}

impl<'a, I: saphyr_parser::Input> Events<'a, I> {
    fn next(&mut self) -> Result<Event<'a>, String> {
        match self.parser.next() {
            Some(Ok((event, _))) => Ok(event),
            Some(Err(error)) => Err(error.to_string()),
            None => Ok(Event::StreamEnd),
        }
    }

    fn only_one(&mut self) -> Result<(), String> {
        loop {
            match self.next()? {
                Event::StreamEnd => return Ok(()),
                Event::DocumentEnd | Event::Nothing => {}
                _ => return Err("it has more than one document".into()),
            }
        }
    }

    fn value(&mut self, event: Event<'a>, depth: usize) -> Result<Value, String> {
        self.values += 1;
        if depth > MAX_DEPTH || self.values > MAX_VALUES {
            return Err("it is nested too deeply or has too many values".into());
        }
        match event {
            Event::Scalar(text, style, _, tag) => scalar(&text, style, tag.as_deref()),
            Event::SequenceStart(..) => {
                let mut list = Vec::new();
                loop {
                    match self.next()? {
                        Event::SequenceEnd => return Ok(Value::Array(list)),
                        event => list.push(self.value(event, depth + 1)?),
                    }
                }
            }
            Event::MappingStart(..) => self.mapping(depth),
            Event::Alias(_) => Err("it has an alias (*name), which is not supported".into()),
            _ => Err("it ends in the middle of a value".into()),
        }
    }

    fn mapping(&mut self, depth: usize) -> Result<Value, String> {
        let mut map = Map::new();
        loop {
            let key = match self.next()? {
                Event::MappingEnd => return Ok(Value::Object(map)),
                Event::Scalar(text, ..) => text.into_owned(),
                _ => return Err("a key is not a plain text".into()),
            };
            let event = self.next()?;
            let value = self.value(event, depth + 1)?;
            if map.insert(key.clone(), value).is_some() {
                return Err(format!("the key {key:?} is there twice"));
            }
        }
    }
}

/// The core schema of YAML 1.2, and 0666 as the octal number that Go's libraries, which write these files, mean by it.
fn scalar(text: &str, style: ScalarStyle, tag: Option<&Tag>) -> Result<Value, String> {
    match tag {
        Some(tag) if tag.is_yaml_core_schema() && tag.suffix == "str" => {
            return Ok(Value::String(text.to_owned()));
        }
        Some(tag) if !tag.is_yaml_core_schema() => return Err(format!("the tag {tag} is not supported")),
        _ => {}
    }
    if style != ScalarStyle::Plain {
        return Ok(Value::String(text.to_owned()));
    }
    Ok(match text {
        "" | "~" | "null" | "Null" | "NULL" => Value::Null,
        "true" | "True" | "TRUE" => Value::Bool(true),
        "false" | "False" | "FALSE" => Value::Bool(false),
        _ => number(text).map_or_else(|| Value::String(text.to_owned()), Value::Number),
    })
}

fn number(text: &str) -> Option<Number> {
    let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
    if !digits.starts_with(|first: char| first.is_ascii_digit() || first == '.') {
        return None;
    }
    if let Some(octal) =
        text.strip_prefix("0o").or_else(|| text.strip_prefix('0').filter(|rest| !rest.is_empty()))
        && let Ok(value) = u64::from_str_radix(octal, 8)
    {
        return Some(value.into());
    }
    if let Some(hex) = text.strip_prefix("0x") {
        return u64::from_str_radix(hex, 16).ok().map(Number::from);
    }
    if let Ok(value) = text.parse::<i64>() {
        return Some(value.into());
    }
    text.parse::<f64>().ok().and_then(Number::from_f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_configuration_files_use_is_understood() {
        let text = "---\n# a comment\nname: gpu0\nlist: [1, 0666, 0x10, -5, 1.5, \"2\"]\nnested:\n  - a: yes\n    b: ~\n  - true\n\
                    text: |\n  two\n  lines\nversion: 0.6.0\nquoted: '0.6'\n";
        let expected = json!({
            "name": "gpu0", "list": [1, 438, 16, -5, 1.5, "2"], "nested": [{"a": "yes", "b": null}, true],
            "text": "two\nlines\n", "version": "0.6.0", "quoted": "0.6",
        });
        assert_eq!(parse(text).unwrap(), expected);
        assert_eq!(parse("").unwrap(), Value::Null);
        assert_eq!(parse("{\"json\": [1, {\"too\": null}]}").unwrap(), json!({"json": [1, {"too": null}]}));
    }

    #[test]
    fn bombs_and_nonsense_are_refused() {
        let deep = "[".repeat(1000);
        for text in [
            "a: &x [1]\nb: *x\n",
            "a: 1\na: 2\n",
            "a: [1",
            "a: 1\n---\nb: 2\n",
            "a: !evil x\n",
            &deep,
            "? [a]\n: b\n",
        ] {
            assert!(parse(text).is_err(), "{text:.40}");
        }
    }
}
