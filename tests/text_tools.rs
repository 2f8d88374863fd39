//! `hearth tokenize` and `hearth inspect` through their library entry points, on files made here and on the real ones.
#![allow(clippy::unwrap_used)]

#[path = "common/gguf_writer.rs"]
mod gguf_writer;
#[path = "common/models.rs"]
mod models;

use std::io::Write;
use std::path::Path;

use gguf_writer::Writer;
use hearth::tools::{ToolError, inspect, tokenize};
use serde_json::{Value, json};

fn file(writer: &Writer) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&writer.finish().0).unwrap();
    file
}

fn lines(model: &Path, input: &str) -> (Vec<Value>, Result<(), ToolError>) {
    let mut output = Vec::new();
    let result = tokenize::run_on(model, &mut input.as_bytes(), &mut output);
    (String::from_utf8(output).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect(), result)
}

fn inspected(path: &Path, json: bool) -> Result<String, ToolError> {
    let mut output = Vec::new();
    inspect::run_on(path, json, &mut output)?;
    Ok(String::from_utf8(output).unwrap())
}

/// A vocabulary under an architecture and a tensor type that nobody knows.
fn strange() -> Writer {
    let mut writer = Writer::default();
    writer
        .str("general.architecture", "from\u{1b}[31mthe future")
        .str("tokenizer.ggml.model", "gpt2")
        .strs("tokenizer.ggml.tokens", &["a", "b", "ab", "<|end|>"])
        .i32s("tokenizer.ggml.token_type", &[1, 1, 1, 3])
        .f32s("numbers", &[0.1, f32::NAN])
        .strs("tokenizer.ggml.merges", &["a b"])
        .tensor("new.weight", &[7, 3], 4321, 64)
        .tensor("old.weight", &[32, 2], 31, 36)
        .tensor("norm.weight", &[4], 0, 16);
    writer
}

#[test]
fn tokenize_answers_every_line_and_names_the_bad_ones() {
    let file = file(&strange());
    let (answers, result) = lines(
        file.path(),
        "{\"text\":\"abab\"}\n\n{\"text\":\"a<|end|>\",\"parse_special\":true}\nnonsense\n{\"ids\":[2,3,0]}\n\
         {\"ids\":[4]}\n{\"text\":\"a\",\"ids\":[1]}\n{\"text\":\"a\",\"addspecial\":true}\n{\"ids\":[]}",
    );
    assert_eq!(answers[0], json!({ "ids": [2, 2] }));
    assert_eq!(answers[1], json!({ "ids": [0, 3] }));
    assert_eq!(answers[2]["error"]["line"], 4);
    assert_eq!(answers[3], json!({ "text": "ab<|end|>a" }));
    assert_eq!(answers[4]["error"], json!({ "line": 6, "message": "id 4 is outside the vocabulary of 4 tokens" }));
    assert!(answers[5]["error"]["message"].as_str().unwrap().contains("exactly one"));
    assert!(answers[6]["error"]["message"].as_str().unwrap().contains("addspecial"));
    assert_eq!(answers[7], json!({ "text": "" }));
    let error = result.unwrap_err();
    assert!(matches!(error, ToolError::BadLines { bad: 4, .. }), "{error}");
    assert_ne!(error.exit_code(), 0);
}

#[test]
fn tokenize_gives_the_recorded_ids_of_a_real_model() {
    let model = models::path("HEARTH_MODEL", "SmolLM2-135M-Instruct-Q4_1.gguf");
    let rows = std::fs::read_to_string(format!("{}/tests/data/tok_smollm2.jsonl", env!("CARGO_MANIFEST_DIR"))).unwrap();
    let rows: Vec<Value> = rows.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let question = |row: &Value| json!({ "text": row["text"], "add_special": row["add_special"], "parse_special": row["parse_special"] });
    let input: String = rows.iter().map(|row| question(row).to_string() + "\n").collect();
    let (answers, result) = lines(&model, &input);
    result.unwrap();
    assert_eq!(answers.len(), rows.len());
    for (row, answer) in rows.iter().zip(&answers) {
        assert_eq!(answer["ids"], row["ids"], "{}", row["text"]);
    }
    let input: String = answers.iter().map(|answer| answer.to_string() + "\n").collect();
    let (texts, result) = lines(&model, &input);
    result.unwrap();
    for (row, text) in rows.iter().zip(&texts) {
        assert_eq!(text["text"], row["text"]);
    }
}

#[test]
fn inspect_shows_what_cannot_be_run() {
    let file = file(&strange());
    let report: Value = serde_json::from_str(&inspected(file.path(), true).unwrap()).unwrap();
    assert_eq!((&report["version"], &report["alignment"], &report["parameters"]), (&json!(3), &json!(32), &json!(89)));
    assert_eq!(report["types"]["unknown(4321)"], json!({ "tensors": 1, "parameters": 21, "bytes": 0 }));
    assert_eq!(report["types"]["Q4_0_4_4"]["bytes"], 36);
    assert_eq!(
        report["metadata"]["tokenizer.ggml.tokens"],
        json!({ "array": "string", "len": 4, "first": ["a", "b", "ab", "<|end|>"] })
    );
    assert_eq!(report["metadata"]["numbers"]["first"], json!([0.1, null]));
    assert_eq!(report["tensors"][0]["bytes"], Value::Null);
    assert_eq!(report["tensors"][1]["dims"], json!([32, 2]));
    assert_eq!(report["file_bytes"], file.path().metadata().unwrap().len());

    let table = inspected(file.path(), false).unwrap();
    assert!(table.contains("from\\u{1b}[31mthe future") && !table.contains('\u{1b}'), "{table}");
    assert!(table.lines().any(|line| line.contains("new.weight") && line.contains("unknown(4321)")), "{table}");
}

#[test]
fn inspect_reads_the_real_files() {
    for (variable, name, wanted) in [
        ("HEARTH_MODEL", "SmolLM2-135M-Instruct-Q4_1.gguf", ["architecture  llama", "134515008", "Q4_1"]),
        ("HEARTH_GEMMA_MODEL", "gemma-3-270m-Q4_K_M.gguf", ["architecture  gemma3", "268098176", "Q4_K"]),
    ] {
        let table = inspected(&models::path(variable, name), false).unwrap();
        wanted.iter().for_each(|piece| assert!(table.contains(piece), "{name}: no {piece} in {table}"));
        assert!(table.lines().all(|line| line.len() < 600));
    }
}

#[test]
fn files_that_are_no_models_are_refused_with_their_path() {
    let mut text = tempfile::NamedTempFile::new().unwrap();
    text.write_all(b"just some text, nothing else").unwrap();
    let error = inspected(text.path(), false).unwrap_err().to_string();
    assert!(error.contains("not a GGUF file") && error.contains(&*text.path().to_string_lossy()), "{error}");
    let mut writer = Writer::default();
    writer
        .str("general.architecture", "bert")
        .str("tokenizer.ggml.model", "bert")
        .strs("tokenizer.ggml.tokens", &["a"]);
    let bert = file(&writer);
    let (answers, result) = lines(bert.path(), "{\"text\":\"a\"}");
    assert!(answers.is_empty());
    assert!(result.unwrap_err().to_string().contains("tokenizer model `bert` is not supported; supported: gpt2"));
    assert!(inspected(bert.path(), true).is_ok());
}
