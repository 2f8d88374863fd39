//! (module tools)
