//! Where things are in the agent's own root, which is almost empty: /proc, /sys and these.

/// Everything that is the pod's own.
pub const RUN: &str = "/run/hull";
/// The pod's shared memory: a tmpfs, or the tree that the request gave.
pub const SHM: &str = "/run/hull/shm";
/// Content of /etc/hostname for containers.
pub const ETC_HOSTNAME: &str = "/run/hull/etc/hostname";
/// Content of /etc/hosts for containers.
pub const ETC_HOSTS: &str = "/run/hull/etc/hosts";
/// Content of /etc/resolv.conf for containers.
pub const ETC_RESOLV_CONF: &str = "/run/hull/etc/resolv.conf";
/// A null device that nobody can replace: the agent's own, and the source of masked files.
pub const NULL: &str = "/run/hull/null";
/// An empty directory (0555): the source of masked directories.
pub const EMPTY: &str = "/run/hull/empty";
/// The cgroup2 hierarchy as the host sees it, on v2 machines only: for containers in the host's cgroup namespace.
pub const CGROUP: &str = "/run/hull/cgroup";
/// Where a starting container, in its own mount namespace, attaches its layers: one directory for each, by number.
pub const LAYERS: &str = "/run/hull/layers";
/// Mount points that images lack, one layer for each set of them (see `container::scaffold`).
pub const SCAFFOLDS: &str = "/run/hull/scaffolds";
/// Where it attaches the directory with `upper` and `work`.
pub const WRITABLE: &str = "/run/hull/writable";
/// Where it attaches an image that becomes a volume.
pub const VOLUME: &str = "/run/hull/volume";
/// Where it attaches its root filesystem.
pub const ROOTFS: &str = "/run/hull/rootfs";
