//! A user, /etc/passwd and /etc/group of an image.
#![no_main]

use hull_agent::container::fuzzing::users;
use hull_agent::protocol::messages::{User, user};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut parts = data.splitn(4, |byte| *byte == 0);
    let mut text = || parts.next().unwrap_or_default();
    let (name, group) =
        (String::from_utf8_lossy(text()).into_owned(), String::from_utf8_lossy(text()).into_owned());
    let asked = User {
        user: Some(user::User::Name(name)),
        group: (!group.is_empty()).then_some(user::Group::GroupName(group)),
        ..User::default()
    };
    let (passwd, group) = (text(), text());
    users(&asked, passwd, group);
});
