//! Whole-system tests of hull: see tests/.
#![forbid(unsafe_code)]
