//! The Linux system calls that hull needs and that no chosen crate offers, each behind a safe function.
//!
//! All `unsafe` that speaks to the kernel lives here; the crates above forbid it or name the one place that needs it.

/// Start processes: clone3 into a cgroup, pidfds, namespaces.
pub mod process;
/// Mounts by descriptor: the new mount API, attributes, pivot_root.
pub mod mount;
/// Pass descriptors over unix sockets.
pub mod descriptor;
/// Capabilities, no_new_privs, seccomp and the other attributes a process gives up before it becomes a container.
pub mod privilege;
/// Enter and make namespaces from a thread.
pub mod namespace;
/// Loop devices, for layer files on filesystems that cannot back an EROFS mount themselves.
pub mod loopdev;
