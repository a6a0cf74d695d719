//! The Linux system calls that hull needs and that no chosen crate offers, each behind a safe function.
//!
//! All `unsafe` that speaks to the kernel lives here; the crates above forbid it or name the one place that needs it.
//! What rustix offers safely is used from rustix; [`mount`] re-exports its part so that mounts have one place.

/// bpf(2): restrict the devices of a cgroup.
pub mod bpf;
/// Set and slew the wall clock.
pub mod clock;
/// Leave behind what a process was started with: descriptors, the session keyring.
pub mod confine;
/// Pass descriptors over unix sockets.
pub mod descriptor;
/// Device mapper: parts of block devices as block devices.
pub mod dm;
/// Loop devices, for layer files on filesystems that cannot back an EROFS mount themselves.
pub mod loopdev;
/// Mappings that large pages fit into.
pub mod mapping;
/// The C library's allocator: keep little, give back much.
pub mod memory;
/// Mounts by descriptor: the new mount API, attributes, pivot_root.
pub mod mount;
/// Enter and make namespaces.
pub mod namespace;
/// Write to an I/O port.
pub mod port;
/// Capabilities, no_new_privs, seccomp and the other attributes a process gives up before it becomes a container.
pub mod privilege;
/// Start processes: clone3 into a cgroup, pidfds, execve, waiting.
pub mod process;
/// Feed the kernel's random number generator.
pub mod random;
/// Block, reset and receive signals.
pub mod signal;
/// Tap devices.
pub mod tun;
/// Sockets between a guest and its host.
pub mod vsock;
/// Start write-back of a file early.
pub mod writeback;
