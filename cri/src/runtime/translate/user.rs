//! Who a container runs as. A number that does not fit never becomes root.

use hull_agent::protocol::messages::{self, user};

use super::invalid;
use crate::api::runtime::{Int64Value, LinuxContainerSecurityContext, SupplementalGroupsPolicy};
use crate::runtime::Error;

/// User ids end before u32's last number, which means "leave unchanged" to the kernel (setresuid(2)).
const LAST_ID: u32 = u32::MAX - 1;

/// The user of a container: CRI's choice, or the image's USER.
pub fn container_user(
    context: &LinuxContainerSecurityContext,
    image_user: &str,
) -> Result<messages::User, Error> {
    let group = context.run_as_group.as_ref().map(|gid| id("run_as_group", gid)).transpose()?;
    let (user, image_group) = match (&context.run_as_user, context.run_as_username.as_str()) {
        (Some(uid), _) => (Some(user::User::Uid(id("run_as_user", uid)?)), None),
        (None, "") if group.is_some() => {
            return Err(invalid("run_as_group needs run_as_user or run_as_username"));
        }
        (None, "") => image_user_and_group(image_user)?,
        (None, name) => (Some(named_user(name)?), None),
    };
    let supplemental_groups = context
        .supplemental_groups
        .iter()
        .map(|gid| id("a supplemental group", &Int64Value { value: *gid }))
        .collect::<Result<_, _>>()?;
    Ok(messages::User {
        user: user.or(Some(user::User::Uid(0))),
        group: group.map(user::Group::Gid).or(image_group),
        supplemental_groups,
        strict_groups: context.supplemental_groups_policy() == SupplementalGroupsPolicy::Strict,
    })
}

/// What an image's USER says about the user alone, as ImageStatus shows it: a number, or a name, or neither.
pub fn image_user(text: &str) -> (Option<i64>, String) {
    let user = text.split_once(':').map_or(text, |(user, _)| user);
    match user.parse::<u32>() {
        _ if user.is_empty() => (None, String::new()),
        Ok(uid) => (Some(i64::from(uid)), String::new()),
        Err(_) => (None, user.to_owned()),
    }
}

fn image_user_and_group(text: &str) -> Result<(Option<user::User>, Option<user::Group>), Error> {
    if text.is_empty() {
        return Ok((None, None));
    }
    let (user, group) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (text, None),
    };
    let user = if user.is_empty() { None } else { Some(named_user(user)?) };
    let group = match group {
        None | Some("") => None,
        Some(group) => Some(match number(group)? {
            Some(gid) => user::Group::Gid(gid),
            None => user::Group::GroupName(checked_name(group)?),
        }),
    };
    Ok((user, group))
}

fn named_user(text: &str) -> Result<user::User, Error> {
    Ok(match number(text)? {
        Some(uid) => user::User::Uid(uid),
        None => user::User::Name(checked_name(text)?),
    })
}

/// Digits are a number, and one that does not fit is an error rather than a name.
fn number(text: &str) -> Result<Option<u32>, Error> {
    if !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Ok(None);
    }
    match text.parse::<u32>() {
        Ok(id) if id <= LAST_ID => Ok(Some(id)),
        _ => Err(invalid(format!("the user or group id {text} does not fit into 32 bits"))),
    }
}

fn checked_name(name: &str) -> Result<String, Error> {
    let legal = |c: char| !c.is_control() && c != ':' && c != '/' && c != ',';
    if name.is_empty() || name.len() > 256 || name.starts_with(['-', '+']) || !name.chars().all(legal) {
        return Err(invalid(format!("{name:?} cannot be the name of a user or group")));
    }
    Ok(name.to_owned())
}

fn id(what: &str, value: &Int64Value) -> Result<u32, Error> {
    match u32::try_from(value.value) {
        Ok(id) if id <= LAST_ID => Ok(id),
        _ => Err(invalid(format!("{what} {} is not between 0 and {LAST_ID}", value.value))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_image(text: &str) -> Result<messages::User, Error> {
        container_user(&LinuxContainerSecurityContext::default(), text)
    }

    #[test]
    fn an_images_user_is_taken_apart() {
        assert_eq!(of_image("").unwrap().user, Some(user::User::Uid(0)));
        assert_eq!(of_image("1000").unwrap().user, Some(user::User::Uid(1000)));
        let both = of_image("app:staff").unwrap();
        assert_eq!(both.user, Some(user::User::Name("app".into())));
        assert_eq!(both.group, Some(user::Group::GroupName("staff".into())));
        assert_eq!(of_image("7:8").unwrap().group, Some(user::Group::Gid(8)));
        assert_eq!(of_image(":8").unwrap().user, Some(user::User::Uid(0)));
    }

    #[test]
    fn user_overflow_never_becomes_root() {
        // containerd CVE-2024-40635
        for text in ["4294967296", "4294967295", "99999999999999999999", "-1", "+5", "0:4294967296", "a b:\n"]
        {
            assert!(of_image(text).is_err(), "{text}");
        }
        for value in [-1, 1 << 32, i64::MAX, i64::from(u32::MAX)] {
            let context = LinuxContainerSecurityContext {
                run_as_user: Some(Int64Value { value }),
                ..Default::default()
            };
            assert!(container_user(&context, "").is_err(), "{value}");
        }
    }

    #[test]
    fn cri_wins_over_the_image_whole() {
        let context = LinuxContainerSecurityContext {
            run_as_user: Some(Int64Value { value: 5 }),
            ..Default::default()
        };
        let user = container_user(&context, "app:staff").unwrap();
        assert_eq!((user.user, user.group), (Some(user::User::Uid(5)), None));
        let context = LinuxContainerSecurityContext {
            run_as_username: "web".into(),
            run_as_group: Some(Int64Value { value: 9 }),
            supplemental_groups: vec![3, 4],
            supplemental_groups_policy: SupplementalGroupsPolicy::Strict.into(),
            ..Default::default()
        };
        let user = container_user(&context, "app").unwrap();
        assert_eq!(user.user, Some(user::User::Name("web".into())));
        assert_eq!(user.group, Some(user::Group::Gid(9)));
        assert_eq!(user.supplemental_groups, [3, 4]);
        assert!(user.strict_groups);
    }

    #[test]
    fn a_group_without_a_user_is_refused() {
        let context = LinuxContainerSecurityContext {
            run_as_group: Some(Int64Value { value: 9 }),
            ..Default::default()
        };
        assert!(container_user(&context, "app").is_err());
    }

    #[test]
    fn image_status_tells_number_or_name() {
        assert_eq!(image_user("1000:1000"), (Some(1000), String::new()));
        assert_eq!(image_user("nobody"), (None, "nobody".into()));
        assert_eq!(image_user(""), (None, String::new()));
    }
}
