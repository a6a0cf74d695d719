//! Users and groups by name, from the image's own /etc/passwd and /etc/group.
//!
//! One parser for every way a user can be named (USER of an image, runAsUser, exec). An ID is a decimal number below
//! 4294967295 or it is an error: nothing here ever falls back to root (CVE-2024-40635, CVE-2026-30892).

use crate::protocol::messages;

use super::report::Identity;

/// Bytes of /etc/passwd or /etc/group that are read; a larger file is an error. Bound of CVE-2026-47262.
pub(super) const MAX_FILE: usize = 1 << 20;
/// Supplementary groups of one process (NGROUPS_MAX).
const MAX_GROUPS: usize = 65536;
/// Bytes of a user's or group's name in a request.
const MAX_NAME: usize = 256;

/// Why a user or group cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UserError {
    /// The number is too large, or the one that means "unchanged".
    #[error("cannot use {what} {text:?}: not a number from 0 to 4294967294")]
    BadId {
        /// "user" or "group".
        what: &'static str,
        /// The text in question.
        text: String,
    },
    /// Empty, too long, or with characters that no name has.
    #[error("cannot use {what} {text:?}: not a name")]
    BadName {
        /// "user" or "group".
        what: &'static str,
        /// The text in question.
        text: String,
    },
    /// No such entry.
    #[error("unable to find {what} {name}: no matching entries in {file}")]
    NotFound {
        /// "user" or "group".
        what: &'static str,
        /// Its name.
        name: String,
        /// Where it was looked for.
        file: &'static str,
    },
    /// The entry is there but its numbers or its home cannot be used.
    #[error("cannot use the entry of {name:?} in {file}: {reason}")]
    BadEntry {
        /// User or group.
        name: String,
        /// In which file.
        file: &'static str,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// More groups than a process can have.
    #[error("cannot use more than {MAX_GROUPS} supplementary groups")]
    TooManyGroups,
}

/// A user or group as a request names it.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Named {
    Id(u32),
    Name(String),
}

/// Which user a process is to run as, before the image's files were asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct WantedUser {
    user: Named,
    /// Absent: the user's primary group, or 0.
    group: Option<Named>,
    supplemental: Vec<u32>,
    strict: bool,
}

/// A resolved user with the home directory that /etc/passwd gives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Resolved {
    pub(super) identity: Identity,
    pub(super) home: Option<String>,
}

/// A decimal ID; `u32::MAX` is none, since the kernel reads it as "unchanged".
fn parse_id(text: &str) -> Option<u32> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if digits { text.parse().ok().filter(|id| *id != u32::MAX) } else { None }
}

fn parse_named(what: &'static str, text: &str) -> Result<Named, UserError> {
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        let id = parse_id(text).ok_or_else(|| UserError::BadId { what, text: text.into() })?;
        return Ok(Named::Id(id));
    }
    let bad = |character: char| character == ':' || character == ',' || character.is_control();
    if text.is_empty() || text.len() > MAX_NAME || text.contains(bad) {
        return Err(UserError::BadName { what, text: text.chars().take(MAX_NAME).collect() });
    }
    Ok(Named::Name(text.into()))
}

fn checked_id(what: &'static str, id: u32) -> Result<u32, UserError> {
    if id == u32::MAX { Err(UserError::BadId { what, text: id.to_string() }) } else { Ok(id) }
}

impl WantedUser {
    /// Reads the request. An absent user, and the empty name that an image without USER has, is 0 (OCI image-spec).
    /// A group given on its own goes before one written after the user's name.
    pub(super) fn new(user: &messages::User) -> Result<Self, UserError> {
        use messages::user::{Group, User};
        let (named, written_group) = match &user.user {
            None => (Named::Id(0), None),
            Some(User::Uid(uid)) => (Named::Id(checked_id("user", *uid)?), None),
            Some(User::Name(text)) if text.is_empty() => (Named::Id(0), None),
            Some(User::Name(text)) => match text.split_once(':') {
                None => (parse_named("user", text)?, None),
                Some((user, group)) => (parse_named("user", user)?, Some(parse_named("group", group)?)),
            },
        };
        let group = match &user.group {
            None => written_group,
            Some(Group::Gid(gid)) => Some(Named::Id(checked_id("group", *gid)?)),
            Some(Group::GroupName(name)) => Some(parse_named("group", name)?),
        };
        if user.supplemental_groups.len() > MAX_GROUPS {
            return Err(UserError::TooManyGroups);
        }
        for gid in &user.supplemental_groups {
            checked_id("group", *gid)?;
        }
        let supplemental = user.supplemental_groups.clone();
        Ok(Self { user: named, group, supplemental, strict: user.strict_groups })
    }

    /// Looks names and memberships up in the files' contents (empty: the image has none).
    pub(super) fn resolve(&self, passwd: &[u8], group: &[u8]) -> Result<Resolved, UserError> {
        let entry = match &self.user {
            Named::Id(uid) => user_by_id(passwd, *uid)?,
            Named::Name(name) => Some(user_by_name(passwd, name)?),
        };
        let uid = match (&self.user, &entry) {
            (_, Some(entry)) => entry.uid,
            (Named::Id(uid), None) => *uid,
            // user_by_name has found an entry or failed.
            (Named::Name(name), None) => {
                return Err(UserError::NotFound { what: "user", name: name.clone(), file: PASSWD });
            }
        };
        let gid = match &self.group {
            Some(Named::Id(gid)) => *gid,
            Some(Named::Name(name)) => group_by_name(group, name)?,
            None => entry.as_ref().map_or(0, |entry| entry.gid),
        };
        let memberships = match &entry {
            Some(entry) if !self.strict => memberships(group, &entry.name)?,
            _ => Vec::new(),
        };
        let groups = merge(gid, &memberships, &self.supplemental)?;
        Ok(Resolved { identity: Identity { uid, gid, groups }, home: entry.and_then(|entry| entry.home) })
    }
}

/// The primary group is among the supplementary ones too, or a process could drop it (CVE-2023-25173). Sorted, unique.
fn merge(gid: u32, memberships: &[u32], supplemental: &[u32]) -> Result<Vec<u32>, UserError> {
    let mut groups: Vec<u32> =
        std::iter::once(gid).chain(memberships.iter().copied()).chain(supplemental.iter().copied()).collect();
    groups.sort_unstable();
    groups.dedup();
    if groups.len() > MAX_GROUPS { Err(UserError::TooManyGroups) } else { Ok(groups) }
}

const PASSWD: &str = "/etc/passwd";
const GROUP: &str = "/etc/group";

struct User {
    name: Vec<u8>,
    uid: u32,
    gid: u32,
    home: Option<String>,
}

fn lines(file: &[u8]) -> impl Iterator<Item = &[u8]> {
    file.split(|byte| *byte == b'\n')
        .map(<[u8]>::trim_ascii)
        .filter(|line| !line.is_empty() && line[0] != b'#')
}

fn fields(line: &[u8]) -> impl Iterator<Item = &[u8]> {
    line.split(|byte| *byte == b':')
}

fn id_field(field: Option<&[u8]>) -> Option<u32> {
    std::str::from_utf8(field?).ok().and_then(parse_id)
}

/// passwd(5): name:password:uid:gid:gecos:home:shell. `Err` says what is wrong with the line.
fn parse_user(line: &[u8]) -> Result<User, UserError> {
    let mut parts = fields(line);
    let name = parts.next().unwrap_or_default();
    let bad = |reason| UserError::BadEntry {
        name: String::from_utf8_lossy(&name[..name.len().min(MAX_NAME)]).into_owned(),
        file: PASSWD,
        reason,
    };
    parts.next();
    let uid =
        id_field(parts.next()).ok_or_else(|| bad("its user ID is not a number from 0 to 4294967294"))?;
    let gid =
        id_field(parts.next()).ok_or_else(|| bad("its group ID is not a number from 0 to 4294967294"))?;
    parts.next();
    let home = match parts.next().unwrap_or_default() {
        b"" => None,
        text => {
            let text = std::str::from_utf8(text).map_err(|_| bad("its home directory is not UTF-8"))?;
            // CVE-2022-4318: a newline in HOME. One cannot be in a line, but other control characters can.
            if text.chars().any(char::is_control) {
                return Err(bad("its home directory contains control characters"));
            }
            Some(text.to_owned())
        }
    };
    Ok(User { name: name.to_vec(), uid, gid, home })
}

fn user_by_name(passwd: &[u8], name: &str) -> Result<User, UserError> {
    let found = lines(passwd).find(|line| fields(line).next() == Some(name.as_bytes()));
    found.map_or_else(
        || Err(UserError::NotFound { what: "user", name: name.into(), file: PASSWD }),
        parse_user,
    )
}

/// The first entry with this ID; an ID without one is usable all the same.
fn user_by_id(passwd: &[u8], uid: u32) -> Result<Option<User>, UserError> {
    lines(passwd).find(|line| id_field(fields(line).nth(2)) == Some(uid)).map(parse_user).transpose()
}

fn group_error(line: &[u8]) -> UserError {
    let name = fields(line).next().unwrap_or_default();
    UserError::BadEntry {
        name: String::from_utf8_lossy(&name[..name.len().min(MAX_NAME)]).into_owned(),
        file: GROUP,
        reason: "its group ID is not a number from 0 to 4294967294",
    }
}

/// group(5): name:password:gid:member,member.
fn group_by_name(group: &[u8], name: &str) -> Result<u32, UserError> {
    let line = lines(group)
        .find(|line| fields(line).next() == Some(name.as_bytes()))
        .ok_or_else(|| UserError::NotFound { what: "group", name: name.into(), file: GROUP })?;
    id_field(fields(line).nth(2)).ok_or_else(|| group_error(line))
}

fn memberships(group: &[u8], user: &[u8]) -> Result<Vec<u32>, UserError> {
    let is_member = |line: &&[u8]| {
        !user.is_empty()
            && fields(line).nth(3).is_some_and(|list| list.split(|byte| *byte == b',').any(|one| one == user))
    };
    lines(group)
        .filter(is_member)
        .map(|line| id_field(fields(line).nth(2)).ok_or_else(|| group_error(line)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use messages::user::{Group, User as UserKind};
    use proptest::prelude::*;

    const PASSWD_FILE: &[u8] = b"root:x:0:0:root:/root:/bin/sh\n# comment\n\nweb:x:33:34::/srv:/bin/false\n\
        huge:x:4294967296:0::/:\nminus:x:-1:0::/:\nunchanged:x:4294967295:0::/:\nnogid:x:50::/:\n\
        evil:x:60:60::/a\x01b:\nshort:x:70\n1000:x:5:5::/:\n";
    const GROUP_FILE: &[u8] =
        b"root:x:0:\nwww:x:34:\nmedia:x:44:web,other\nlogs:x:45:other,web\nbroken:x:x:evil\nwebs:x:46:webs\n";

    fn named(text: &str) -> messages::User {
        messages::User { user: Some(UserKind::Name(text.into())), ..Default::default() }
    }

    fn resolve(user: &messages::User) -> Result<Resolved, UserError> {
        WantedUser::new(user)?.resolve(PASSWD_FILE, GROUP_FILE)
    }

    fn ids(user: &messages::User) -> (u32, u32, Vec<u32>) {
        let identity = resolve(user).unwrap().identity;
        (identity.uid, identity.gid, identity.groups)
    }

    #[test]
    fn every_form_of_user_is_understood() {
        assert_eq!(ids(&named("")), (0, 0, vec![0]));
        assert_eq!(ids(&named("web")), (33, 34, vec![34, 44, 45]));
        assert_eq!(ids(&named("33")), (33, 34, vec![34, 44, 45]));
        assert_eq!(ids(&named("web:media")), (33, 44, vec![44, 45]));
        assert_eq!(ids(&named("web:7")), (33, 7, vec![7, 44, 45]));
        assert_eq!(ids(&named("12345:7")), (12345, 7, vec![7]));
        assert_eq!(ids(&named("12345")), (12345, 0, vec![0]));
        assert_eq!(ids(&messages::User::default()), (0, 0, vec![0]));
        assert_eq!(resolve(&named("web")).unwrap().home.as_deref(), Some("/srv"));
    }

    #[test]
    fn a_number_is_never_looked_up_as_a_name() {
        assert_eq!(ids(&named("1000")), (1000, 0, vec![0]));
    }

    #[test]
    fn strict_groups_leave_the_images_memberships_out() {
        let mut user = named("web");
        user.supplemental_groups = vec![99, 99, 34];
        assert_eq!(ids(&user).2, [34, 44, 45, 99]);
        user.strict_groups = true;
        assert_eq!(ids(&user).2, [34, 99]);
        user.group = Some(Group::Gid(3000));
        assert_eq!(ids(&user), (33, 3000, vec![34, 99, 3000]));
    }

    // CVE-2024-40635, CVE-2026-46680: an overflow became root.
    #[test]
    fn a_user_that_cannot_be_used_is_an_error_and_never_root() {
        for text in ["4294967296", "4294967295", "99999999999999999999", "-1", "+1", " 0", "0x0", "nobody"] {
            assert!(resolve(&named(text)).is_err(), "{text:?}");
        }
        for text in ["huge", "minus", "unchanged", "nogid", "short", "evil", ":", ":0", "0:", "web:nogroup"] {
            assert!(resolve(&named(text)).is_err(), "{text:?}");
        }
        for text in ["web:broken", "web:4294967295", "a:b:c", "x\ny"] {
            assert!(resolve(&named(text)).is_err(), "{text:?}");
        }
        let uid = |uid| messages::User { user: Some(UserKind::Uid(uid)), ..Default::default() };
        assert!(resolve(&uid(u32::MAX)).is_err());
        let groups = messages::User { supplemental_groups: vec![u32::MAX], ..uid(1) };
        assert!(resolve(&groups).is_err());
    }

    #[test]
    fn too_many_groups_are_refused() {
        let user = messages::User { supplemental_groups: (0..70_000).collect(), ..Default::default() };
        assert_eq!(resolve(&user), Err(UserError::TooManyGroups));
        let line = |gid: u32| format!("g{gid}:x:{gid}:web\n");
        let many: String = (1..=MAX_GROUPS as u32).map(line).collect();
        let wanted = WantedUser::new(&named("web:0")).unwrap();
        assert_eq!(wanted.resolve(PASSWD_FILE, many.as_bytes()), Err(UserError::TooManyGroups));
    }

    proptest! {
        #[test]
        fn hostile_files_never_make_root_of_another_user(
            name in "[a-z0-9:+-]{1,12}",
            passwd in proptest::collection::vec(any::<u8>(), 0..400),
            group in proptest::collection::vec(any::<u8>(), 0..400),
        ) {
            let Ok(wanted) = WantedUser::new(&named(&name)) else { return Ok(()) };
            if let Ok(resolved) = wanted.resolve(&passwd, &group) {
                let user = name.split(':').next().unwrap();
                match user.parse::<u32>() {
                    Ok(uid) if !user.starts_with('+') => prop_assert_eq!(resolved.identity.uid, uid),
                    _ => prop_assert!(lines(&passwd).any(|line| fields(line).next() == Some(user.as_bytes()))),
                }
                prop_assert!(resolved.identity.uid != u32::MAX && resolved.identity.gid != u32::MAX);
                prop_assert!(resolved.identity.groups.contains(&resolved.identity.gid));
            }
        }

        #[test]
        fn lines_of_colons_and_numbers_never_panic(
            passwd in "([a-z0-9:,\\-\\n]{0,30}\\n){0,20}",
            group in "([a-z0-9:,\\-\\n]{0,30}\\n){0,20}",
            name in "[a-z0-9]{1,3}(:[a-z0-9]{1,3})?",
        ) {
            if let Ok(wanted) = WantedUser::new(&named(&name)) {
                let _ = wanted.resolve(passwd.as_bytes(), group.as_bytes());
            }
        }
    }
}
