//! What hearth needs of the kernel and the CPU: memory maps, pinning, worker threads, epoll, signals, serial lines, the line to whoever
//! supervises, and a sandbox against itself.
//! Everything above this module is safe code; `fault`, `map`, `wipe` and `workers` hold the crate's `unsafe`.

pub mod cpu;
pub mod fault;
pub mod heartbeat;
pub mod map;
pub mod marks;
pub mod poll;
pub mod record;
pub mod report;
pub mod sandbox;
pub mod settings;
pub mod signals;
pub mod tty;
pub mod wipe;
pub mod workers;
