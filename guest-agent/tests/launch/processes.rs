//! Users, limits, errors, terminals.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;

use hull_agent::container::{LaunchError, Stage};
use hull_agent::protocol::messages::{self, user};

use crate::support::{Pod, Wanted, fields, image};

crate::tests!(
    users_and_groups_come_from_the_image,
    another_user_can_reopen_its_standard_output,
    home_and_path_have_defaults,
    a_program_that_cannot_run_is_named_in_the_error,
    limits_and_oom_score_are_set,
    a_terminal_is_the_containers_own,
    without_no_new_privs_a_user_still_gets_the_filter,
    a_seccomp_profile_that_forbids_everything_else_still_starts,
    a_security_label_is_set_or_the_launch_fails,
);

fn named(name: &str) -> Option<messages::User> {
    Some(messages::User { user: Some(user::User::Name(name.into())), ..Default::default() })
}

fn users_and_groups_come_from_the_image() {
    let image = image("image", |_| ());
    let with = |name: &str, user: Option<messages::User>| {
        let mut wanted =
            Wanted::script(name, &image, "id -u; id -g; grep Groups /proc/self/status; echo $HOME");
        wanted.process().user = user;
        wanted
    };
    let mut strict = named("web");
    strict.as_mut().unwrap().strict_groups = true;
    let wanted = [
        (with("web", named("web")), ["33", "34", "Groups:\t34 44 ", "/srv"], vec![34, 44]),
        (with("strict", strict), ["33", "34", "Groups:\t34 ", "/srv"], vec![34]),
        (with("number", named("12345:7")), ["12345", "7", "Groups:\t7 ", "/"], vec![7]),
    ];
    let nobody = with("nobody", named("nobody"));
    let pod = Pod::enter();
    for (wanted, expected, groups) in &wanted {
        let running = pod.start(wanted).unwrap();
        let launched = &running.launched;
        assert_eq!((launched.uid.to_string(), &launched.groups), (expected[0].to_owned(), groups));
        assert_eq!(launched.gid.to_string(), expected[1]);
        assert_eq!(running.finish().lines(), expected);
    }
    let error = pod.start(&nobody).err().unwrap();
    assert!(error.is_invalid_request());
    assert_eq!(error.to_string(), "unable to find user nobody: no matching entries in /etc/passwd");
}

fn another_user_can_reopen_its_standard_output() {
    let image = image("image", |_| ());
    let mut wanted = Wanted::script("one", &image, "echo out > /dev/stdout; echo err > /dev/stderr");
    wanted.process().user = named("web");
    let pod = Pod::enter();
    let output = pod.run(&wanted);
    assert_eq!((output.stdout.as_str(), output.stderr.as_str()), ("out\n", "err\n"));
}

fn home_and_path_have_defaults() {
    let image = image("image", |_| ());
    let plain = Wanted::script("plain", &image, "echo $HOME $PATH");
    let mut own = Wanted::script("own", &image, "echo $HOME $PATH $A");
    own.process().env = ["HOME=/x", "PATH=/bin", "A=1", "A=2"].map(String::from).to_vec();
    let pod = Pod::enter();
    let default = "/root /usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    assert_eq!(pod.run(&plain).lines(), [default]);
    assert_eq!(pod.run(&own).lines(), ["/x /bin 2"]);
}

fn a_program_that_cannot_run_is_named_in_the_error() {
    let image = image("image", |root| {
        let write = |name: &str, content: &str, mode| {
            fs::write(root.join(name), content).unwrap();
            fs::set_permissions(root.join(name), fs::Permissions::from_mode(mode)).unwrap();
        };
        write("script", "#!/no/interpreter\n", 0o755);
        write("denied", "#!/bin/sh\n", 0o644);
        write("bin/denied", "#!/bin/sh\n", 0o644);
        write("junk", "\x01\x02\x03", 0o755);
    });
    let cases = [
        ("foo", "exec: \"foo\": executable file not found in $PATH"),
        ("/foo", "exec: \"/foo\": stat /foo: no such file or directory"),
        ("/denied", "exec: \"/denied\": permission denied"),
        ("denied", "exec: \"denied\": permission denied"),
        ("/tmp", "exec: \"/tmp\": permission denied"),
        ("/junk", "exec /junk: exec format error"),
        (
            "/script",
            "exec /script: no such file or directory (the file is there: its interpreter or dynamic loader is not)",
        ),
    ];
    let wanted = cases.map(|(program, message)| {
        let name = format!("c{}", program.replace('/', "-"));
        (Wanted::new(&name, std::slice::from_ref(&image), &[program]), message)
    });
    let pod = Pod::enter();
    for (wanted, message) in &wanted {
        let Err(LaunchError::Failed(failure)) = pod.start(wanted) else { panic!("{message}") };
        assert_eq!((failure.stage, failure.message.as_str()), (Stage::Execute, *message));
        assert_ne!(failure.errno, 0);
    }
}

fn limits_and_oom_score_are_set() {
    let image = image("image", |_| ());
    let mut wanted = Wanted::script("one", &image, "ulimit -n; ulimit -c; cat /proc/self/oom_score_adj");
    let limit = |name: &str, soft, hard| messages::Rlimit { r#type: name.into(), soft, hard };
    wanted.process().rlimits = vec![limit("RLIMIT_NOFILE", 100, 200), limit("RLIMIT_CORE", 0, 0)];
    wanted.process().oom_score_adj = Some(5000);
    // Lower than this machine may allow: what it was stays.
    let mut lowered = Wanted::script("lowered", &image, "true");
    lowered.process().oom_score_adj = Some(-999);
    let pod = Pod::enter();
    assert_eq!(pod.run(&wanted).lines(), ["100", "0", "1000"]);
    assert_eq!(pod.run(&lowered).code, 0);
}

fn a_terminal_is_the_containers_own() {
    let image = image("image", |_| ());
    let script = "tty; stty size; readlink /proc/self/fd/0; readlink /proc/self/fd/2; [ -c /dev/console ] && echo console; \
        echo hi > /dev/console; stat -c %u /dev/pts/0; : < /dev/tty && echo controlling";
    let mut wanted = Wanted::script("one", &image, script);
    let process = wanted.process();
    (process.terminal, process.terminal_rows, process.terminal_columns) = (true, 33, 99);
    process.user = named("web");
    let pod = Pod::enter();
    let running = pod.start(&wanted).unwrap();
    let mut text = Vec::new();
    let mut terminal = File::from(running.launched.terminal.as_ref().unwrap().try_clone().unwrap());
    // The end of a terminal is EIO.
    let _ = terminal.read_to_end(&mut text);
    let text = String::from_utf8(text).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let expected = ["/dev/pts/0", "33 99", "/dev/pts/0", "/dev/pts/0", "console", "hi", "33", "controlling"];
    assert_eq!(lines, expected);
    assert_eq!(running.finish().code, 0);
}

fn without_no_new_privs_a_user_still_gets_the_filter() {
    let image = image("image", |_| ());
    let script = "grep -E 'Cap(Bnd|Eff)|NoNewPrivs|Seccomp:' /proc/self/status";
    let mut wanted = Wanted::script("user", &image, script);
    wanted.process().user = named("web");
    wanted.process().no_new_privs = false;
    let pod = Pod::enter();
    let output = pod.run(&wanted);
    let status = fields(&output.lines());
    assert_eq!(status["CapEff"], "0000000000000000");
    assert_eq!((status["NoNewPrivs"].as_str(), status["Seccomp"].as_str()), ("0", "2"));
}

/// Loads of a filter that kills on setgroups, sethostname, mount and socket calls: what the launch does before it must
/// not meet it, with or without no_new_privs.
fn a_seccomp_profile_that_forbids_everything_else_still_starts() {
    let image = image("image", |_| ());
    let with = |name: &str, no_new_privs: bool| {
        let mut wanted = Wanted::new(name, std::slice::from_ref(&image), &["true"]);
        wanted.process().seccomp = deny(&[
            libc_number::SETGROUPS,
            libc_number::SETRESUID,
            libc_number::SETRESGID,
            libc_number::MOUNT_SETATTR,
            libc_number::CLOSE_RANGE,
            libc_number::SENDMSG,
            libc_number::SENDTO,
        ]);
        wanted.process().no_new_privs = no_new_privs;
        wanted
    };
    let wanted = [with("with", true), with("without", false)];
    let pod = Pod::enter();
    for wanted in &wanted {
        assert_eq!(pod.run(wanted).code, 0);
    }
}

/// x86_64 and aarch64 system call numbers.
mod libc_number {
    #[cfg(target_arch = "x86_64")]
    mod arch {
        pub(crate) const SETGROUPS: u32 = 116;
        pub(crate) const SETRESUID: u32 = 117;
        pub(crate) const SETRESGID: u32 = 119;
        pub(crate) const SENDMSG: u32 = 46;
        pub(crate) const SENDTO: u32 = 44;
    }
    #[cfg(target_arch = "aarch64")]
    mod arch {
        pub(crate) const SETGROUPS: u32 = 159;
        pub(crate) const SETRESUID: u32 = 147;
        pub(crate) const SETRESGID: u32 = 149;
        pub(crate) const SENDMSG: u32 = 211;
        pub(crate) const SENDTO: u32 = 206;
    }
    pub(crate) use arch::*;
    pub(crate) const MOUNT_SETATTR: u32 = 442;
    pub(crate) const CLOSE_RANGE: u32 = 436;
}

/// A filter that kills the process at these calls.
fn deny(calls: &[u32]) -> Vec<u8> {
    let instruction = |code: u16, jump_true: u8, jump_false: u8, value: u32| {
        let mut bytes = code.to_ne_bytes().to_vec();
        bytes.extend([jump_true, jump_false]);
        bytes.extend(value.to_ne_bytes());
        bytes
    };
    // BPF_LD | BPF_W | BPF_ABS of seccomp_data.nr; BPF_JMP | BPF_JEQ | BPF_K; BPF_RET | BPF_K.
    let mut program = instruction(0x20, 0, 0, 0);
    for (index, call) in calls.iter().enumerate() {
        let to_kill = (calls.len() - index) as u8;
        program.extend(instruction(0x15, to_kill, 0, *call));
    }
    program.extend(instruction(0x06, 0, 0, 0x7fff_0000));
    program.extend(instruction(0x06, 0, 0, 0x8000_0000));
    program
}

fn a_security_label_is_set_or_the_launch_fails() {
    let image = image("image", |_| ());
    let with = |name: &str, profile: &str| {
        let mut wanted = Wanted::script(name, &image, "cat /proc/self/attr/apparmor/current");
        wanted.process().apparmor_profile = profile.into();
        wanted
    };
    let (missing, unconfined) = (with("missing", "no-such-profile"), with("unconfined", "unconfined"));
    let enabled =
        fs::read_to_string("/sys/module/apparmor/parameters/enabled").is_ok_and(|on| on.starts_with('Y'));
    let pod = Pod::enter();
    let error = pod.start(&missing).err().map(|error| error.to_string());
    // AppArmor looks the profile up when it is named; without AppArmor there is nobody to name it to.
    let error = error.expect("a profile that is not there stops the launch");
    assert!(error.contains("AppArmor profile no-such-profile") || error.starts_with("exec "), "{error}");
    if enabled {
        assert_eq!(pod.run(&unconfined).lines(), ["unconfined"]);
    }
}
