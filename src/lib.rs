//! hearth: a sealed, offline LLM appliance.
pub mod client;
pub mod engine;
pub mod model;
pub mod serve;
pub mod sys;
pub mod text;
pub mod tools;
pub mod wire;
