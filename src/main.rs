//! The command line: one subcommand is one role, an error is one line on stderr and an exit code. Nothing else happens here.
//! Next on the data's way: `init` where the kernel starts this as PID 1, `serve::daemon` for the appliance, `client` for people, `tools` for offline jobs.

use std::process::ExitCode;
use std::time::Instant;

use clap::{Parser, Subcommand};
use hearth::serve::daemon::{DaemonError, with_daemon};
use hearth::sys::fault;
use hearth::sys::wipe::Wiping;
use hearth::{client, config, init, serve, tools};

#[global_allocator]
static ALLOCATOR: Wiping = Wiping;

/// A sealed, offline LLM appliance: quantized weights, its own kernels, a UNIX socket and a serial line.
#[derive(Parser)]
#[command(name = "hearth", version, max_term_width = 120)]
struct Cli {
    #[command(subcommand)]
    role: Role,
}

#[derive(Subcommand)]
enum Role {
    Serve(Box<serve::daemon::ServeArgs>),
    Ask(client::AskArgs),
    Chat(client::ChatArgs),
    Health(client::health::HealthArgs),
    BootReport(client::report::BootReportArgs),
    Plan(tools::plan::PlanArgs),
    Pack(tools::pack::PackArgs),
    Inspect(tools::inspect::InspectArgs),
    Tokenize(tools::tokenize::TokenizeArgs),
    Generate(tools::generate::GenerateArgs),
    Score(tools::score::ScoreArgs),
    Perplexity(tools::perplexity::PerplexityArgs),
    Bench(tools::bench::BenchArgs),
    Selftest(tools::selftest::SelftestArgs),
    Config(config::ConfigArgs),
    #[command(hide = true)]
    Launch(init::launch::LaunchArgs),
}

fn main() -> ExitCode {
    let started = Instant::now();
    if let Err(error) = fault::exit_where_a_file_is_lost() {
        eprintln!("hearth: a handler for SIGBUS: {error}");
    }
    if init::is_wanted() {
        init::run();
    }
    let result = match Cli::parse().role {
        Role::Serve(args) => report(serve::daemon::run(&args), serve::daemon::DaemonError::exit_code),
        Role::Ask(args) => match &args.talk.model {
            None => report_client(client::ask(&args)),
            Some(model) => report_own_daemon(with_daemon(model, |socket| client::ask_over(socket, &args))),
        },
        Role::Chat(args) => match &args.talk.model {
            None => report_client(client::chat(&args)),
            Some(model) => report_own_daemon(with_daemon(model, |socket| client::chat_over(socket, &args))),
        },
        Role::Health(args) => client::health::run(&args).unwrap_or_else(|error| report(Err(error), |_| 1)),
        Role::BootReport(args) => report(client::report::boot_report(&args), |_| 1),
        Role::Plan(args) => report(tools::plan::run(&args), tools::ToolError::exit_code),
        Role::Pack(args) => report(tools::pack::run(&args), tools::ToolError::exit_code),
        Role::Inspect(args) => report(tools::inspect::run(&args), tools::ToolError::exit_code),
        Role::Tokenize(args) => report(tools::tokenize::run(&args), tools::ToolError::exit_code),
        Role::Generate(args) => report(tools::generate::run(&args), tools::ToolError::exit_code),
        Role::Score(args) => report(tools::score::run(&args), tools::ToolError::exit_code),
        Role::Perplexity(args) => report(tools::perplexity::run(&args), tools::ToolError::exit_code),
        Role::Bench(args) => report(tools::bench::run(&args, started), tools::ToolError::exit_code),
        Role::Selftest(args) => report(tools::selftest::run(&args), tools::ToolError::exit_code),
        Role::Config(args) => report(config::run(&args), |_| 1),
        Role::Launch(args) => report(init::launch::run(&args), |_| init::launch::CANNOT_START),
    };
    ExitCode::from(result)
}

/// What a client came to. Where the reader of its output went away, nothing is said.
fn report_client(result: Result<(), client::ClientError>) -> u8 {
    match result {
        Err(error) if error.is_output_closed() => client::OUTPUT_CLOSED,
        result => report(result, |_| 1),
    }
}

/// What a client of the daemon inside this process came to.
fn report_own_daemon(result: Result<Result<(), client::ClientError>, DaemonError>) -> u8 {
    match result {
        Ok(answered) => report_client(answered),
        Err(error) => report(Err(error), DaemonError::exit_code),
    }
}

/// 0, or the error on stderr and its code.
fn report<E: std::fmt::Display>(result: Result<(), E>, exit_code: impl Fn(&E) -> u8) -> u8 {
    match result {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("hearth: {error}");
            exit_code(&error)
        }
    }
}
