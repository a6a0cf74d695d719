//! More processes in a running container.

use std::fs::File;
use std::io::Read;

use hull_agent::protocol::messages::{self, user};

use crate::support::{Pod, Wanted, allow_everything, fields, image, process};

crate::tests!(
    an_exec_is_inside_in_every_way,
    an_exec_can_bring_its_own_process,
    an_exec_in_an_ended_container_fails,
    an_exec_can_have_a_terminal,
    an_exec_of_nothing_says_so,
    an_exec_survives_a_hostile_container,
    each_process_enters_its_class_of_cache_and_memory_bandwidth,
    an_exec_outlives_the_class_of_its_container,
    no_process_has_the_session_keyring_of_the_agent,
);

const SLEEP: &str = "echo ready; exec sleep 1000";

fn an_exec_is_inside_in_every_way() {
    let image = image("image", |_| ());
    let script = "for n in mnt pid ipc uts net cgroup; do readlink /proc/self/ns/$n; done; \
        grep -E 'Cap(Bnd|Eff)|NoNewPrivs|Seccomp:|Uid|Groups' /proc/self/status; cat /proc/self/cgroup; pwd; echo $A";
    let mut wanted = Wanted::script("one", &image, &format!("({script}) > /tmp/first; {SLEEP}"));
    let process = wanted.process();
    process.user = Some(messages::User { user: Some(user::User::Name("web".into())), ..Default::default() });
    process.cwd = "/tmp".into();
    process.env = vec!["A=from the container".into()];
    let image_tmp = image.join("tmp");
    std::fs::set_permissions(image_tmp, std::os::unix::fs::PermissionsExt::from_mode(0o1777)).unwrap();
    let pod = Pod::enter();
    let mut running = pod.start(&wanted).unwrap();
    assert_eq!(running.line(), "ready");
    let first = pod.exec(&running, "cat /tmp/first");
    let second = pod.exec(&running, script);
    assert_eq!(first.lines(), second.lines());
    assert_eq!(pod.exec(&running, "exit 7").code, 7);
    assert_eq!(
        pod.exec(
            &running,
            "[ $$ != 1 ] && for f in /proc/$$/fd/*; do [ -e $f ] && echo ${f##*/}; done; true"
        )
        .lines(),
        ["0", "1", "2"]
    );
    let started = pod.exec(&running, "sleep 0.01");
    assert_eq!(started.code, 0);
    running.kill();
    assert_eq!(pod.processes(), []);
}

fn an_exec_can_bring_its_own_process() {
    let image = image("image", |_| ());
    let wanted = Wanted::script("one", &image, SLEEP);
    let pod = Pod::enter();
    let mut running = pod.start(&wanted).unwrap();
    assert_eq!(running.line(), "ready");
    let mut request = process(&["sh", "-c", "grep -E 'Cap(Bnd|Eff)|Seccomp:' /proc/self/status; id -u; pwd"]);
    (request.cap_bounding, request.cap_effective, request.cap_permitted) = (1, 1, 1);
    request.seccomp = allow_everything();
    request.cwd = "/etc".into();
    let output = pod.exec_request(&running, &request, false).unwrap().finish();
    let lines = output.lines();
    let status = fields(&lines);
    assert_eq!(
        (status["CapBnd"].as_str(), status["CapEff"].as_str()),
        ("0000000000000001", "0000000000000001")
    );
    assert_eq!(lines[3..], ["0", "/etc"]);
    running.kill();
}

fn an_exec_in_an_ended_container_fails() {
    let image = image("image", |_| ());
    let wanted = Wanted::script("one", &image, SLEEP);
    let pod = Pod::enter();
    let running = pod.start(&wanted).unwrap();
    hull_sys::process::pidfd_send_signal(std::os::fd::AsFd::as_fd(&running.launched.pidfd), 9).unwrap();
    // A zombie: its namespaces are gone, its pidfd is not.
    std::thread::sleep(std::time::Duration::from_millis(50));
    let request = messages::Process { args: vec!["true".into()], ..Default::default() };
    let error = pod.exec_request(&running, &request, true).err().unwrap().to_string();
    assert!(error.contains("ended"), "{error}");
    running.finish();
}

fn an_exec_can_have_a_terminal() {
    let image = image("image", |_| ());
    let wanted = Wanted::script("one", &image, SLEEP);
    let pod = Pod::enter();
    let mut running = pod.start(&wanted).unwrap();
    assert_eq!(running.line(), "ready");
    let mut request = messages::Process {
        args: vec!["sh".into(), "-c".into(), "tty; stty size".into()],
        ..Default::default()
    };
    (request.terminal, request.terminal_rows, request.terminal_columns) = (true, 10, 20);
    let started = pod.exec_request(&running, &request, true).unwrap();
    let mut text = Vec::new();
    let _ =
        File::from(started.launched.terminal.as_ref().unwrap().try_clone().unwrap()).read_to_end(&mut text);
    assert_eq!(String::from_utf8(text).unwrap(), "/dev/pts/0\r\n10 20\r\n");
    started.finish();
    running.kill();
}

fn an_exec_of_nothing_says_so() {
    let image = image("image", |_| ());
    let wanted = Wanted::script("one", &image, SLEEP);
    let pod = Pod::enter();
    let mut running = pod.start(&wanted).unwrap();
    assert_eq!(running.line(), "ready");
    let request = messages::Process { args: vec!["foo".into()], ..Default::default() };
    let error = pod.exec_request(&running, &request, true).err().unwrap();
    assert_eq!(error.to_string(), "exec: \"foo\": executable file not found in $PATH");
    assert!(error.is_invalid_request() && error.errno() == 2);
    running.kill();
}

/// The container has made its own /etc/passwd, /dev/pts/ptmx and cwd into traps.
fn an_exec_survives_a_hostile_container() {
    let image = image("image", |_| ());
    let script = format!(
        "rm /etc/passwd; mkfifo /etc/passwd; umount /dev/pts; mkfifo /dev/pts/ptmx; mkdir /w; {SLEEP}"
    );
    let mut wanted = Wanted::script("one", &image, &script);
    let process = wanted.process();
    let admin = process.cap_bounding | 1 << 21;
    (process.cap_bounding, process.cap_effective, process.cap_permitted) = (admin, admin, admin);
    let pod = Pod::enter();
    let mut running = pod.start(&wanted).unwrap();
    assert_eq!(running.line(), "ready");
    let mut request = messages::Process { args: vec!["true".into()], ..Default::default() };
    let error = pod.exec_request(&running, &request, true).err().unwrap().to_string();
    assert_eq!(error, "cannot read /etc/passwd of the image: not a regular file");
    request.terminal = true;
    let error = pod.exec_request(&running, &request, true).err().unwrap().to_string();
    assert!(error.contains("/etc/passwd"), "{error}");
    running.kill();
}

fn each_process_enters_its_class_of_cache_and_memory_bandwidth() {
    let image = image("image", |_| ());
    let mut wanted = Wanted::script("one", &image, SLEEP);
    let path = crate::support::scratch().join("tasks");
    let tasks = File::options().append(true).create(true).open(&path).unwrap();
    wanted.spec.rdt_tasks = Some(wanted.slot(tasks.try_clone().unwrap().into()));
    // A class that takes nobody: the process does not run outside of it.
    let mut refused = Wanted::script("two", &image, SLEEP);
    let full = File::options().write(true).open("/dev/full").unwrap();
    refused.spec.rdt_tasks = Some(refused.slot(full.into()));
    let mut pod = Pod::enter();
    pod.rdt_tasks = Some(tasks.try_clone().unwrap().into());
    let mut running = pod.start(&wanted).unwrap();
    assert_eq!(running.line(), "ready");
    assert_eq!(pod.exec(&running, "exit 7").code, 7);
    // Zero is whoever writes it.
    assert_eq!(pod.on_host(|| std::fs::read_to_string(&path)).unwrap(), "00");
    running.kill();
    let error = pod.start(&refused).err().unwrap();
    assert!(error.to_string().contains("cannot enter the RDT class"), "{error}");
    refused.spec.rdt_tasks = Some(99);
    assert!(pod.start(&refused).err().unwrap().to_string().contains("no slot 99"));
    assert_eq!(pod.processes(), []);
}

fn an_exec_outlives_the_class_of_its_container() {
    // Given a container, and the file of a group that was removed: of a cgroup, which like resctrl is of kernfs
    let image = image("image", |_| ());
    let wanted = Wanted::script("one", &image, SLEEP);
    let group = format!("/sys/fs/cgroup/unified/hull-test-class-{}", std::process::id());
    let group = match std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        true => group.replace("/unified/", "/"),
        false => group,
    };
    std::fs::create_dir(&group).unwrap();
    let tasks = File::options().write(true).open(format!("{group}/cgroup.procs")).unwrap();
    std::fs::remove_dir(&group).unwrap();
    let mut late = Wanted::script("two", &image, SLEEP);
    late.spec.rdt_tasks = Some(late.slot(tasks.try_clone().unwrap().into()));
    let full = File::options().write(true).open("/dev/full").unwrap();
    let mut pod = Pod::enter();
    let mut running = pod.start(&wanted).unwrap();
    assert_eq!(running.line(), "ready");
    // When a process is started in it, then it runs
    pod.rdt_tasks = Some(tasks.into());
    assert_eq!(pod.exec(&running, "exit 7").code, 7);
    // And what is wrong with a class that is there is still an error
    pod.rdt_tasks = Some(full.into());
    let request = messages::Process { args: vec!["true".into()], ..Default::default() };
    let error = pod.exec_request(&running, &request, true).err().unwrap().to_string();
    assert!(error.contains("cannot enter the RDT class"), "{error}");
    running.kill();
    // A first process does not begin in a class that has gone
    let error = pod.start(&late).err().unwrap().to_string();
    assert!(error.contains("cannot enter the RDT class"), "{error}");
    assert_eq!(pod.processes(), []);
}

fn no_process_has_the_session_keyring_of_the_agent() {
    hull_sys::confine::leave_session_keyring().unwrap();
    let sessions = |text: &str| -> Vec<String> {
        let of_sessions = text.lines().filter(|line| line.contains(" _ses"));
        of_sessions.filter_map(|line| Some(line.split(' ').next()?.to_owned())).collect()
    };
    let agents = sessions(&std::fs::read_to_string("/proc/keys").unwrap());
    let image = image("image", |_| ());
    let mut wanted = Wanted::script("one", &image, "cat /proc/keys > /tmp/keys; echo ready; exec sleep 1000");
    wanted.spec.masked_paths.retain(|path| path != "/proc/keys");
    let pod = Pod::enter();
    let mut running = pod.start(&wanted).unwrap();
    assert_eq!(running.line(), "ready");
    for keys in [pod.exec(&running, "cat /tmp/keys"), pod.exec(&running, "cat /proc/keys")] {
        let own = sessions(&keys.stdout);
        assert!(own.iter().any(|session| !agents.contains(session)), "{agents:?} {own:?}");
    }
    running.kill();
}
