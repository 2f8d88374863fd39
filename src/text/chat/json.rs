//! `tojson` as Python's `json.dumps(value, ensure_ascii=False)` writes it: templates were made with those spaces.
//! Next on the data's way: the rendered prompt.

use std::io;

use minijinja::value::{Kwargs, Value};
use minijinja::{Error, ErrorKind};
use serde::Serialize;
use serde_json::ser::{Formatter, Serializer};

/// Widest indentation, columns.
const MAX_INDENT: usize = 16;

/// The filter, with the keyword arguments of Python's function that templates use.
pub(super) fn tojson(value: &Value, indent: Option<usize>, options: Kwargs) -> Result<Value, Error> {
    let indent = match indent {
        Some(columns) => Some(columns),
        None => options.get::<Option<usize>>("indent")?,
    };
    if indent.is_some_and(|columns| columns > MAX_INDENT) {
        return Err(Error::new(ErrorKind::InvalidOperation, format!("tojson: indent is over {MAX_INDENT}")));
    }
    let ascii = options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let sorted = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    let separators = options.get::<Option<Vec<String>>>("separators")?;
    options.assert_all_used()?;

    let fail = |e: serde_json::Error| Error::new(ErrorKind::InvalidOperation, format!("tojson: {e}"));
    let mut tree = serde_json::to_value(value).map_err(fail)?;
    if sorted {
        tree.sort_all_objects();
    }
    let default = [if indent.is_some() { "," } else { ", " }.to_string(), ": ".to_string()];
    let [item, key] = match separators.map(<[String; 2]>::try_from) {
        None => default,
        Some(Ok(pair)) => pair,
        Some(Err(_)) => return Err(Error::new(ErrorKind::InvalidOperation, "tojson: separators must be two strings")),
    };
    let mut out = Vec::new();
    let style = Python { item, key, indent, depth: 0, has_items: false };
    tree.serialize(&mut Serializer::with_formatter(&mut out, style)).map_err(fail)?;
    let text = String::from_utf8_lossy(&out);
    Ok(Value::from_safe_string(if ascii { escaped(&text) } else { text.into_owned() }))
}

/// Outside ASCII there are only strings' characters.
fn escaped(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    for character in json.chars() {
        if character.is_ascii() {
            out.push(character);
        } else {
            character.encode_utf16(&mut [0; 2]).iter().for_each(|unit| out.push_str(&format!("\\u{unit:04x}")));
        }
    }
    out
}

struct Python {
    item: String,
    key: String,
    indent: Option<usize>,
    depth: usize,
    has_items: bool,
}

impl Python {
    fn line<W: io::Write + ?Sized>(&self, out: &mut W) -> io::Result<()> {
        match self.indent {
            Some(columns) => write!(out, "\n{:1$}", "", columns * self.depth),
            None => Ok(()),
        }
    }

    fn open<W: io::Write + ?Sized>(&mut self, out: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth += 1;
        self.has_items = false;
        out.write_all(bracket)
    }

    fn close<W: io::Write + ?Sized>(&mut self, out: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        if self.has_items {
            self.line(out)?;
        }
        self.has_items = true;
        out.write_all(bracket)
    }

    fn next<W: io::Write + ?Sized>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if !first {
            out.write_all(self.item.as_bytes())?;
        }
        self.line(out)
    }
}

impl Formatter for Python {
    fn begin_array<W: io::Write + ?Sized>(&mut self, out: &mut W) -> io::Result<()> {
        self.open(out, b"[")
    }

    fn end_array<W: io::Write + ?Sized>(&mut self, out: &mut W) -> io::Result<()> {
        self.close(out, b"]")
    }

    fn begin_array_value<W: io::Write + ?Sized>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.next(out, first)
    }

    fn end_array_value<W: io::Write + ?Sized>(&mut self, _: &mut W) -> io::Result<()> {
        self.has_items = true;
        Ok(())
    }

    fn begin_object<W: io::Write + ?Sized>(&mut self, out: &mut W) -> io::Result<()> {
        self.open(out, b"{")
    }

    fn end_object<W: io::Write + ?Sized>(&mut self, out: &mut W) -> io::Result<()> {
        self.close(out, b"}")
    }

    fn begin_object_key<W: io::Write + ?Sized>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.next(out, first)
    }

    fn begin_object_value<W: io::Write + ?Sized>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(self.key.as_bytes())
    }

    fn end_object_value<W: io::Write + ?Sized>(&mut self, _: &mut W) -> io::Result<()> {
        self.has_items = true;
        Ok(())
    }
}
