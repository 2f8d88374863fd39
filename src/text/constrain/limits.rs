//! What a schema or a grammar may cost before the crate reads it: whatever it follows by calls that call themselves, and whatever it
//! does in more than linear time without counting, is bounded here. Called by [`super::Grammars::begin`]; nothing comes next on the data's way but `llguidance`.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

/// Groups inside one another in a grammar.
const MAX_GROUP_DEPTH: usize = 64;
/// Rules of a grammar: one may name the next, and so on.
const MAX_RULES: usize = 200;
/// Bytes of a rule with the terminals that it names in their places, each time: a terminal becomes one regular expression.
const MAX_TERMINAL_BYTES: usize = 8 * 1024;
/// References in a schema: one may lead to the next, and so on.
const MAX_REFERENCES: usize = 150;
/// Length of one regular expression in a schema, in bytes.
const MAX_PATTERN_BYTES: usize = 1000;
/// Regular expressions (`pattern`, `format`, `patternProperties`) of a schema whose parts are to hold together (`allOf`, or a
/// reference or alternatives beside other keywords): the crate intersects them.
const MAX_INTERSECTED: usize = 8;
/// Regular expressions for names of properties: each is compared with each.
const MAX_NAME_PATTERNS: usize = 16;

/// Keywords whose schemas hold together with what stands beside them.
const COMBINING: [&str; 4] = ["allOf", "anyOf", "oneOf", "$ref"];
/// Keywords beside which there is something to intersect.
const COMBINED: [&str; 6] = ["properties", "additionalProperties", "pattern", "format", "items", "prefixItems"];

/// What was met in a schema.
#[derive(Default)]
struct Met {
    references: usize,
    patterns: usize,
    name_patterns: usize,
    intersects: bool,
    long_pattern: Option<usize>,
}

/// A schema of bounded cost; the crate refuses one that is too large when compiled.
pub(super) fn schema(schema: &Value) -> Result<&Value, String> {
    let mut met = Met::default();
    met.look(schema);
    if let Some(bytes) = met.long_pattern {
        return Err(format!("a pattern has {bytes} bytes, at most {MAX_PATTERN_BYTES} are read"));
    }
    let (patterns, names) = (met.patterns + met.name_patterns, met.name_patterns);
    for (what, found, most) in [
        ("references", met.references, MAX_REFERENCES),
        ("patterns of property names", names, MAX_NAME_PATTERNS),
        (
            "patterns and formats beside allOf, anyOf, oneOf or $ref",
            if met.intersects { patterns } else { 0 },
            MAX_INTERSECTED,
        ),
    ] {
        if found > most {
            return Err(format!("the schema has {found} {what}, at most {most} are served"));
        }
    }
    Ok(schema)
}

impl Met {
    /// Values that are no schemas are looked at, too: that errs on the safe side. Their depth is bounded.
    fn look(&mut self, value: &Value) {
        match value {
            Value::Array(list) => list.iter().for_each(|value| self.look(value)),
            Value::Object(map) => self.look_at_keywords(map),
            _ => {}
        }
    }

    fn look_at_keywords(&mut self, map: &Map<String, Value>) {
        let combining = COMBINING.iter().filter(|name| map.contains_key(**name)).count();
        let combined = COMBINED.iter().filter(|name| map.contains_key(**name)).count();
        let several = map.get("allOf").and_then(Value::as_array).is_some_and(|all| all.len() > 1);
        self.intersects |= several || combining > 1 || combining == 1 && combined > 0;
        for (name, value) in map {
            match (name.as_str(), value) {
                ("$ref", _) => self.references += 1,
                ("pattern", Value::String(pattern)) => self.pattern(pattern),
                ("format", _) => self.patterns += 1,
                ("patternProperties", Value::Object(patterns)) => {
                    self.name_patterns += patterns.len();
                    patterns.keys().for_each(|pattern| self.pattern(pattern));
                }
                _ => {}
            }
            self.look(value);
        }
    }

    fn pattern(&mut self, pattern: &str) {
        self.patterns += 1;
        if pattern.len() > MAX_PATTERN_BYTES {
            self.long_pattern = Some(pattern.len());
        }
    }
}

/// A grammar of bounded depth, of either kind.
pub(super) fn grammar(text: &str) -> Result<&str, String> {
    let rules = text.lines().filter(|line| line.contains(':')).count();
    if rules > MAX_RULES {
        return Err(format!("the grammar has {rules} rules, at most {MAX_RULES} are read"));
    }
    let depth = group_depth(text);
    if depth > MAX_GROUP_DEPTH {
        return Err(format!("the grammar's groups are {depth} levels deep, at most {MAX_GROUP_DEPTH} are read"));
    }
    Ok(text)
}

/// A grammar of Lark, in which `&` intersects.
pub(super) fn lark(text: &str) -> Result<&str, String> {
    let found = outside_strings(text).filter(|byte| *byte == b'&').count();
    if found > MAX_INTERSECTED {
        return Err(format!("the grammar has {found} intersections (`&`), at most {MAX_INTERSECTED} are served"));
    }
    let bytes = terminal_bytes(text);
    if bytes > MAX_TERMINAL_BYTES {
        let most = format!("at most {MAX_TERMINAL_BYTES} are read");
        return Err(format!("a rule with the terminals that it names in their places has {bytes} bytes, {most}"));
    }
    grammar(text)
}

/// The longest terminal, written out. Names in regular expressions count, too, which errs on the safe side.
fn terminal_bytes(text: &str) -> usize {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut rules: BTreeMap<&str, (usize, Vec<&str>)> = BTreeMap::new();
    let mut current = "";
    for line in text.lines() {
        let name = line.split(|c| !is_name(c)).next().unwrap_or_default();
        if !name.is_empty() && line[name.len()..].contains(':') {
            current = name;
        }
        let (bytes, names) = rules.entry(current).or_default();
        *bytes += line.len();
        let rest = line.strip_prefix(current).unwrap_or(line);
        let is_terminal = |name: &&str| name.trim_start_matches('_').starts_with(|c: char| c.is_ascii_uppercase());
        names.extend(rest.split(|c| !is_name(c)).filter(is_terminal));
    }
    let mut known: BTreeMap<&str, usize> = BTreeMap::new();
    rules.keys().map(|name| written_out(name, &rules, &mut known)).max().unwrap_or(0)
}

/// Who names itself is refused elsewhere, and counts once here.
fn written_out<'t>(
    name: &'t str,
    rules: &BTreeMap<&'t str, (usize, Vec<&'t str>)>,
    known: &mut BTreeMap<&'t str, usize>,
) -> usize {
    if let Some(bytes) = known.get(name) {
        return *bytes;
    }
    let Some((own, names)) = rules.get(name) else { return 0 };
    known.insert(name, 0);
    let bytes = names.iter().fold(*own, |sum, name| sum.saturating_add(written_out(name, rules, known)));
    known.insert(name, bytes);
    bytes
}

/// Groups inside one another, brackets in strings left out; regular expressions count, as they are read by calls, too.
fn group_depth(text: &str) -> usize {
    let (mut depth, mut most) = (0usize, 0);
    for byte in outside_strings(text) {
        match byte {
            b'(' | b'[' | b'{' => {
                depth += 1;
                most = most.max(depth);
            }
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    most
}

/// The bytes that are in no string and not escaped; no string goes over a line.
fn outside_strings(text: &str) -> impl Iterator<Item = u8> {
    let (mut in_string, mut escaped) = (false, false);
    text.bytes().filter(move |byte| {
        match byte {
            _ if escaped => {
                escaped = false;
                return false;
            }
            b'\\' => escaped = true,
            b'\n' => in_string = false,
            b'"' => in_string = !in_string,
            _ => return !in_string,
        }
        false
    })
}
