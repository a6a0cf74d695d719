use std::io::Write;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// How a layer's tar travels.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    Plain,
    Gzip,
    Zstd,
}

/// One layer under construction: a tar in memory.
pub struct Layer {
    tar: tar::Builder<Vec<u8>>,
}

impl Default for Layer {
    fn default() -> Self {
        Layer { tar: tar::Builder::new(Vec::new()) }
    }
}

impl Layer {
    pub fn directory(self, path: &str) -> Self {
        self.entry(path, tar::EntryType::Directory, 0o755, 0, b"", None)
    }

    pub fn file(self, path: &str, mode: u32, content: &[u8]) -> Self {
        self.entry(path, tar::EntryType::Regular, mode, 0, content, None)
    }

    pub fn owned_file(self, path: &str, mode: u32, owner: u64, content: &[u8]) -> Self {
        self.entry(path, tar::EntryType::Regular, mode, owner, content, None)
    }

    /// A program whose file gives these capabilities (bits of the low 32), permitted and effective.
    pub fn capable_file(mut self, path: &str, capabilities: u32, content: &[u8]) -> Self {
        // capabilities(7), vfs_cap_data of revision 2: magic with the effective bit, then two pairs of words.
        let words = [0x0200_0001, capabilities, 0, 0, 0];
        let value: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
        self.tar.append_pax_extensions([("SCHILY.xattr.security.capability", value.as_slice())]).unwrap();
        self.file(path, 0o755, content)
    }

    pub fn symlink(self, path: &str, target: &str) -> Self {
        self.entry(path, tar::EntryType::Symlink, 0o777, 0, b"", Some(target))
    }

    /// OCI whiteout: `path` of the layers below is gone.
    pub fn without(self, path: &str) -> Self {
        let (directory, name) = path.rsplit_once('/').map_or(("", path), |(d, n)| (d, n));
        let whiteout =
            if directory.is_empty() { format!(".wh.{name}") } else { format!("{directory}/.wh.{name}") };
        self.file(&whiteout, 0o644, b"")
    }

    fn entry(
        mut self,
        path: &str,
        kind: tar::EntryType,
        mode: u32,
        owner: u64,
        content: &[u8],
        target: Option<&str>,
    ) -> Self {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(owner);
        header.set_gid(owner);
        header.set_mtime(1_700_000_000);
        header.set_size(content.len() as u64);
        match target {
            Some(target) => self.tar.append_link(&mut header, path, target).unwrap(),
            None => self.tar.append_data(&mut header, path, content).unwrap(),
        }
        self
    }

    /// The archive.
    pub fn finish(self) -> Vec<u8> {
        self.tar.into_inner().unwrap()
    }
}

/// An image ready for a registry.
pub struct Image {
    blobs: Vec<Vec<u8>>,
    manifest: Vec<u8>,
}

impl Image {
    /// From tars, the lowest first, and the `config` object of the image configuration.
    pub fn new(layers: Vec<(Layer, Packing)>, config: Value) -> Image {
        Image::from_tars(
            layers.into_iter().map(|(layer, packing)| (layer.finish(), packing)).collect(),
            config,
        )
    }

    pub fn from_tars(layers: Vec<(Vec<u8>, Packing)>, config: Value) -> Image {
        let mut blobs = Vec::new();
        let mut diff_ids = Vec::new();
        let mut descriptors = Vec::new();
        for (tar, packing) in layers {
            diff_ids.push(digest(&tar));
            let (blob, media_type) = pack(tar, packing);
            descriptors.push(json!({"mediaType": media_type, "digest": digest(&blob), "size": blob.len()}));
            blobs.push(blob);
        }
        let config = json!({
            "architecture": "amd64", "os": "linux", "created": "2024-01-01T00:00:00Z", "config": config,
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
            "history": diff_ids.iter().map(|_| json!({"created_by": "hull tests"})).collect::<Vec<_>>(),
        });
        let config = serde_json::to_vec(&config).unwrap();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest(&config), "size": config.len()},
            "layers": descriptors,
        });
        blobs.push(config);
        Image { blobs, manifest: serde_json::to_vec(&manifest).unwrap() }
    }

    pub fn blobs(&self) -> impl Iterator<Item = &[u8]> {
        self.blobs.iter().map(Vec::as_slice)
    }

    /// How many layers it has.
    pub fn layers(&self) -> usize {
        self.blobs.len() - 1
    }

    pub fn manifest(&self) -> &[u8] {
        &self.manifest
    }

    pub fn manifest_type(&self) -> &'static str {
        "application/vnd.oci.image.manifest.v1+json"
    }

    /// `sha256:…` of the configuration: the image's id.
    pub fn id(&self) -> String {
        digest(self.blobs.last().expect("the configuration is the last blob"))
    }
}

/// busybox with its applets as links in /bin, and the files a container expects.
pub fn busybox_layer() -> Layer {
    let busybox = std::fs::read("/bin/busybox").expect("/bin/busybox (Debian package busybox-static)");
    let mut layer = Layer::default().directory("bin").file("bin/busybox", 0o755, &busybox);
    for applet in [
        "sh", "cat", "echo", "ls", "sleep", "true", "false", "id", "env", "pwd", "ps", "mount", "grep",
        "head", "seq", "date", "hostname", "touch", "mkdir", "rm", "dd", "kill", "stat", "df", "nc", "wget",
        "ip", "ping", "readlink", "mknod", "chmod", "tail", "wc", "yes", "test", "sysctl", "tty", "stty",
        "trap", "usleep", "httpd", "nslookup", "tr", "cut", "sort", "awk", "sed", "find", "unshare",
        "chroot", "umount", "sync", "uname", "whoami", "nproc", "printf", "expr",
    ] {
        layer = layer.symlink(&format!("bin/{applet}"), "busybox");
    }
    layer
        .directory("etc")
        .file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1000:web:/home/web:/bin/sh\n")
        .file("etc/group", 0o644, b"root:x:0:\nweb:x:1000:\naudio:x:29:web\nvideo:x:44:web\n")
        .directory("tmp")
        .directory("home")
        .directory("home/web")
}

/// The host's perl with the libraries that it needs: sockets, locks and raw system calls from a script.
pub fn perl_layer() -> Layer {
    let read = |path: &str| std::fs::read(path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let listed =
        std::process::Command::new("ldd").arg("/usr/bin/perl").output().expect("ldd (package libc-bin)");
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    let mut layer = Layer::default().directory("usr").directory("usr/bin").file(
        "usr/bin/perl",
        0o755,
        &read("/usr/bin/perl"),
    );
    for path in listed.split_whitespace().filter(|word| word.starts_with('/')) {
        layer = layer.file(path.trim_start_matches('/'), 0o755, &read(path));
    }
    layer
}

/// Three layers in three packings: busybox; a file to be hidden and one to stay; a whiteout and a greeting.
pub fn busybox() -> Image {
    Image::new(
        vec![
            (busybox_layer(), Packing::Gzip),
            (
                Layer::default().directory("data").file("data/hidden", 0o644, b"hidden\n").file(
                    "data/kept",
                    0o640,
                    b"kept\n",
                ),
                Packing::Zstd,
            ),
            (
                Layer::default().without("data/hidden").file(
                    "greeting",
                    0o644,
                    b"hello from the top layer\n",
                ),
                Packing::Plain,
            ),
        ],
        json!({"Env": ["PATH=/bin", "FROM_IMAGE=yes"], "Cmd": ["/bin/sh"], "WorkingDir": "/"}),
    )
}

/// `sha256:<hex>` of some bytes.
pub fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

fn pack(tar: Vec<u8>, packing: Packing) -> (Vec<u8>, &'static str) {
    match packing {
        Packing::Plain => (tar, "application/vnd.oci.image.layer.v1.tar"),
        Packing::Gzip => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(&tar).unwrap();
            (encoder.finish().unwrap(), "application/vnd.oci.image.layer.v1.tar+gzip")
        }
        Packing::Zstd => {
            (zstd::encode_all(tar.as_slice(), 1).unwrap(), "application/vnd.oci.image.layer.v1.tar+zstd")
        }
    }
}
