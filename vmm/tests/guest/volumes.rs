//! Volumes: what kubelet writes, scratch and memory, single files.

use std::fs;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use hull_agent::protocol::messages::{
    AddVolume, ReadVolume, RemoveVolume, VolumePath, WriteVolume, add_volume, request::Call,
    response::Outcome, slot::Kind, write_volume,
};

use crate::agent::{Agent, Container, exec};
use crate::disk;
use crate::machine::Machine;

/// Prints the names of entries that are renamed into a directory.
const WATCH: &str = r#"
#include <stdio.h>
#include <unistd.h>
#include <sys/inotify.h>
int main(int count, char **arguments) {
    char buffer[4096];
    int watcher = inotify_init();
    inotify_add_watch(watcher, arguments[1], IN_MOVED_TO);
    for (;;) {
        ssize_t length = read(watcher, buffer, sizeof buffer);
        for (char *at = buffer; at < buffer + length; at += sizeof(struct inotify_event) + ((struct inotify_event *)at)->len)
            printf("moved %s\n", ((struct inotify_event *)at)->name);
        fflush(stdout);
    }
}
"#;

fn add(agent: &mut Agent, id: &str, kind: add_volume::Kind) {
    let spec =
        AddVolume { id: id.into(), kind: Some(kind), gid: Some(1000), mode: 0o2775, ..AddVolume::default() };
    agent.done(Call::AddVolume(spec.clone()), vec![]);
    // Again changes nothing.
    agent.done(Call::AddVolume(spec), vec![]);
}

fn write(agent: &mut Agent, id: &str, generation: u64, files: &[(&str, &str)]) {
    let entries = files.iter().map(|(path, content)| write_volume::Entry {
        path: (*path).into(),
        content: Some(write_volume::entry::Content::File((*content).into())),
        ..Default::default()
    });
    let call = WriteVolume { id: id.into(), generation, entries: entries.collect(), last: true };
    agent.done(Call::WriteVolume(call), vec![]);
}

fn place(id: &str, path: &str) -> Kind {
    Kind::Volume(VolumePath { id: id.into(), path: path.into() })
}

fn output(machine: &mut Machine, agent: &mut Agent, container: &str, script: &str) -> String {
    let (number, mut stream) = machine.stream();
    let mut call = exec(container, script);
    call.stdout = Some(0);
    let id = agent.send(Call::Exec(call), vec![Kind::Stream(number)]);
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert!(matches!(agent.response(id), Outcome::ExecEnded(_)));
    text
}

#[test]
fn volumes_are_shared_followed_and_read_back() {
    let Some(mut machine) = Machine::boot(1, 256 << 20) else { return };
    let tree = machine.directory.path().join("busybox");
    disk::busybox(&tree, &[]);
    disk::compile(WATCH, &tree.join("bin/follow"));
    let image = machine.image(&tree);
    let mut agent = machine.agent();
    agent.create(|_| ());

    add(&mut agent, "config", add_volume::Kind::Copied(add_volume::Copied {}));
    write(&mut agent, "config", 1, &[("key", "old"), ("sub/deep", "x")]);
    add(&mut agent, "memory", add_volume::Kind::Memory(add_volume::Memory { size: 1 << 20 }));
    write(&mut agent, "memory", 1, &[("termination", "")]);
    let scratch = machine.scratch();
    add(&mut agent, "data", add_volume::Kind::Scratch(scratch));

    let log = machine.log("one");
    let watch = "follow /config & while :; do sleep 1; done";
    let mut one = Container::new("one", image, machine.scratch(), watch);
    one.mount("/config", place("config", ""));
    one.mount("/single", place("config", "key"));
    one.mount("/memory", place("memory", ""));
    one.mount("/data", place("data", "made/here"));
    one.mount("/etc/resolv.conf", Kind::File(b"nameserver 192.0.2.1\n".to_vec()));
    one.mount("/dev/termination-log", place("memory", "termination"));
    agent.start(one);
    machine.log("two");
    let mut two = Container::new("two", image, machine.scratch(), "while :; do sleep 1; done");
    two.mount("/data", place("data", ""));
    agent.start(two);

    let script = "cat /config/key /config/sub/deep /single /etc/resolv.conf; readlink /config/key; \
        stat -c '%a %g' /memory /data; dd if=/dev/zero of=/memory/big bs=1M count=2 2>/dev/null || echo full; rm /memory/big; \
        mkfifo /data/pipe; echo last words > /dev/termination-log; ln -s /etc/passwd /memory/out";
    let text = output(&mut machine, &mut agent, "one", script);
    assert_eq!(text, "oldxoldnameserver 192.0.2.1\n..data/key\n2775 1000\n2775 1000\nfull\n");
    assert_eq!(
        output(&mut machine, &mut agent, "two", "ls -F /data /data/made/here"),
        "/data:\nmade/\n\n/data/made/here:\npipe|\n"
    );

    // An update is one event and one step; a file that was mounted by itself stays what it was, as on a host.
    write(&mut agent, "config", 2, &[("key", "new"), ("more", "y")]);
    assert_eq!(
        output(&mut machine, &mut agent, "one", "cat /config/key /config/more /single; ls /config"),
        "newyoldkey\nmore\n"
    );
    let start = Instant::now();
    while !fs::read_to_string(&log).unwrap().contains("moved ..data\n") {
        assert!(start.elapsed() < crate::PATIENCE, "no event: {}", fs::read_to_string(&log).unwrap());
        std::thread::sleep(Duration::from_millis(20));
    }

    let read = |path: &str| Call::ReadVolume(ReadVolume { id: "memory".into(), path: path.into(), limit: 5 });
    match agent.call(read("termination"), vec![]) {
        Outcome::VolumeContent(found) => assert_eq!(found.content, b"ords\n"),
        other => panic!("{other:?}"),
    }
    // What a container put there leads nowhere.
    agent.error(read("out"), vec![]);
    let mut bad = Container::new("bad", image, machine.scratch(), "true");
    bad.mount("/x", place("memory", "out"));
    let id = agent.start_later(bad);
    assert!(matches!(agent.response(id), Outcome::Error(_)));

    // A removed volume stays with those who have it.
    agent.done(Call::RemoveVolume(RemoveVolume { id: "memory".into() }), vec![]);
    assert_eq!(output(&mut machine, &mut agent, "one", "cat /memory/termination"), "last words\n");
    assert!(matches!(agent.call(read("termination"), vec![]), Outcome::Error(_)));
}

#[test]
fn directories_and_files_of_the_host_are_the_same_in_every_container() {
    let Some(mut machine) = Machine::boot(1, 256 << 20) else { return };
    let tree = machine.directory.path().join("busybox");
    disk::busybox(&tree, &[]);
    let image = machine.image(&tree);
    let mut agent = machine.agent();
    agent.create(|_| ());
    let host = machine.directory.path().join("host");
    fs::create_dir(&host).unwrap();
    fs::write(host.join("file"), "from the host").unwrap();
    let server = machine.serve_volumes();
    let open = |path: &Path| {
        let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
        rustix::fs::open(path, flags, rustix::fs::Mode::empty()).unwrap()
    };
    let file = host.join("file");
    server.attach(0, &host, open(&host).as_fd(), false).unwrap();
    server.attach(1, &file, open(&file).as_fd(), true).unwrap();
    for (id, index, directory) in [("host", 0, true), ("single", 1, false)] {
        let kind = add_volume::Kind::Shared(add_volume::Shared { index, directory });
        agent.done(
            Call::AddVolume(AddVolume { id: id.into(), kind: Some(kind), ..Default::default() }),
            vec![],
        );
    }
    for id in ["one", "two"] {
        machine.log(id);
        let mut container = Container::new(id, image, machine.scratch(), "while :; do sleep 1; done");
        container.mount("/host", place("host", ""));
        container.mount("/single", place("single", ""));
        agent.start(container);
    }
    let script = "cat /host/file /single; (echo x > /single) 2>/dev/null || echo read-only; \
        echo written > /host/new; chown 1000:70 /host/new; mkdir /host/sub; echo; id -u";
    let text = output(&mut machine, &mut agent, "one", script);
    assert_eq!(text, "from the hostfrom the hostread-only\n\n0\n");
    assert_eq!(
        output(&mut machine, &mut agent, "two", "stat -c '%u %g' /host/new; cat /host/new"),
        "1000 70\nwritten\n"
    );
    assert_eq!(fs::read_to_string(host.join("new")).unwrap(), "written\n");
    let facts = fs::metadata(host.join("new")).unwrap();
    assert_eq!((facts.uid(), facts.gid()), (1000, 70));
}
