//! The agent as the first process of a real machine: hull-vmm with the guest's kernel and initramfs, driven through both
//! protocols as hulld drives them. Where /dev/kvm cannot run a kernel, or target-guest is not built (`hack/build guest`),
//! it says so and does nothing; `hack/node` has a KVM that can.
#![cfg(feature = "machine")]
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod agent;
mod disk;
mod idle;
mod machine;
mod numbers;
mod pod;
mod volumes;

use std::time::Duration;

/// How long a test waits for anything: a guest may be emulated as a whole.
const PATIENCE: Duration = Duration::from_secs(120);
