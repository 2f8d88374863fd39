//! (module engine)
pub mod queue;
pub mod sampler;
