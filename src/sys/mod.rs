//! (module sys)
pub mod poll;
pub mod signals;
pub mod tty;
