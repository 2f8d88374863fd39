//! (module model)
pub mod gguf;
