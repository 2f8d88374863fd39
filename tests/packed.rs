//! The packed model: the same bits as from the GGUF it was made of, whole or not there at all, and damage named.
#![allow(clippy::unwrap_used)]

#[path = "common/models.rs"]
mod models;
#[path = "common/tiny.rs"]
mod tiny;

use std::io::{BufRead, BufReader, Cursor, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use hearth::engine::Engine;
use hearth::engine::capacity::Capacity;
use hearth::engine::queue::{Event, Job};
use hearth::engine::sampler::SamplingParams;
use hearth::engine::scheduler::Peer;
use hearth::model::gguf::{GgmlType, Gguf};
use hearth::model::packed::write::{PackPlan, WriteError};
use hearth::model::packed::{self, Damage};
use hearth::model::weights::WeightLayout;
use hearth::model::{Model, ModelError, arch};
use hearth::sys::fault::LOST_FILE_EXIT_CODE;
use hearth::sys::map::{Mapping, Region};
use hearth::sys::workers::Workers;
use hearth::text::TokenId;
use hearth_kernels::{Format, Kernels};
use tiny::{SHAPE, Shape};

const HEARTH: &str = env!("CARGO_BIN_EXE_hearth");
/// Anonymous memory of a daemon beside its KV cache, in KiB.
const MAX_ANONYMOUS_KIB: u64 = 24 * 1024;

fn hearth(arguments: &[&str], input: &str) -> Output {
    let mut child = Command::new(HEARTH)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A tool that refuses its flags has gone before it reads.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap()
}

/// Exit code and stderr.
fn refusal(arguments: &[&str]) -> (i32, String) {
    let output = hearth(arguments, "");
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

fn pack(file: &[u8]) -> Result<Vec<u8>, WriteError> {
    let gguf = Gguf::parse(file).unwrap();
    let mut out = Cursor::new(Vec::new());
    PackPlan::new(&gguf, "tiny.gguf", [])?.write(&mut out, &mut |_| true)?;
    Ok(out.into_inner())
}

/// The logits hash of four greedy steps.
fn logits_hash(model: &Model<'_>, workers: Workers) -> u64 {
    let capacity = Capacity { ctx: 64, sequences: 1, max_rows: 32, max_outputs: 1, threads: 1, ..Capacity::default() };
    let mut engine = Engine::new(model, Kernels::detect(), workers, capacity, 32, vec![]);
    let job = Job {
        id: 0,
        prompt: (0..30).map(|i| TokenId(i * 3)).collect(),
        sampling: SamplingParams::default(),
        max_tokens: 4,
        ignore_eos: true,
        logits_hash: true,
        cancel: Arc::new(AtomicBool::new(false)),
        embed: None,
        mask: None,
        peer: Peer::default(),
        logprobs: None,
    };
    engine.admit(Box::new(job)).unwrap();
    let mut hash = None;
    while !engine.is_idle() {
        engine.step(&mut |event| {
            if let Event::Finished { logits_hash, .. } = event {
                hash = logits_hash;
            }
        });
    }
    hash.unwrap()
}

fn hash_repacked(file: &[u8]) -> u64 {
    let gguf = Gguf::parse(file).unwrap();
    let hyper = arch::hyper(&gguf).unwrap();
    let layout = WeightLayout::new(&gguf, &hyper).unwrap();
    let mut region = Region::new(layout.region_bytes()).unwrap();
    let mut workers = Workers::new(1).unwrap();
    let model = Model::load(&gguf, hyper, &layout, &mut region, &mut workers, |_| ()).unwrap();
    logits_hash(&model, workers)
}

fn hash_mapped(path: &Path) -> u64 {
    let mapping = Mapping::open(path).unwrap();
    let gguf = Gguf::parse(mapping.bytes()).unwrap();
    let hyper = arch::hyper(&gguf).unwrap();
    let layout = WeightLayout::new(&gguf, &hyper).unwrap();
    assert!(layout.is_packed() && layout.region_bytes() == 0);
    let model = Model::map(&gguf, hyper, &layout).unwrap();
    logits_hash(&model, Workers::new(1).unwrap())
}

#[test]
fn every_format_packed_gives_the_logits_of_the_gguf() {
    let folder = tempfile::tempdir().unwrap();
    for format in Format::ALL {
        for tied in [true, false] {
            let file = tiny::model(Shape { tied, ..tiny::shape_for(format.name()) }, format.name(), 7);
            let packed = pack(&file).unwrap();
            let path = folder.path().join(format.name());
            std::fs::write(&path, &packed).unwrap();
            assert_eq!(hash_mapped(&path), hash_repacked(&file), "{} tied {tied}", format.name());
            let gguf = Gguf::parse(&packed).unwrap();
            assert_eq!(packed::verify(&gguf, |_| ()).unwrap(), []);
            let matrix = gguf.tensor("blk.0.ffn_up.weight").unwrap();
            assert_eq!(matrix.ggml_type, GgmlType::Tiled(format));
            // Above every type that GGML numbers, so that other readers refuse the file.
            assert!(matrix.ggml_type.id() > 1_000_000);
            assert!(gguf.tensors().iter().all(|tensor| tensor.offset.is_multiple_of(65_536)));
        }
    }
}

/// Everything that a daemon does with a packed file.
fn use_file(bytes: &[u8]) -> Result<(), ModelError> {
    let gguf = Gguf::parse(bytes)?;
    let hyper = arch::hyper(&gguf)?;
    let layout = WeightLayout::new(&gguf, &hyper)?;
    if !layout.is_packed() {
        return Ok(());
    }
    let _ = packed::verify(&gguf, |_| ());
    let model = Model::map(&gguf, hyper, &layout)?;
    let capacity = Capacity { ctx: 8, sequences: 1, max_rows: 2, max_outputs: 1, threads: 1, ..Capacity::default() };
    let mut engine = Engine::new(&model, Kernels::detect(), Workers::new(1).unwrap(), capacity, 2, vec![]);
    let cancel = Arc::new(AtomicBool::new(false));
    let (prompt, sampling) = (vec![TokenId(1), TokenId(2)], SamplingParams::default());
    let job = Job {
        id: 0,
        prompt,
        sampling,
        max_tokens: 2,
        ignore_eos: true,
        logits_hash: true,
        cancel,
        embed: None,
        mask: None,
        peer: Peer::default(),
        logprobs: None,
    };
    if engine.admit(Box::new(job)).is_ok() {
        while !engine.is_idle() {
            engine.step(&mut |_| ());
        }
    }
    Ok(())
}

#[test]
fn damaged_packed_models_are_errors_or_answers() {
    let shape =
        Shape { n_layer: 1, n_embd: 32, n_ff: 32, n_head: 2, n_head_kv: 1, n_vocab: 20, n_ctx: 64, tied: false };
    let packed = pack(&tiny::model(shape, "Q4_1", 5)).unwrap();
    // Mapped files begin on a page, which a vector need not.
    let mut region = Region::new(packed.len()).unwrap();
    region.bytes_mut().copy_from_slice(&packed);
    use_file(region.bytes()).unwrap();
    let header = packed.windows(19).rposition(|window| window == b"blk.0.ffn_up.weight").unwrap() + 200;
    let mut random = 1u64;
    let mut next = |bound: usize| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(random >> 33).unwrap() % bound
    };
    let (mut refused, mut ran) = (0, 0);
    for _ in 0..2000 {
        let end = if next(4) == 0 { packed.len() } else { header };
        let places: Vec<usize> = (0..=next(3)).map(|_| next(end)).collect();
        for &at in &places {
            region.bytes_mut()[at] = [0, 1, 0x7F, 0x80, 0xFF, next(256) as u8][next(6)];
        }
        match use_file(region.bytes()) {
            Ok(()) => ran += 1,
            Err(error) => {
                refused += 1;
                assert!(!error.to_string().is_empty());
            }
        }
        for at in places {
            region.bytes_mut()[at] = packed[at];
        }
    }
    println!("{refused} refused, {ran} ran");
    assert!(refused > 200 && ran > 200, "{refused} refused, {ran} ran: the mutations miss their mark");
}

#[test]
fn all_metadata_of_the_source_is_kept() {
    let file = tiny::model(SHAPE, "Q4_0", 7);
    let packed = pack(&file).unwrap();
    let (before, after) = (Gguf::parse(&file).unwrap(), Gguf::parse(&packed).unwrap());
    for (key, value) in before.metadata() {
        assert_eq!(after.get(key), Some(value), "{key}");
    }
    let said = packed::read(&after).unwrap().unwrap();
    assert_eq!((said.source_name, said.source_hash), ("tiny.gguf", &*blake3::hash(&file).to_hex()));
    assert_eq!(packed::read(&before).unwrap(), None);
}

#[test]
fn a_flipped_bit_anywhere_is_named() {
    let packed = pack(&tiny::model(SHAPE, "Q5_1", 7)).unwrap();
    let offset = |name: &str| {
        let gguf = Gguf::parse(&packed).unwrap();
        let tensor = gguf.tensor(name).unwrap();
        (usize::try_from(tensor.offset).unwrap(), usize::try_from(tensor.bytes).unwrap())
    };
    for name in ["output_norm.weight", "token_embd.weight", "blk.1.attn_v.weight"] {
        let (start, bytes) = offset(name);
        for at in [start, start + bytes / 2, start + bytes - 1] {
            let mut damaged = packed.clone();
            damaged[at] ^= 0x10;
            let gguf = Gguf::parse(&damaged).unwrap();
            assert_eq!(packed::verify(&gguf, |_| ()).unwrap(), [Damage::Tensor(name.to_owned())]);
        }
    }
    let mut damaged = packed.clone();
    let at = packed.windows(4).position(|window| window == b"tiny").unwrap();
    damaged[at] ^= 1;
    assert_eq!(packed::verify(&Gguf::parse(&damaged).unwrap(), |_| ()).unwrap(), [Damage::Header]);
}

#[test]
fn another_layout_or_version_is_refused() {
    let packed = pack(&tiny::model(SHAPE, "Q8_0", 7)).unwrap();
    let find = |text: &[u8]| packed.windows(text.len()).position(|window| window == text).unwrap() + text.len();
    let refused = |at: usize, byte: u8| {
        let mut other = packed.clone();
        other[at] = byte;
        let gguf = Gguf::parse(&other).unwrap();
        let error = WeightLayout::new(&gguf, &arch::hyper(&gguf).unwrap()).unwrap_err();
        assert!(matches!(error, ModelError::Layout { .. }), "{error}");
        error.to_string()
    };
    // Behind the key: the value's type, for the name its length as well.
    let name = refused(find(b"hearth.layout") + 4 + 8, b'q');
    assert!(name.contains("\"q16k4\" version 1"), "{name}");
    let version = refused(find(b"hearth.layout.version") + 4, 9);
    assert!(version.contains("\"r16k4\" version 9") && version.contains("hearth pack --force tiny.gguf"), "{version}");
    // Tiles without a word about their layout.
    let none = refused(find(b"hearth.layou"), b'u');
    assert!(none.contains("(none)"), "{none}");
}

#[test]
fn what_cannot_be_packed_is_refused_by_name() {
    let mut file = tiny::model(SHAPE, "F16", 5);
    for (name, nan, error) in [
        ("blk.0.ffn_norm.weight", &[0, 0, 0xC0, 0x7F][..], "blk.0.ffn_norm.weight"),
        ("blk.1.ffn_up.weight", &[0, 0x7E], "row 0, column 0"),
    ] {
        let at = usize::try_from(Gguf::parse(&file).unwrap().tensor(name).unwrap().offset).unwrap();
        let before = file[at..at + nan.len()].to_vec();
        file[at..at + nan.len()].copy_from_slice(nan);
        let message = pack(&file).unwrap_err().to_string();
        assert!(message.contains(error), "{message}");
        file[at..at + nan.len()].copy_from_slice(&before);
    }
    let packed = pack(&file).unwrap();
    let message = pack(&packed).unwrap_err().to_string();
    assert!(message.contains("packed already, from tiny.gguf"), "{message}");
}

#[test]
fn the_real_model_packed_answers_with_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let packed = &packed_model(folder.path());
    let source = models::path("HEARTH_MODEL", "SmolLM2-135M-Instruct-Q4_1.gguf");
    let source = source.to_str().unwrap();
    let prompt = "{\"prompt\": \"The capital of France\"}\n{\"prompt\": \"naïve \u{1F600} 123\\n\\n  x\"}\n";
    let answer = |model: &str| {
        let output = hearth(&["generate", "--model", model, "--max-tokens", "6"], prompt);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(answer(packed), answer(source));
}

/// The real model, packed into `folder`.
fn packed_model(folder: &Path) -> String {
    let packed = folder.join("model.hearth").to_str().unwrap().to_owned();
    let source = models::path("HEARTH_MODEL", "SmolLM2-135M-Instruct-Q4_1.gguf");
    let output = hearth(&["pack", source.to_str().unwrap(), &packed], "");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stderr).contains("packing 50 %"), "a line every tenth");
    packed
}

/// A daemon over a packed model, its stderr up to "ready" or its end, and the rest of it.
fn serve(folder: &Path, flags: &[&str]) -> (Child, String, BufReader<ChildStderr>) {
    let socket = folder.join("socket");
    let mut daemon = Command::new(HEARTH)
        .args(["serve", "--ctx", "256", "--sequences", "1", "--threads", "1", "--socket"])
        .arg(&socket)
        .args(flags)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stderr = BufReader::new(daemon.stderr.take().unwrap());
    let mut log = String::new();
    while !log.contains("ready: ") && stderr.read_line(&mut log).unwrap() > 0 {}
    (daemon, log, stderr)
}

#[test]
fn a_file_cut_under_a_running_daemon_ends_it_with_its_own_code() {
    let folder = tempfile::tempdir().unwrap();
    let packed = packed_model(folder.path());
    let (mut daemon, log, mut stderr) = serve(folder.path(), &["--model", &packed]);
    assert!(log.contains("ready: "), "{log}");
    let file = std::fs::OpenOptions::new().write(true).open(&packed).unwrap();
    file.set_len(file.metadata().unwrap().len() / 2).unwrap();
    let mut client = UnixStream::connect(folder.path().join("socket")).unwrap();
    let body = r#"{"prompt":"Hi","max_tokens":4}"#;
    write!(client, "POST /v1/completions HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len()).unwrap();
    let mut rest = String::new();
    stderr.read_to_string(&mut rest).unwrap();
    assert_eq!(daemon.wait().unwrap().code(), Some(LOST_FILE_EXIT_CODE.into()), "{rest}");
    assert!(rest.ends_with("(SIGBUS)\n") && rest.lines().count() == 1, "{rest}");
}

#[test]
fn a_packed_model_is_mapped_and_not_copied() {
    let folder = tempfile::tempdir().unwrap();
    let packed = packed_model(folder.path());
    let flags = ["--model", &packed];
    let plan =
        hearth(&[&["plan", "--json", "--ctx", "256", "--sequences", "1", "--threads", "1"], &flags[..]].concat(), "");
    let plan: serde_json::Value = serde_json::from_slice(&plan.stdout).unwrap();
    assert_eq!(plan["mapped_bytes"].as_u64(), Some(std::fs::metadata(&packed).unwrap().len()));
    assert!(plan["items"].as_array().unwrap().iter().all(|item| item["name"] != "weights (tiles)"), "{plan}");

    let (mut daemon, log, _stderr) = serve(folder.path(), &flags);
    assert!(log.contains("ready: "), "{log}");
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.id())).unwrap();
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    let kib = |key: &str| -> u64 {
        let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    };
    let kv_kib =
        plan["items"].as_array().unwrap().iter().find(|item| item["name"] == "kv cache (f16)").unwrap()["bytes"]
            .as_u64()
            .unwrap()
            / 1024;
    println!("anonymous {} KiB, of which kv cache {kv_kib}", kib("RssAnon:"));
    assert!(kib("RssAnon:") > kv_kib, "the plan is taken before the daemon is ready");
    assert!(kib("RssAnon:") <= kv_kib + MAX_ANONYMOUS_KIB, "{} KiB beside the KV cache", kib("RssAnon:") - kv_kib);
    assert!(kib("RssAnon:") * 1024 <= plan["total_bytes"].as_u64().unwrap());
    assert!(kib("RssFile:") > 100_000, "the file was read ahead");
}

#[test]
fn locking_locks_everything_or_says_what_it_takes() {
    let folder = tempfile::tempdir().unwrap();
    let packed = packed_model(folder.path());
    let (mut daemon, log, _stderr) = serve(folder.path(), &["--model", &packed, "--lock"]);
    if log.contains("ready: ") {
        let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.id())).unwrap();
        daemon.kill().unwrap();
        let locked = status.lines().find_map(|line| line.strip_prefix("VmLck:")).unwrap();
        assert!(locked.trim().trim_end_matches(" kB").parse::<u64>().unwrap() > 100_000, "{locked}");
    } else {
        assert!(log.contains("RLIMIT_MEMLOCK is") && log.contains("ulimit -l"), "{log}");
    }
    daemon.wait().unwrap();
}

#[test]
fn inspect_shows_the_layout_and_names_damage() {
    let folder = tempfile::tempdir().unwrap();
    let (source, target) = (folder.path().join("tiny.gguf"), folder.path().join("tiny.hearth"));
    std::fs::write(&source, tiny::model(SHAPE, "Q4_1", 7)).unwrap();
    let (source, path) = (source.to_str().unwrap(), target.to_str().unwrap());
    assert!(hearth(&["pack", source, path], "").status.success());
    let shown = String::from_utf8(hearth(&["inspect", path], "").stdout).unwrap();
    assert!(shown.contains("packed        r16k4 version 1\nsource        tiny.gguf, blake3 "), "{shown}");
    assert!(shown.contains("R16K4 Q4_1"), "{shown}");
    let whole = hearth(&["inspect", "--verify", path], "");
    assert!(whole.status.success() && whole.stdout.starts_with(b"the header and "));

    let mut bytes = std::fs::read(&target).unwrap();
    for name in ["blk.0.attn_k.weight", "blk.1.ffn_norm.weight"] {
        let at = Gguf::parse(&bytes).unwrap().tensor(name).unwrap().offset;
        bytes[usize::try_from(at).unwrap() + 11] ^= 4;
    }
    std::fs::write(&target, &bytes).unwrap();
    let damaged = hearth(&["inspect", "--verify", path], "");
    assert_eq!(damaged.status.code(), Some(1));
    let named = String::from_utf8(damaged.stdout).unwrap();
    assert_eq!(named.lines().collect::<Vec<_>>(), ["blk.1.ffn_norm.weight", "blk.0.attn_k.weight"]);
    let (code, message) = refusal(&["inspect", "--verify", source]);
    assert!(code == 1 && message.contains("no hashes"), "{message}");

    let at = bytes.windows(5).position(|window| window == b"r16k4").unwrap();
    bytes[at] = b'q';
    std::fs::write(&target, &bytes).unwrap();
    let (code, message) = refusal(&["plan", "--model", path]);
    assert!(
        code == 1 && message.contains(&format!("pack it again: hearth pack --force tiny.gguf {path}")),
        "{message}"
    );
}

#[test]
fn a_file_that_is_there_is_replaced_only_by_force_and_never_half() {
    let folder = tempfile::tempdir().unwrap();
    let (source, target) = (folder.path().join("tiny.gguf"), folder.path().join("tiny.hearth"));
    std::fs::write(&source, tiny::model(SHAPE, "Q4_1", 7)).unwrap();
    std::fs::write(&target, "old").unwrap();
    let (source, target) = (source.to_str().unwrap(), target.to_str().unwrap());
    let (code, message) = refusal(&["pack", source, target]);
    assert!(code == 2 && message.contains("tiny.hearth exists; --force replaces it"), "{message}");
    assert_eq!(std::fs::read(target).unwrap(), b"old");
    assert_eq!(refusal(&["pack", "--force", source, target]).0, 0);
    assert!(Gguf::parse(&std::fs::read(target).unwrap()).is_ok());
    let (code, message) = refusal(&["pack", target, "other"]);
    assert!(code == 1 && message.contains("packed already, from tiny.gguf"), "{message}");
    let mut names: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["tiny.gguf", "tiny.hearth"]);
}

#[test]
fn a_cut_at_any_moment_leaves_the_old_file() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("model.hearth");
    let source = models::path("HEARTH_MODEL", "SmolLM2-135M-Instruct-Q4_1.gguf");
    let mut cut = 0;
    for (signal, milliseconds) in [("KILL", 15), ("KILL", 60), ("KILL", 120), ("TERM", 30), ("INT", 90)] {
        std::fs::write(&target, "old").unwrap();
        let mut child = Command::new(HEARTH)
            .arg("pack")
            .arg("--force")
            .args([&source, &target])
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(milliseconds));
        let told = Command::new("kill").args([format!("-{signal}"), child.id().to_string()]).status().unwrap();
        let ended = child.wait().unwrap();
        if ended.success() {
            // It was faster than the cut.
            assert!(Gguf::parse(&std::fs::read(&target).unwrap()).is_ok());
            continue;
        }
        cut += 1;
        assert!(told.success());
        assert_eq!(std::fs::read(&target).unwrap(), b"old", "after SIG{signal}");
        let left = folder.path().join(format!("model.hearth.tmp-{}", child.id()));
        if signal != "KILL" {
            assert!(ended.code().is_none_or(|code| code == 130), "{ended}");
            assert!(ended.code().is_none() || !left.exists(), "a signal removes the unfinished file");
        }
        let _ = std::fs::remove_file(left);
    }
    assert!(cut >= 3, "{cut} of 5 came in time");
}

#[test]
fn a_full_file_system_is_told_with_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("tiny.gguf");
    std::fs::write(&source, tiny::model(SHAPE, "Q4_1", 7)).unwrap();
    // Nobody has to be root to find a file system without a free byte: /proc is one.
    let (code, message) = refusal(&["pack", source.to_str().unwrap(), "/proc/tiny.hearth"]);
    let needed = message.strip_prefix("hearth: /proc/tiny.hearth: ").and_then(|rest| rest.split_once(' ')).unwrap();
    assert!(code == 1 && needed.1.trim_end() == "bytes are needed, 0 are available", "{code}: {message}");
    assert!(needed.0.parse::<u64>().unwrap() > 10_000, "{message}");
}

#[test]
fn what_a_killed_run_left_is_removed_by_the_next_and_nothing_else_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let target = path("model.hearth");
    let source = models::path("HEARTH_MODEL", "SmolLM2-135M-Instruct-Q4_1.gguf");
    let mut left = None;
    // It may be faster than this test now and then, not every time.
    for _ in 0..5 {
        let mut pack = Command::new(HEARTH);
        let mut child = pack.args(["pack", "--force"]).args([&source, &target]).stderr(Stdio::null()).spawn().unwrap();
        let unfinished = path(&format!("model.hearth.tmp-{}", child.id()));
        while !unfinished.exists() && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        if unfinished.exists() {
            left = Some(unfinished);
            break;
        }
    }
    let left = left.expect("a run that was killed while it wrote");
    let _ = std::fs::remove_file(&target);
    // Under way still: its owner holds a lock. The others are not names of unfinished files of this target.
    let living = std::fs::File::create(path("model.hearth.tmp-1")).unwrap();
    living.lock().unwrap();
    let others = ["model.hearth.tmp-", "model.hearth.tmp-x1", "other.hearth.tmp-2", "model.hearth.tmp-3.bak"].map(path);
    for other in &others {
        std::fs::write(other, "kept").unwrap();
    }
    let output = hearth(&["pack", source.to_str().unwrap(), target.to_str().unwrap()], "");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    assert!(!left.exists() && said.contains(&format!("{}: removed", left.display())), "{said}");
    assert!(path("model.hearth.tmp-1").exists(), "{said}");
    assert!(others.iter().all(|other| other.exists()), "{said}");
    assert_eq!(folder.path().read_dir().unwrap().count(), 1 + 1 + others.len(), "{said}");
}
