//! What a container may do, decided in hulld: capabilities, system calls, devices, sysctls and hidden paths.
//!
//! Everything here turns a request into facts for the agent's protocol and refuses what cannot be right. Nothing here
//! changes the machine, but that hull's own AppArmor profile is loaded into the kernel.

/// AppArmor profiles: hull's own, which is loaded here, and the node's.
pub mod apparmor;
/// Capability names, the default set, and the sets a container gets.
pub mod capabilities;
/// Devices by name, as vendors describe them in files.
pub mod cdi;
/// Host devices for containers.
pub mod devices;
/// Paths hidden from containers, or read-only for them.
pub mod paths;
/// Seccomp profiles, compiled to BPF.
pub mod seccomp;
/// SELinux labels of pods and containers.
pub mod selinux;
/// Which sysctls a pod may set.
pub mod sysctl;
