#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use super::*;

/// Samples by their name and labels. Fails where the text is not what the format's description says.
fn parse(text: &str) -> BTreeMap<String, f64> {
    assert!(text.ends_with('\n'));
    let mut samples = BTreeMap::new();
    let (mut helped, mut typed) = (String::new(), (String::new(), String::new()));
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            helped = rest.split_once(' ').unwrap().0.to_owned();
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert_eq!(name, helped, "HELP stands before TYPE");
            assert!(["gauge", "counter", "histogram"].contains(&kind));
            assert_eq!(kind == "counter", name.ends_with("_total"), "{name}");
            typed = (name.to_owned(), kind.to_owned());
        } else {
            let (name, value) = line.rsplit_once(' ').unwrap();
            let bare = name.split('{').next().unwrap();
            let suffix = bare.strip_prefix(&typed.0).unwrap_or_else(|| panic!("{line} is not of {typed:?}"));
            let fits = match typed.1.as_str() {
                "histogram" => ["_bucket", "_sum", "_count"].contains(&suffix),
                _ => suffix.is_empty(),
            };
            assert!(fits, "{line}");
            let before = samples.insert(name.to_owned(), value.parse().unwrap());
            assert_eq!(before, None, "{name} twice");
        }
    }
    samples
}

#[test]
fn what_happened_is_what_is_told() {
    let mut counters = Counters::default();
    counters.submitted(31);
    counters.submitted(10);
    counters.begun(0);
    counters.begun(64);
    counters.ended(FinishReason::Stop, 9);
    counters.ended(FinishReason::Cancelled, 1);
    for status in [429, 429, 403, 418] {
        counters.refused(status);
    }
    let mut buckets = [0; 13];
    (buckets[1], buckets[6], buckets[12]) = (3, 2, 1);
    let counted =
        Counted { steps: 6, decode_rows: 7, prefill_rows: 8, last_sequences: 2, step_ns: 1_500_000_000, buckets };
    let blocks = BlockCounts { free: 1, used: 2, cached: 3 };
    let now = Now { uptime_s: 5, connections: 4, running: 3, waiting: 2, blocks, counted };
    let operations = Some(Arc::new(AtomicU64::new(77)));
    let facts = Facts { planned_bytes: 1 << 30, mapped_bytes: 123, operations };
    let text = counters.text(&facts, &now);
    let samples = parse(&text);
    for (name, value) in [
        ("hearth_uptime_seconds", 5.0),
        ("hearth_connections", 4.0),
        ("hearth_requests_running", 3.0),
        ("hearth_requests_waiting", 2.0),
        ("hearth_requests_total{reason=\"stop\"}", 1.0),
        ("hearth_requests_total{reason=\"cancelled\"}", 1.0),
        ("hearth_requests_total{reason=\"length\"}", 0.0),
        ("hearth_refusals_total{status=\"429\"}", 2.0),
        ("hearth_refusals_total{status=\"403\"}", 1.0),
        ("hearth_refusals_total{status=\"other\"}", 1.0),
        ("hearth_prompt_tokens_total", 41.0),
        ("hearth_cached_tokens_total", 64.0),
        ("hearth_completion_tokens_total", 10.0),
        ("hearth_prefix_lookups_total", 2.0),
        ("hearth_prefix_hits_total", 1.0),
        ("hearth_engine_operations_total", 77.0),
        ("hearth_steps_total", 6.0),
        ("hearth_step_rows_total{kind=\"decode\"}", 7.0),
        ("hearth_step_rows_total{kind=\"prefill\"}", 8.0),
        ("hearth_batch_sequences", 2.0),
        ("hearth_step_duration_seconds_bucket{le=\"0.001\"}", 0.0),
        ("hearth_step_duration_seconds_bucket{le=\"0.002\"}", 3.0),
        ("hearth_step_duration_seconds_bucket{le=\"0.1\"}", 5.0),
        ("hearth_step_duration_seconds_bucket{le=\"5\"}", 5.0),
        ("hearth_step_duration_seconds_bucket{le=\"+Inf\"}", 6.0),
        ("hearth_step_duration_seconds_sum", 1.5),
        ("hearth_step_duration_seconds_count", 6.0),
        ("hearth_kv_blocks{state=\"cached\"}", 3.0),
        ("hearth_memory_planned_bytes", (1 << 30) as f64),
        ("hearth_memory_mapped_bytes", 123.0),
    ] {
        assert_eq!(samples.get(name), Some(&value), "{name} in\n{text}");
    }
    assert!(samples["hearth_memory_resident_bytes{kind=\"anonymous\"}"] > 0.0);
}

#[test]
fn every_metric_is_described_in_the_readme_and_nothing_else_is() {
    let readme = include_str!("../../../README.md");
    let text = Counters::default().text(&Facts::default(), &Now::default());
    let names: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
    for name in &names {
        assert!(readme.contains(&format!("| `{name}")), "{name} is not in a table of the README");
    }
    for row in readme.lines().filter_map(|line| line.strip_prefix("| `hearth_")) {
        let name = format!("hearth_{}", row.split(['`', '{']).next().unwrap());
        assert!(names.contains(&name.as_str()), "the README describes {name}, which there is not");
    }
}

#[test]
fn the_text_is_bounded() {
    let (ended, refused) = ([u64::MAX; REASONS.len()], [u64::MAX; STATUSES.len() + 1]);
    let counters = Counters { ended, refused, ..Counters::default() };
    let counted = Counted { buckets: [u64::MAX / 13; 13], step_ns: u64::MAX, ..Counted::default() };
    let text = counters.text(&Facts::default(), &Now { counted, ..Now::default() });
    let zones = MAX_ZONES * (MAX_ZONE_CHARS + 64);
    assert!(text.len() + zones < crate::serve::conn::MAX_OUTPUT_BYTES, "{}", text.len());
}

#[test]
fn temperatures_are_those_that_can_be_read() {
    let folder = tempfile::tempdir().unwrap();
    for (zone, kind, temp) in [("thermal_zone1", "cpu-thermal\n", "48312\n"), ("thermal_zone0", "a\"b\n", "-5000\n")] {
        fs::create_dir(folder.path().join(zone)).unwrap();
        fs::write(folder.path().join(zone).join("type"), kind).unwrap();
        fs::write(folder.path().join(zone).join("temp"), temp).unwrap();
    }
    fs::create_dir(folder.path().join("thermal_zone2")).unwrap();
    fs::create_dir(folder.path().join("cooling_device0")).unwrap();
    assert_eq!(temperatures(folder.path()), [("ab-0".to_owned(), -5.0), ("cpu-thermal-1".to_owned(), 48.312)]);
    assert_eq!(temperatures(&folder.path().join("none")), []);
}
