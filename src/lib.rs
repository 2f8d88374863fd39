//! hearth: a sealed, offline LLM appliance in one static binary.
//!
//! # Principles
//! 1. **One answer.** Model, prompt, seed and settings decide every bit of the answer; CPU, threads, batch and chunking do not.
//!    The numeric model that makes it so is written down in `hearth_kernels`.
//! 2. **Memory is planned, then taken, then fixed.** [`plan`] adds up every buffer before the first one is taken.
//! 3. **Nothing leaves.** No network, no telemetry, no prompt in a log.
//! 4. **It comes back.** A client, a line of noise or a full queue costs a request, never the daemon.
//! 5. **No byte from outside can crash it**: model files, HTTP, serial lines, chat templates.
//!
//! # One request, file by file
//! ```text
//! bytes ─ serve/conn ─ wire/{http,line} ─ wire/openai ─ text/{chat,bpe,spm} ─ engine/queue ═╗          I/O thread
//!                                                                                        ║ bounded ring of token ids
//! bytes ─ serve/conn ─ wire/openai ─ text/detokenize ─────────────── engine/queue ═══════╣
//!                                                                                        ║
//!              engine/scheduler ─ model/forward ─ hearth_kernels ─ engine/sampler ───────╝          engine + workers
//! ```
//! Text never enters the engine, tensors never leave it: only token ids cross.
//!
//! # Threads
//! | thread | does | waits in |
//! |---|---|---|
//! | `io` | sockets, serial line, signals, tokenizing, detokenizing | epoll |
//! | main, after loading | the engine: schedules, samples, is worker 0 | park, unparked by `io` |
//! | `w1`…`wN` | chunks of one operation at a time, pinned | spin, then park |
//!
//! # Ownership
//! | thing | owner | lent to |
//! |---|---|---|
//! | `Mapping` of a packed model, or the `Region` that a plain one is repacked into | the frame of `tools::session::with_model` | `Model<'m>` and `Vocab<'m>` borrow their bytes |
//! | `Model<'m>`, `Vocab` | the same frame | `&` to engine and I/O thread |
//! | KV cache, scratch, sampler, workers | `Engine` | `&mut` to `forward`, split into disjoint chunks per worker |
//! | KV blocks | a sequence's `BlockTable` | given back when the sequence ends |
//! | rings | the frame of `serve::daemon::run` | producer and consumer halves |
//! | connections, serial line, listener | the I/O thread | nobody |
//! | `hearth serve` and apps as children, watchdog, mounts | PID 1, where there is one | nobody |
//!
//! # Modules, in reading order
//! [`text`] · [`wire`] · [`engine`] · [`model`] · [`sys`] · [`plan`] · [`serve`] · [`tools`] · [`client`] · [`config`] · [`init`]. Imports run downwards: `text` and `wire`
//! know nothing of the rest; `model` knows kernels, `sys` and `text::TokenId`; `engine` knows `model` and `sys`; `plan` adds up what each of them takes; `serve` composes; `config` knows the limits of
//! others; `init` knows `sys` and `config`.

pub mod client;
pub mod config;
pub mod engine;
pub mod init;
pub mod model;
pub mod plan;
pub mod serve;
pub mod sys;
pub mod text;
pub mod tools;
pub mod wire;
