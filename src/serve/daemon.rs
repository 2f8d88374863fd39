//! `hearth serve`: plan, load, then the engine on this thread and the I/O loop on its own, until a signal.
//!
//! Also the daemon inside `hearth ask --model` and `hearth chat --model`: [`with_daemon`] runs it on a private socket for the
//! length of one client. Next on the data's way: [`super::run`], the I/O loop, and `engine::Engine::run`.

use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use simplelog::{ConfigBuilder, LevelFilter, WriteLogger};

use super::access::SocketSetup;
use super::check::{self, Check};
use super::grammar::{DEFAULT_GRAMMARS, MAX_GRAMMARS};
use super::metrics::Facts;
use super::model_text::ModelText;
use super::pins;
use super::private::PrivateSocket;
use super::{Defaults, ServeError, ServeSetup, Supervisor};
use crate::config::{Config, Serial};
use crate::engine::Engine;
use crate::engine::pace::DEFAULT_STEP_MS;
use crate::engine::queue::Rings;
use crate::engine::sampler::SamplingParams;
use crate::model::gguf::Gguf;
use crate::model::packed::{self, Damage, VerifyError};
use crate::sys::map::{LockError, lock_all};
use crate::sys::marks::{self, Stage};
use crate::sys::report::{self, Reports};
use crate::sys::sandbox::{self, Sandbox, SandboxError};
use crate::sys::{cpu, heartbeat};
use crate::text::chat::{ChatError, ChatTemplate, MAX_TEMPLATE_BYTES};
use crate::text::{TokenId, Vocab};
use crate::tools::session::{
    DEFAULT_MAX_ROWS, DEFAULT_SEQUENCES, ModelArgs, Session, SessionError, Wanted, with_confined_model,
};

/// Stack of the I/O thread, in bytes: JSON of bounded depth, templates with bounded recursion and grammars of bounded depth run there.
pub const IO_STACK_BYTES: usize = 2 << 20;

/// Longest model name in answers, in characters; the rest of a longer `general.name` is left out.
pub const MAX_MODEL_ID_CHARS: usize = 128;

/// Shortest time that a step may be given, in milliseconds, and longest.
pub const MIN_STEP_MS: u64 = 1;
/// See [`MIN_STEP_MS`]: one minute.
pub const MAX_STEP_MS: u64 = 60_000;

/// Run the daemon: HTTP on a UNIX socket, and a serial line where --tty names one.
#[derive(Clone, Debug, clap::Args)]
pub struct ServeArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Settings as the appliance has them (hearth.toml): those that no flag names are taken from there, sockets and who may ask included
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The UNIX socket [default: $HEARTH_SOCKET, $XDG_RUNTIME_DIR/hearth.sock or /run/hearth/hearth.sock, where --config names none]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// A serial line to answer on as well, 115200 8N1
    #[arg(long, value_name = "DEV")]
    tty: Option<PathBuf>,
    #[command(flatten)]
    capacity: CapacityArgs,
    /// Temperature of requests that name none [default: 0]
    #[arg(long, value_name = "T")]
    temperature: Option<f32>,
    /// Tokens an answer may have where the request names no number [default: up to the end of the context]
    #[arg(long, value_name = "N")]
    max_tokens: Option<usize>,
    /// What the daemon gives up once it is ready: syscalls that answering does not take, files, network, capabilities
    #[arg(long, value_enum, value_name = "WHEN", default_value_t)]
    sandbox: sandbox::Mode,
    /// Standard input is the line to `hearth` as PID 1, which looks after this process
    #[arg(long, hide = true)]
    supervised: bool,
    /// Where PID 1 records failures
    #[arg(long, hide = true, value_name = "FILE", requires = "supervised")]
    records: Option<PathBuf>,
    /// Where PID 1 reports how the start went and what a self-test found
    #[arg(long, hide = true, value_name = "DIR", requires = "supervised", default_value = report::FOLDER)]
    reports: PathBuf,
    /// Where PID 1 writes down what apps do
    #[arg(long, hide = true, value_name = "DIR", requires = "supervised")]
    apps: Option<PathBuf>,
}

/// How much at once, and what the chat looks like.
#[derive(Clone, Debug, clap::Args)]
pub struct CapacityArgs {
    /// Positions a sequence [default: 2048, or what the model was trained for]
    #[arg(long, value_name = "N")]
    ctx: Option<usize>,
    /// Sequences at once [default: 4]
    #[arg(long, value_name = "N")]
    sequences: Option<usize>,
    /// How long a step may take while answers stream, in milliseconds: prompts are cut to fit [default: 100]
    #[arg(long, value_name = "MS")]
    step_ms: Option<u64>,
    /// Positions of keys and values kept for what prompts begin with, beside those of the sequences, which keep it while no
    /// conversation needs them [default: enough for every --pin]
    #[arg(long, value_name = "N")]
    prefix_positions: Option<usize>,
    /// Answers that may follow a JSON schema or a grammar at the same time; 0 takes no memory for it [default: 4]
    #[arg(long, value_name = "N")]
    grammars: Option<usize>,
    /// A file with a system prompt whose keys and values are computed at start and kept; may be given several times
    #[arg(long, value_name = "FILE")]
    pin: Vec<PathBuf>,
    /// A chat template (Jinja) to use instead of the model's own
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
    /// The date that chat templates print where a request names none; the clock is never read
    #[arg(long, value_name = "YYYY-MM-DD")]
    date: Option<String>,
    /// Keep the model and every buffer in memory (mlock); what does not fit RLIMIT_MEMLOCK is refused
    #[arg(long)]
    lock: bool,
    /// Compare a packed model with its hashes before the daemon is ready, and refuse it where it is damaged, instead of afterwards in the
    /// background
    #[arg(long)]
    verify: bool,
    /// Make all of the plan resident before the daemon is ready. Not for a client's own daemon, which lives for one question.
    #[arg(skip = true)]
    touch: bool,
}

impl Default for CapacityArgs {
    /// What a command line without any of the flags gives.
    fn default() -> Self {
        Self {
            ctx: None,
            sequences: None,
            step_ms: None,
            prefix_positions: None,
            grammars: None,
            pin: Vec::new(),
            chat_template: None,
            date: None,
            lock: false,
            verify: false,
            touch: true,
        }
    }
}

/// Why the daemon did not start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The model, its plan, or a flag.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The socket, the serial line or the I/O loop.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// The chat template does not compile.
    #[error("chat template of {path}: {source}")]
    Template {
        /// The model file, or the template's own.
        path: PathBuf,
        /// Line and reason.
        source: ChatError,
    },
    /// A file cannot be read, or the kernel refused something.
    #[error("{what}: {source}")]
    Io {
        /// A path, or what was asked for.
        what: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// `--lock`.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// `--verify`: there is nothing to compare with.
    #[error("{path}: {source}")]
    Verify {
        /// The model file.
        path: PathBuf,
        /// What is missing.
        source: VerifyError,
    },
    /// `--verify`: the file is not what was packed.
    #[error("{path} is damaged, of {parts} parts {damaged}: {named}; pack it again, or copy it again")]
    Damaged {
        /// The model file.
        path: PathBuf,
        /// Parts that have a hash.
        parts: usize,
        /// Parts that are not as they were.
        damaged: usize,
        /// The first of them.
        named: String,
    },
    /// `--sandbox=require`.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// A flag's value.
    #[error("{0}")]
    Usage(String),
}

impl DaemonError {
    /// 2 for what another command line would mend, else 1.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) | Self::Session(SessionError::Flag { .. } | SessionError::Kernels(_)) => 2,
            _ => 1,
        }
    }
}

/// Runs the daemon until SIGTERM or SIGINT.
///
/// # Errors
/// It cannot start, or its I/O loop failed.
pub fn run(args: &ServeArgs) -> Result<(), DaemonError> {
    marks::reach(Stage::Started);
    log_to_stderr(LevelFilter::Info);
    if args.supervised {
        // Whatever happens to this process, nothing that it executes has more rights than it has itself.
        let what = "giving up new privileges".to_owned();
        nix::sys::prctl::set_no_new_privs().map_err(|e| DaemonError::Io { what, source: e.into() })?;
    }
    let config = args.config.as_deref().map_or(Ok(Config::default()), |path| read_config(path, args.supervised))?;
    let temperature = args.temperature.or(config.temperature).unwrap_or(0.0);
    if !temperature.is_finite() || temperature < 0.0 {
        return Err(DaemonError::Usage(format!("--temperature is {temperature}, must be finite and at least 0")));
    }
    let defaults = Defaults {
        sampling: SamplingParams { temperature, ..SamplingParams::default() },
        max_tokens: args.max_tokens.or(config.max_tokens),
        date: args.capacity.date.clone(),
    };
    let supervisor = args.supervised.then(heartbeat::Line::from_stdin).transpose();
    let what = "--supervised wants the supervisor's socket as standard input";
    let supervisor = supervisor.map_err(|source| DaemonError::Io { what: what.into(), source })?;
    let ready = Box::new(|socket: &Path| log::info!("ready: {}", socket.display()));
    let line = match &config.serial {
        Serial::Device(path) => Some(path.as_path()),
        Serial::Console | Serial::Off => None,
    };
    let (tty, records) = (args.tty.as_deref().or(line), args.records.as_deref());
    let capacity = CapacityArgs {
        ctx: args.capacity.ctx.or(config.ctx),
        sequences: args.capacity.sequences.or(config.sequences),
        step_ms: args.capacity.step_ms.or(config.step_ms.map(|ms| ms as u64)),
        prefix_positions: args.capacity.prefix_positions.or(config.prefix_positions),
        grammars: args.capacity.grammars.or(config.grammars),
        ..args.capacity.clone()
    };
    let sockets = Some(sockets(config.sockets, args.socket.clone()));
    let supervisor = supervisor.map(|line| (line, Reports::at(&args.reports)));
    let (apps, sandbox) = (args.apps.as_deref(), Some(Sandbox::new(args.sandbox)?));
    let outside = Outside { sockets, tty, stop: None, supervisor, records, apps, sandbox, ready };
    serve(&args.model, &capacity, defaults, outside)
}

/// The file's settings. A key that is none is refused, or, where PID 1 has told the console already, passed over.
fn read_config(path: &Path, supervised: bool) -> Result<Config, DaemonError> {
    let refused = |why: &dyn std::fmt::Display| DaemonError::Usage(format!("--config {}: {why}", path.display()));
    if !path.exists() {
        return Err(refused(&"there is no such file"));
    }
    let (config, unknown) = Config::read(path).map_err(|e| refused(&e))?;
    match unknown.first() {
        Some(key) if !supervised => Err(refused(key)),
        _ => Ok(config),
    }
}

/// Those of the file, and the one that a flag names; without any, the usual place.
fn sockets(mut sockets: Vec<SocketSetup>, flag: Option<PathBuf>) -> Vec<SocketSetup> {
    let flag = flag.or_else(|| sockets.is_empty().then(crate::client::default_socket));
    if let Some(path) = flag.filter(|path| sockets.iter().all(|socket| socket.path != *path)) {
        sockets.insert(0, SocketSetup::at(path));
    }
    sockets
}

/// Runs a daemon of its own for `model`, with one sequence, on a private socket, while `client` runs; then stops it.
///
/// # Errors
/// The daemon cannot start, or its I/O loop failed.
pub fn with_daemon<R: Send>(model: &Path, client: impl FnOnce(&Path) -> R + Send) -> Result<R, DaemonError> {
    let model = &ModelArgs { model: model.into(), threads: None, threads_batch: None, kernels: None };
    let capacity = &CapacityArgs { sequences: Some(1), touch: false, ..CapacityArgs::default() };
    log_to_stderr(LevelFilter::Warn);
    let io = |what: &str| {
        let what = what.to_owned();
        move |source| DaemonError::Io { what, source }
    };
    let (stop, stopped) = UnixStream::pair().map_err(io("a pair of sockets"))?;
    let (tell_ready, is_ready) = mpsc::channel::<PathBuf>();
    let result = std::thread::scope(|scope| {
        let client = scope.spawn(move || {
            // Gone without a word: the daemon did not start, and its error is the answer.
            let answer = is_ready.recv().ok().map(|socket| client(&socket));
            drop(stop);
            answer
        });
        let ready = Box::new(move |socket: &Path| {
            // The client may have gone already; then nobody waits for this.
            let _ = tell_ready.send(socket.to_owned());
        });
        let outside = Outside {
            sockets: None,
            tty: None,
            stop: Some(stopped),
            supervisor: None,
            records: None,
            apps: None,
            sandbox: None,
            ready,
        };
        let served = serve(model, capacity, Defaults::default(), outside);
        let answer = client.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        served.map(|()| answer)
    });
    result?.ok_or_else(|| DaemonError::Usage("the daemon stopped before it was ready".into()))
}

/// Where a daemon meets the rest of the world.
struct Outside<'a> {
    /// Where to listen; `None` is a place that nobody else sees.
    sockets: Option<Vec<SocketSetup>>,
    tty: Option<&'a Path>,
    /// Ends the daemon as a signal would.
    stop: Option<UnixStream>,
    /// The line to it, and where its reports are.
    supervisor: Option<(heartbeat::Line, Reports)>,
    records: Option<&'a Path>,
    apps: Option<&'a Path>,
    /// What the daemon's threads give up; nothing where the client is one of them.
    sandbox: Option<Sandbox>,
    /// Told where the daemon listens, once it does.
    ready: Box<dyn FnOnce(&Path) + Send + 'a>,
}

fn serve(
    model: &ModelArgs,
    capacity: &CapacityArgs,
    defaults: Defaults,
    outside: Outside<'_>,
) -> Result<(), DaemonError> {
    let Outside { sockets, tty, stop, supervisor, records, apps, sandbox, ready } = outside;
    let sandbox = sandbox.as_ref();
    let (sequences, step_ms) =
        (capacity.sequences.unwrap_or(DEFAULT_SEQUENCES), capacity.step_ms.unwrap_or(DEFAULT_STEP_MS));
    if !(MIN_STEP_MS..=MAX_STEP_MS).contains(&step_ms) {
        let found = step_ms;
        return Err(DaemonError::Usage(format!("--step-ms is {found}, must be from {MIN_STEP_MS} to {MAX_STEP_MS}")));
    }
    let pins = pins::read(&capacity.pin)?;
    let prefix = capacity.prefix_positions.unwrap_or_else(|| pins::most_positions(&pins));
    let grammars = capacity.grammars.unwrap_or(DEFAULT_GRAMMARS);
    if grammars > MAX_GRAMMARS {
        return Err(DaemonError::Usage(format!("--grammars is {grammars}, must be from 0 to {MAX_GRAMMARS}")));
    }
    let wanted = Wanted { prefix, grammars, ..Wanted::to_serve(capacity.ctx, sequences, DEFAULT_MAX_ROWS) };
    let cpus = cpu::allowed_cpus();
    with_confined_model(model, wanted, sandbox, |session| {
        let Session {
            model: loaded, vocab, mapped, name, chat_template, kernels, workers, capacity: sizes, plan, ..
        } = session;
        log::info!("{}", plan.line());
        log::info!("kernels {}, {} threads", kernels.name(), workers.threads());
        let template = template(&model.model, capacity, chat_template, vocab)?;
        let text = &ModelText { vocab, template: template.as_ref(), context_tokens: sizes.ctx };
        // Bounded: it goes into every answer.
        let name = name.as_deref().unwrap_or("model");
        let model_id = &name.chars().filter(|c| !c.is_control()).take(MAX_MODEL_ID_CHARS).collect::<String>();
        if capacity.verify {
            verify(&model.model, mapped)?;
        }
        let (parts, file) = match mapped.filter(|_| capacity.touch && !capacity.verify).map(packed::parts) {
            Some(Ok(parts)) => {
                let io = |source| DaemonError::Io { what: model.model.display().to_string(), source };
                (parts, Some(File::open(&model.model).map_err(io)?))
            }
            Some(Err(error)) => {
                log::warn!("{}: {error}", model.model.display());
                (Vec::new(), None)
            }
            None => (Vec::new(), None),
        };
        let compare = file.map(|file| (Check::new(&parts), file));
        let check = compare.as_ref().map(|(check, _)| check);
        let plan_json = serde_json::to_value(&plan).unwrap_or_default();
        let breakers = dry_breakers(vocab);
        let mut rings = Box::new(Rings::new());
        let eventfd = |source: nix::Error| DaemonError::Io { what: "an eventfd".into(), source: source.into() };
        let (end, unbound) = rings.split().map_err(eventfd)?;
        let link = unbound.bind(std::thread::current());
        if capacity.lock && plan.packed {
            // What is locked is not given back under pressure, so the file counts as the plan does.
            let available = cpu::available_memory_bytes().map_err(SessionError::from)?;
            let room = available.saturating_sub(plan.mapped_bytes);
            plan.check(&loaded.hyper, room).map_err(SessionError::from)?;
        }
        let operations = workers.operations();
        let mapped_bytes = if plan.packed { plan.mapped_bytes } else { 0 };
        let facts = Facts { planned_bytes: plan.total_bytes, mapped_bytes, operations: Some(Arc::clone(&operations)) };
        let supervisor = supervisor.map(|(line, reports)| Supervisor { line, operations, reports });
        let engine = Engine::new(loaded, kernels, workers, sizes, sizes.max_rows, vocab.eog_ids().to_vec());
        let engine = engine.with_dry_breakers(&breakers);
        let mut engine = engine.sharing_prefixes().with_step_budget(Duration::from_millis(step_ms));
        if capacity.touch {
            engine.touch();
        }
        marks::reach(Stage::Resident);
        if capacity.lock {
            lock_all()?;
        }
        pins::compute(&pins, &mut engine, text, defaults.date.as_deref())?;
        std::thread::scope(|scope| {
            let background = compare.as_ref().map(|(check, file)| {
                let thread = std::thread::Builder::new().name("check".into()).stack_size(check::STACK_BYTES);
                let (parts, cpus) = (&parts, &cpus);
                thread.spawn_scoped(scope, move || {
                    // As with the I/O thread.
                    cpu::allow(cpus);
                    cpu::become_idle();
                    match sandbox.map_or(Ok(()), Sandbox::confine_reading_thread) {
                        Ok(()) => check.run(file, parts),
                        Err(error) => log::error!("the model is not compared with its hashes: {error}"),
                    }
                })
            });
            let io = std::thread::Builder::new().name("io".into()).stack_size(IO_STACK_BYTES);
            let io_cpus = &cpus;
            let io = io.spawn_scoped(scope, move || {
                // The engine's thread is pinned; what it spawns would be, too.
                cpu::allow(io_cpus);
                let private = match sockets {
                    Some(_) => None,
                    None => Some(PrivateSocket::create().map_err(|source| {
                        let what = format!("a folder in {}", std::env::temp_dir().display());
                        DaemonError::Io { what, source }
                    })?),
                };
                let own = || private.iter().map(|private| SocketSetup::at(private.path())).collect();
                let sockets = sockets.unwrap_or_else(own);
                let first = sockets.first().map(|socket| socket.path.clone()).unwrap_or_default();
                let ready = Box::new(|| match &private {
                    Some(private) => ready(&private.hide()),
                    None => ready(&first),
                });
                // What PID 1 writes is renamed into place: the folder stays, the file does not.
                let reports = supervisor.as_ref().map(|supervisor| supervisor.reports.folder());
                let folders = [records, reports, apps].into_iter().flatten().filter_map(Path::parent);
                let read = folders.chain([Path::new("/proc"), Path::new("/sys")]).map(Path::to_owned).collect();
                let paths = sockets.iter().map(|socket| socket.path.clone()).collect();
                let files = sandbox::Files { tty: tty.map(Path::to_owned), sockets: paths, read };
                let confine = Box::new(move || sandbox.map_or(Ok(()), |sandbox| sandbox.confine_io_thread(&files)));
                let setup = ServeSetup {
                    sockets,
                    tty,
                    text,
                    model_id,
                    context_tokens: sizes.ctx,
                    sequences: sizes.sequences,
                    n_embd: loaded.hyper.n_embd,
                    grammars: sizes.grammars,
                    defaults,
                    signals: stop.is_none(),
                    stop,
                    supervisor,
                    records,
                    check,
                    confine,
                    apps,
                    facts,
                    plan: plan_json,
                    ready,
                };
                Ok(super::run(setup, link)?)
            });
            let io = io.map_err(|source| DaemonError::Io { what: "the I/O thread".into(), source })?;
            let confined = sandbox.map_or(Ok(()), Sandbox::confine_computing_thread);
            match &confined {
                Ok(()) => engine.run(end),
                // The I/O thread sees that the engine is gone, and ends.
                Err(_) => drop(end),
            }
            if let (Some(check), Some(Ok(thread))) = (check, &background) {
                check.stop();
                thread.thread().unpark();
            }
            let served = io.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            confined.map_err(DaemonError::from).and(served)
        })
    })
}

/// Compares the whole model with its hashes, and says every second how far it is.
fn verify(path: &Path, mapped: Option<&Gguf<'_>>) -> Result<(), DaemonError> {
    let failed = |source| DaemonError::Verify { path: path.into(), source };
    let gguf = mapped.ok_or_else(|| failed(VerifyError::NoHashes))?;
    let (bytes, mut said) = (gguf.bytes().len(), Instant::now());
    let damaged = packed::verify(gguf, |done| {
        if said.elapsed() >= Duration::from_secs(1) {
            said = Instant::now();
            log::info!("checking the model: {done} of {bytes} bytes");
        }
    });
    let damaged = damaged.map_err(failed)?;
    let named = |damage: &Damage| match damage {
        Damage::Header => "header".to_owned(),
        Damage::Tensor(name) => format!("tensor {}", name.escape_debug()),
    };
    if damaged.is_empty() {
        log::info!("the model is as it was packed");
        return Ok(());
    }
    let told: Vec<String> = damaged.iter().take(check::MAX_DAMAGED).map(named).collect();
    let (parts, damaged) = (gguf.tensors().len() + 1, damaged.len());
    Err(DaemonError::Damaged { path: path.into(), parts, damaged, named: told.join(", ") })
}

/// Tokens over which no repetition reaches: those with one of llama.cpp's default breakers in them.
fn dry_breakers(vocab: &Vocab<'_>) -> Vec<TokenId> {
    let breaks = |token: &TokenId| vocab.token_bytes(*token, false).iter().any(|byte| b"\n:\"*".contains(byte));
    (0u32..).take(vocab.len()).map(TokenId).filter(breaks).collect()
}

/// The template named on the command line, else the model's own, compiled.
fn template(
    model: &Path,
    capacity: &CapacityArgs,
    own: Option<String>,
    vocab: &Vocab<'_>,
) -> Result<Option<ChatTemplate>, DaemonError> {
    let (path, source) = match &capacity.chat_template {
        Some(path) => {
            let io = |source| DaemonError::Io { what: path.display().to_string(), source };
            let bytes = std::fs::metadata(path).map_err(io)?.len();
            if bytes > MAX_TEMPLATE_BYTES as u64 {
                let path = path.display();
                return Err(DaemonError::Usage(format!(
                    "{path}: {bytes} bytes, a template may have {MAX_TEMPLATE_BYTES}"
                )));
            }
            (path.as_path(), Some(std::fs::read_to_string(path).map_err(io)?))
        }
        None => (model, own),
    };
    let Some(source) = source else {
        log::warn!(
            "{} has no chat template: only completions are served; --chat-template FILE gives one",
            model.display()
        );
        return Ok(None);
    };
    let text = |token: Option<TokenId>| {
        token.map(|token| String::from_utf8_lossy(vocab.text_of(token)).into_owned()).unwrap_or_default()
    };
    let compiled = ChatTemplate::compile(&source, &text(vocab.bos()), &text(vocab.eos()));
    compiled.map(Some).map_err(|source| DaemonError::Template { path: path.into(), source })
}

/// Sends the log to stderr, without times: an appliance has no clock to trust. A second call changes nothing.
fn log_to_stderr(level: LevelFilter) {
    let config = ConfigBuilder::new()
        .set_time_level(LevelFilter::Off)
        .set_thread_level(LevelFilter::Off)
        .set_target_level(LevelFilter::Off)
        .set_location_level(LevelFilter::Off)
        .build();
    // Already set where a test starts two daemons in one process.
    let _ = WriteLogger::init(level, config, io::stderr());
}
