//! `GET /metrics`: the daemon in numbers, in Prometheus' text format 0.0.4. The set of numbers is fixed, so the text's length is bounded;
//! none of them says anything about what was asked or answered. Read on the I/O thread; the engine's own are in `engine::gauges`.

use std::fmt::{Display, Write};
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::engine::gauges::{Counted, STEP_BUCKETS_MS};
use crate::engine::prefix::BlockCounts;
use crate::engine::queue::FinishReason;

#[cfg(test)]
mod tests;

/// What this text is.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";
/// Most zones whose temperature is told.
pub const MAX_ZONES: usize = 8;
/// Longest name of a zone, in characters.
pub const MAX_ZONE_CHARS: usize = 32;
/// Where the kernel shows temperatures, on a machine that has any.
pub const THERMAL: &str = "/sys/class/thermal";

/// HTTP statuses of refusals that are told apart.
const STATUSES: [u16; 12] = [400, 401, 403, 404, 405, 408, 409, 413, 429, 500, 501, 503];
const REASONS: [&str; 5] = ["stop", "length", "cancelled", "failed", "refused"];

/// What does not change while the daemon runs, and the engine's heartbeat.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// Bytes of the memory plan.
    pub planned_bytes: u64,
    /// Bytes of the model's file where it stays mapped.
    pub mapped_bytes: u64,
    /// Operations begun by the engine; see `Workers::operations`.
    pub operations: Option<Arc<AtomicU64>>,
}

/// What the I/O thread counts.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    prompt_tokens: u64,
    completion_tokens: u64,
    cached_tokens: u64,
    begun: u64,
    hits: u64,
    ended: [u64; REASONS.len()],
    refused: [u64; STATUSES.len() + 1],
}

/// What is read at the moment of asking.
#[derive(Clone, Copy, Debug, Default)]
pub struct Now {
    /// Seconds since the daemon became ready.
    pub uptime_s: u64,
    /// Connections.
    pub connections: usize,
    /// Requests with the engine.
    pub running: usize,
    /// Of these, those that have not begun.
    pub waiting: usize,
    /// Where the KV blocks are.
    pub blocks: BlockCounts,
    /// The engine's steps.
    pub counted: Counted,
}

impl Counters {
    /// A request went to the engine.
    pub fn submitted(&mut self, prompt_tokens: usize) {
        self.prompt_tokens += prompt_tokens as u64;
    }

    /// Its prompt is computed; so many tokens of it were there before.
    pub fn begun(&mut self, cached_tokens: usize) {
        self.begun += 1;
        self.hits += u64::from(cached_tokens > 0);
        self.cached_tokens += cached_tokens as u64;
    }

    /// The engine gave it back.
    pub fn ended(&mut self, reason: FinishReason, completion_tokens: usize) {
        let at = match reason {
            FinishReason::Stop => 0,
            FinishReason::Length => 1,
            FinishReason::Cancelled => 2,
            FinishReason::NonFinite => 3,
            FinishReason::Refused => 4,
        };
        self.ended[at] += 1;
        self.completion_tokens += completion_tokens as u64;
    }

    /// A request was refused with that status.
    pub fn refused(&mut self, status: u16) {
        let at = STATUSES.iter().position(|&known| known == status).unwrap_or(STATUSES.len());
        self.refused[at] += 1;
    }

    /// All numbers as text.
    pub fn text(&self, facts: &Facts, now: &Now) -> String {
        let mut page = Page::default();
        page.metric("hearth_build_info", GAUGE, "The version that runs");
        page.sample("", &[("version", env!("CARGO_PKG_VERSION"))], 1);
        page.plain("hearth_uptime_seconds", GAUGE, "Time since the daemon became ready", now.uptime_s);
        page.plain("hearth_connections", GAUGE, "Open connections of all sockets", now.connections);
        page.plain("hearth_requests_running", GAUGE, "Requests with the engine, waiting ones included", now.running);
        page.plain("hearth_requests_waiting", GAUGE, "Requests that wait for a sequence", now.waiting);
        page.metric("hearth_requests_total", COUNTER, "Requests that the engine gave back, by the reason of their end");
        for (reason, count) in REASONS.iter().zip(self.ended) {
            page.sample("", &[("reason", reason)], count);
        }
        page.metric("hearth_refusals_total", COUNTER, "Requests that were refused, by HTTP status");
        for (status, count) in STATUSES.iter().map(u16::to_string).chain(["other".to_owned()]).zip(self.refused) {
            page.sample("", &[("status", &status)], count);
        }
        page.plain("hearth_prompt_tokens_total", COUNTER, "Tokens of prompts", self.prompt_tokens);
        page.plain(
            "hearth_cached_tokens_total",
            COUNTER,
            "Tokens of prompts that the prefix cache had",
            self.cached_tokens,
        );
        page.plain("hearth_completion_tokens_total", COUNTER, "Tokens of answers", self.completion_tokens);
        page.plain("hearth_prefix_lookups_total", COUNTER, "Requests whose prompt was computed", self.begun);
        page.plain("hearth_prefix_hits_total", COUNTER, "Of these, those that began with something known", self.hits);
        self.engine(&mut page, facts, now);
        memory(&mut page, facts, now);
        page.metric("hearth_temperature_celsius", GAUGE, "Temperatures that the kernel shows");
        for (zone, celsius) in temperatures(Path::new(THERMAL)) {
            page.sample("", &[("zone", &zone)], celsius);
        }
        page.text
    }

    fn engine(&self, page: &mut Page, facts: &Facts, now: &Now) {
        let Counted { steps, decode_rows, prefill_rows, last_sequences, step_ns, buckets } = now.counted;
        let operations = facts.operations.as_ref().map_or(0, |count| count.load(Ordering::Relaxed));
        page.plain(
            "hearth_engine_operations_total",
            COUNTER,
            "Operations begun by the engine, its heartbeat",
            operations,
        );
        page.plain("hearth_steps_total", COUNTER, "Steps of the engine", steps);
        page.metric("hearth_step_rows_total", COUNTER, "Rows of all steps");
        page.sample("", &[("kind", "decode")], decode_rows);
        page.sample("", &[("kind", "prefill")], prefill_rows);
        page.plain("hearth_batch_sequences", GAUGE, "Sequences in the last step", last_sequences);
        page.metric("hearth_step_duration_seconds", "histogram", "How long steps take");
        let mut so_far = 0;
        for (bound, count) in STEP_BUCKETS_MS.iter().zip(buckets) {
            so_far += count;
            page.sample("_bucket", &[("le", &(*bound as f64 / 1e3).to_string())], so_far);
        }
        page.sample("_bucket", &[("le", "+Inf")], steps);
        page.sample("_sum", &[], step_ns as f64 / 1e9);
        page.sample("_count", &[], steps);
    }
}

fn memory(page: &mut Page, facts: &Facts, now: &Now) {
    page.metric("hearth_kv_blocks", GAUGE, "Blocks of keys and values");
    for (state, count) in [("free", now.blocks.free), ("used", now.blocks.used), ("cached", now.blocks.cached)] {
        page.sample("", &[("state", state)], count);
    }
    page.plain("hearth_memory_planned_bytes", GAUGE, "The memory plan", facts.planned_bytes);
    page.plain("hearth_memory_mapped_bytes", GAUGE, "The model's file where it stays mapped", facts.mapped_bytes);
    page.metric("hearth_memory_resident_bytes", GAUGE, "Memory that the daemon has at the moment");
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    for (kind, line) in [("anonymous", "RssAnon:"), ("file", "RssFile:")] {
        let kib =
            status.lines().find_map(|text| text.strip_prefix(line)?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        if let Some(kib) = kib {
            page.sample("", &[("kind", kind)], kib.saturating_mul(1024));
        }
    }
}

/// Name and temperature of each zone in `folder`; none on a machine that shows none.
fn temperatures(folder: &Path) -> Vec<(String, f64)> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut paths: Vec<_> = entries.map(|entry| entry.path()).collect();
    paths.retain(|path| path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"thermal_zone")));
    paths.sort();
    let zone = |path: &std::path::PathBuf| {
        let text = |name: &str| fs::read_to_string(path.join(name)).ok();
        let millidegrees: i64 = text("temp")?.trim().parse().ok()?;
        let number = path.file_name()?.to_string_lossy().replace("thermal_zone", "");
        let name = format!("{}-{number}", text("type")?.trim());
        let name = name.chars().filter(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_')).take(MAX_ZONE_CHARS);
        Some((name.collect(), millidegrees as f64 / 1e3))
    };
    paths.iter().filter_map(zone).take(MAX_ZONES).collect()
}

const GAUGE: &str = "gauge";
const COUNTER: &str = "counter";

/// The text, and the metric whose samples come next.
#[derive(Default)]
struct Page {
    text: String,
    name: &'static str,
}

impl Page {
    fn metric(&mut self, name: &'static str, kind: &str, help: &str) {
        self.name = name;
        // Writing to a `String` cannot fail, here and below.
        let _ = write!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    /// Names and values of labels are hearth's own words or filtered: nothing has to be quoted.
    fn sample(&mut self, suffix: &str, labels: &[(&str, &str)], value: impl Display) {
        let _ = write!(self.text, "{}{suffix}", self.name);
        for (at, (label, of)) in labels.iter().enumerate() {
            let _ = write!(self.text, "{}{label}=\"{of}\"", if at == 0 { "{" } else { "," });
        }
        let _ = writeln!(self.text, "{} {value}", if labels.is_empty() { "" } else { "}" });
    }

    fn plain(&mut self, name: &'static str, kind: &str, help: &str, value: impl Display) {
        self.metric(name, kind, help);
        self.sample("", &[], value);
    }
}
