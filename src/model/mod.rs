//! (module model)
pub mod gguf;
pub mod vocab;
