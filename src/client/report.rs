//! `hearth boot-report`: what PID 1 of an appliance tells of its start, asked over the socket. On the console it is `/boot-report`.
//! Next on the data's way: `client::http`.

use std::io::Write;
use std::path::PathBuf;

use super::health::PATIENCE;
use super::http::get_json;
use super::{ClientError, socket_of};

/// Print when what happened from the kernel's start to the first answer, on an appliance
#[derive(Clone, Debug, Default, clap::Args)]
pub struct BootReportArgs {
    /// The daemon's socket [default: $HEARTH_SOCKET, $XDG_RUNTIME_DIR/hearth.sock, /run/hearth/hearth.sock]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
}

/// Prints the report.
///
/// # Errors
/// Nobody answers, or who does is no appliance.
pub fn boot_report(args: &BootReportArgs) -> Result<(), ClientError> {
    let body = get_json(&socket_of(args.socket.as_deref()), "/boot-report", PATIENCE)?;
    let Some(lines) = body["report"].as_array() else {
        let why = body["error"]["message"].as_str().unwrap_or("an answer without a report");
        let message = why.chars().filter(|char| !char.is_control()).collect();
        return Err(ClientError::Refused { status: 404, message });
    };
    for line in lines.iter().filter_map(serde_json::Value::as_str) {
        let line: String = line.chars().filter(|char| !char.is_control()).collect();
        writeln!(std::io::stdout(), "{line}").map_err(ClientError::Output)?;
    }
    Ok(())
}
