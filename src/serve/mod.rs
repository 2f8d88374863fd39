//! (module serve)
