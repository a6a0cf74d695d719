//! Pod networks: the built-in bridge and CNI plugins.
#![forbid(unsafe_code)]
