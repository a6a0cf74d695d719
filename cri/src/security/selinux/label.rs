use std::fmt;

/// Longest label that the kernel takes in a write (a page), and then some less.
const MAX_LABEL: usize = 1024;

/// A security context, `USER:ROLE:TYPE[:LEVEL]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Label {
    pub(super) user: String,
    pub(super) role: String,
    pub(super) kind: String,
    /// Sensitivity and categories, which have colons of their own; empty where the policy has no levels.
    pub(super) level: String,
}

impl Label {
    /// `None` if it is none.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut parts = text.splitn(4, ':').map(str::to_owned);
        let label = Self {
            user: parts.next()?,
            role: parts.next()?,
            kind: parts.next()?,
            level: parts.next().unwrap_or_default(),
        };
        let named = [&label.user, &label.role, &label.kind].into_iter().all(|part| !part.is_empty());
        (named && text.len() <= MAX_LABEL).then_some(label)
    }

    /// The lowest sensitivity alone: `s0` of `s0-s0:c0.c1023`.
    pub(super) fn sensitivity(&self) -> &str {
        self.level.split([':', '-']).next().unwrap_or_default()
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.user, self.role, self.kind)?;
        if self.level.is_empty() { Ok(()) } else { write!(f, ":{}", self.level) }
    }
}

/// Whether a part of a label that a request names can be one: colons separate parts, and a level alone has some.
pub(super) fn is_part(text: &str, level: bool) -> bool {
    let fits = |character: char| {
        character.is_ascii_alphanumeric()
            || matches!(character, '_' | '.' | '-')
            || level && ":,".contains(character)
    };
    text.len() <= MAX_LABEL / 4 && text.chars().all(fits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_has_three_parts_and_a_level_with_colons() {
        let text = "system_u:system_r:container_t:s0-s0:c1,c7";
        let label = Label::parse(text).unwrap();
        assert_eq!((label.kind.as_str(), label.level.as_str()), ("container_t", "s0-s0:c1,c7"));
        assert_eq!((label.to_string().as_str(), label.sensitivity()), (text, "s0"));
        assert_eq!(Label::parse("u:r:t").unwrap().to_string(), "u:r:t");
        for bad in ["", "kernel", "u:r", "u::t:s0", &format!("u:r:t:{}", "c".repeat(2000))] {
            assert!(Label::parse(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn a_part_cannot_smuggle_in_another() {
        assert!(is_part("container_t", false) && is_part("s0:c1,c2", true));
        for bad in ["t:s0", "t\n", "t\0", "t,u", "ä", &"x".repeat(300)] {
            assert!(!is_part(bad, false), "{bad:?}");
        }
        assert!(!is_part("s0 c1", true));
    }
}
