//! `hearth inspect`: what a GGUF file holds, whether or not this program can run it.
//! Next on the data's way: a person, or a script that reads the JSON.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Map, Value as Json, json};

use super::ToolError;
use super::session::SessionError;
use crate::model::gguf::{Array, GgmlType, Gguf, Value, ValueType};
use crate::model::packed::{self, Damage, LAYOUT, LAYOUT_VERSION, Packed};
use crate::sys::map::Mapping;

/// Elements of an array that are shown; the rest is counted.
const SHOWN_ELEMENTS: usize = 8;
/// Characters of a value that the table for people shows.
const SHOWN_CHARACTERS: usize = 100;

/// Print what a GGUF file holds: version, architecture, types, metadata, tensors.
///
/// --json prints one object: {"file_bytes", "version", "alignment", "architecture", "packed", "parameters",
///   "packed": null or {"source_name", "source_hash"}, "types": {NAME: {"tensors", "parameters", "bytes"}}, "metadata": {KEY: VALUE},
///   "tensors": [{"name", "type", "dims", "offset", "bytes"}]}
/// Arrays are shown as {"array": TYPE, "len": N, "first": [...]}; the first of dims is the length of a row.
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub struct InspectArgs {
    /// The file (GGUF)
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Compare every tensor of a packed model with its hash, and name the damaged ones
    #[arg(long, conflicts_with = "json")]
    verify: bool,
}

#[derive(Serialize)]
struct Report<'m> {
    file_bytes: usize,
    version: u32,
    alignment: u64,
    architecture: Option<&'m str>,
    packed: Option<Packed<'m>>,
    parameters: u64,
    types: BTreeMap<String, TypeCount>,
    metadata: Map<String, Json>,
    tensors: Vec<TensorRow<'m>>,
}

#[derive(Default, Serialize)]
struct TypeCount {
    tensors: usize,
    parameters: u64,
    bytes: u64,
}

#[derive(Serialize)]
struct TensorRow<'m> {
    name: &'m str,
    #[serde(rename = "type")]
    ggml_type: String,
    dims: Vec<u64>,
    offset: u64,
    /// `null` for a type whose block size nobody knows.
    bytes: Option<u64>,
}

/// Runs the tool on stdout.
///
/// # Errors
/// The file cannot be read, or is no GGUF file.
pub fn run(args: &InspectArgs) -> Result<(), ToolError> {
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    if args.verify {
        verify(&args.file, &mut out)?;
        return Ok(out.flush()?);
    }
    run_on(&args.file, args.json, &mut out)?;
    Ok(out.flush()?)
}

/// Runs the tool on any output.
///
/// # Errors
/// As [`run`], or the output failed.
pub fn run_on(file: &Path, json: bool, out: &mut impl Write) -> Result<(), ToolError> {
    let mapping = Mapping::open(file).map_err(SessionError::from)?;
    let gguf = Gguf::parse(mapping.bytes()).map_err(|source| SessionError::model(file, source.into()))?;
    let report = Report::new(&gguf, mapping.bytes().len());
    if json {
        serde_json::to_writer(&mut *out, &report).map_err(std::io::Error::from)?;
        writeln!(out)?;
    } else {
        report.print(out)?;
    }
    Ok(())
}

/// Prints the damaged parts of a packed model, one a line.
fn verify(file: &Path, out: &mut impl Write) -> Result<(), ToolError> {
    let mapping = Mapping::open(file).map_err(SessionError::from)?;
    let gguf = Gguf::parse(mapping.bytes()).map_err(|source| SessionError::model(file, source.into()))?;
    let damaged = packed::verify(&gguf, |_| ());
    let damaged = damaged.map_err(|source| ToolError::Verify { path: file.into(), source })?;
    let tensors = gguf.tensors().len();
    if damaged.is_empty() {
        return Ok(writeln!(out, "the header and {tensors} tensors are as they were written")?);
    }
    for damage in &damaged {
        match damage {
            Damage::Header => writeln!(out, "header")?,
            Damage::Tensor(name) => writeln!(out, "{}", name.escape_debug())?,
        }
    }
    out.flush()?;
    Err(ToolError::Damaged { path: file.into(), damaged: damaged.len(), parts: tensors + 1 })
}

impl<'m> Report<'m> {
    fn new(gguf: &Gguf<'m>, file_bytes: usize) -> Self {
        let mut types: BTreeMap<String, TypeCount> = BTreeMap::new();
        let mut parameters = 0u64;
        for tensor in gguf.tensors() {
            let count = types.entry(tensor.ggml_type.to_string()).or_default();
            count.tensors += 1;
            // The file's word for tensors of unknown types is unchecked, so sums of it may be anything.
            count.parameters = count.parameters.saturating_add(tensor.elements());
            count.bytes = count.bytes.saturating_add(tensor.bytes);
            parameters = parameters.saturating_add(tensor.elements());
        }
        let row = |tensor: &crate::model::gguf::TensorInfo<'m>| TensorRow {
            name: tensor.name,
            ggml_type: tensor.ggml_type.to_string(),
            dims: tensor.dims.iter().take(tensor.n_dims as usize).copied().collect(),
            offset: tensor.offset,
            bytes: (!matches!(tensor.ggml_type, GgmlType::Unknown(_))).then_some(tensor.bytes),
        };
        Self {
            file_bytes,
            version: gguf.version(),
            alignment: gguf.alignment(),
            architecture: gguf.architecture().ok(),
            // Another layout's names are among the metadata.
            packed: packed::read(gguf).ok().flatten(),
            parameters,
            types,
            metadata: gguf.metadata().map(|(key, value)| (key.to_string(), value_json(value))).collect(),
            tensors: gguf.tensors().iter().map(row).collect(),
        }
    }

    /// The table for people. Names and texts come from the file, so what a terminal would act on is escaped.
    fn print(&self, out: &mut impl Write) -> std::io::Result<()> {
        writeln!(out, "GGUF version {}, alignment {}, {} bytes", self.version, self.alignment, self.file_bytes)?;
        writeln!(out, "architecture  {}", self.architecture.unwrap_or("(none)").escape_debug())?;
        if let Some(packed) = &self.packed {
            writeln!(out, "packed        {LAYOUT} version {LAYOUT_VERSION}")?;
            writeln!(
                out,
                "source        {}, blake3 {}",
                packed.source_name.escape_debug(),
                packed.source_hash.escape_debug()
            )?;
        }
        writeln!(out, "parameters    {} ({:.1} M)", self.parameters, self.parameters as f64 / 1e6)?;
        for (name, count) in &self.types {
            let (tensors, parameters, bytes) = (count.tensors, count.parameters, count.bytes);
            writeln!(out, "  {name:<10} {tensors:>5} tensors {parameters:>14} values {bytes:>14} bytes")?;
        }
        writeln!(out, "\nmetadata ({})", self.metadata.len())?;
        for (key, value) in &self.metadata {
            writeln!(out, "  {:<44} {}", key.escape_debug().to_string(), shown(value))?;
        }
        writeln!(out, "\ntensors ({})", self.tensors.len())?;
        for tensor in &self.tensors {
            let dims = tensor.dims.iter().map(u64::to_string).collect::<Vec<_>>().join(" x ");
            let bytes = tensor.bytes.map_or_else(|| "?".to_string(), |bytes| bytes.to_string());
            let (name, ggml_type) = (tensor.name.escape_debug().to_string(), &tensor.ggml_type);
            writeln!(out, "  {name:<44} {ggml_type:<8} {dims:>20} {bytes:>12} bytes at {}", tensor.offset)?;
        }
        Ok(())
    }
}

/// One line of at most [`SHOWN_CHARACTERS`]. JSON escapes control characters up to U+001F; the rest is escaped here.
fn shown(value: &Json) -> String {
    let text = value.to_string();
    let mut line = String::new();
    for character in text.chars().take(SHOWN_CHARACTERS) {
        if character.is_control() {
            line.extend(character.escape_unicode());
        } else {
            line.push(character);
        }
    }
    if text.chars().nth(SHOWN_CHARACTERS).is_some() {
        line.push_str(&format!("… ({} bytes)", text.len()));
    }
    line
}

fn value_json(value: &Value<'_>) -> Json {
    match value {
        Value::Int(number, _) => int_json(*number),
        Value::Float(number, ValueType::F32) => float_json(*number as f32),
        Value::Float(number, _) => json!(number),
        Value::Bool(truth) => json!(truth),
        Value::Str(text) => json!(String::from_utf8_lossy(text)),
        Value::Array(array) => {
            json!({ "array": array.element_type().name(), "len": array.len(), "first": first_elements(array) })
        }
    }
}

fn first_elements(array: &Array<'_>) -> Vec<Json> {
    if let Some(strings) = array.strings() {
        return strings.take(SHOWN_ELEMENTS).map(|text| json!(String::from_utf8_lossy(text))).collect();
    }
    if let Some(numbers) = array.floats() {
        return numbers.take(SHOWN_ELEMENTS).map(float_json).collect();
    }
    array.ints().map(|numbers| numbers.take(SHOWN_ELEMENTS).map(int_json).collect()).unwrap_or_default()
}

/// GGUF integers have 64 bits, signed or not.
fn int_json(number: i128) -> Json {
    match (u64::try_from(number), i64::try_from(number)) {
        (Ok(number), _) => json!(number),
        (_, Ok(number)) => json!(number),
        _ => json!(number.to_string()),
    }
}

/// The shortest decimal that is this `f32`, not the longer one of the same value as `f64`; `null` for NaN and infinities.
fn float_json(number: f32) -> Json {
    number.to_string().parse::<f64>().map_or(Json::Null, |number| json!(number))
}
