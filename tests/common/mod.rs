//! What several integration tests share.
#![allow(dead_code, clippy::unwrap_used)]

pub mod real;
pub mod tiny;
