//! The virtual machine monitor of microVM pods: one process per pod, a fixed device set, confined.
//!
//! Empty on purpose until microVM pods are built; docs/architecture.md says what comes here.
#![forbid(unsafe_code)]
