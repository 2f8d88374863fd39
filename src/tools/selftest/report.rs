//! A self-test's report: one check a line, in a fixed order, as text to paste or as one JSON object. A line goes out as soon as it is
//! known, since the last ones take a while on a board. Next on the data's way: the console, or whoever ran the tool.

use std::io::Write;

use serde::Serialize;

/// Longest finding, in bytes; the rest of a longer one is left out. What is found comes from files that others write.
pub const MAX_FOUND_BYTES: usize = 300;

/// What a check came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Verdict {
    /// As it should be.
    #[serde(rename = "PASS")]
    Pass,
    /// Not as it should be.
    #[serde(rename = "FAIL")]
    Fail,
    /// This machine has none of it, or does not tell.
    #[serde(rename = "not here")]
    NotHere,
}

impl Verdict {
    fn word(self) -> &'static str {
        match self {
            Self::Pass => "PASS",
            Self::Fail => "FAIL",
            Self::NotHere => "not here",
        }
    }
}

/// One line.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Check {
    /// What was looked at.
    pub name: &'static str,
    /// What it came to.
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
}

impl Check {
    /// A check and what it found, of which control characters are left out.
    pub fn new(name: &'static str, verdict: Verdict, found: impl AsRef<str>) -> Self {
        let mut text = String::new();
        for char in found.as_ref().chars().filter(|char| !char.is_control()) {
            if text.len() + char.len_utf8() > MAX_FOUND_BYTES {
                break;
            }
            text.push(char);
        }
        Self { name, verdict, found: text }
    }

    /// As it should be where `is_right`.
    pub fn that(name: &'static str, is_right: bool, found: impl AsRef<str>) -> Self {
        Self::new(name, if is_right { Verdict::Pass } else { Verdict::Fail }, found)
    }

    /// As it should be.
    pub fn pass(name: &'static str, found: impl AsRef<str>) -> Self {
        Self::new(name, Verdict::Pass, found)
    }

    /// There is none of it.
    pub fn not_here(name: &'static str, why: impl AsRef<str>) -> Self {
        Self::new(name, Verdict::NotHere, why)
    }
}

/// All lines.
#[derive(Debug, Serialize)]
pub struct Report {
    version: &'static str,
    checks: Vec<Check>,
    failed: usize,
    /// Of the golden answer; the same on every machine.
    logits_hash: Option<String>,
    #[serde(skip)]
    as_json: bool,
}

impl Report {
    /// An empty report.
    pub fn new(as_json: bool) -> Self {
        Self { version: env!("CARGO_PKG_VERSION"), checks: Vec::new(), failed: 0, logits_hash: None, as_json }
    }

    /// Adds a line; text goes out at once.
    ///
    /// # Errors
    /// `out` does not take it.
    pub fn add(&mut self, check: Check, out: &mut impl Write) -> std::io::Result<()> {
        if !self.as_json {
            if self.checks.is_empty() {
                writeln!(out, "hearth {} selftest", self.version)?;
            }
            writeln!(out, "{:<11} {:<8}  {}", check.name, check.verdict.word(), check.found)?;
            out.flush()?;
        }
        self.failed += usize::from(check.verdict == Verdict::Fail);
        self.checks.push(check);
        Ok(())
    }

    /// The golden answer's hash.
    pub fn set_logits_hash(&mut self, hash: String) {
        self.logits_hash = Some(hash);
    }

    /// Ends the report: the sum as text, or all of it as JSON.
    ///
    /// # Errors
    /// `out` does not take it.
    pub fn end(&self, out: &mut impl Write) -> std::io::Result<()> {
        if self.as_json {
            let line = serde_json::to_string(self).map_err(std::io::Error::from)?;
            return writeln!(out, "{line}");
        }
        let count = |verdict| self.checks.iter().filter(|check| check.verdict == verdict).count();
        let (passed, absent) = (count(Verdict::Pass), count(Verdict::NotHere));
        let sum = if self.failed == 0 { "PASS" } else { "FAIL" };
        writeln!(out, "{:<11} {sum:<8}  {passed} passed, {} failed, {absent} not here", "selftest", self.failed)?;
        out.flush()
    }

    /// Lines that are not as they should be.
    pub fn failed(&self) -> usize {
        self.failed
    }

    /// All lines.
    pub fn checks(&self) -> &[Check] {
        &self.checks
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn report(as_json: bool) -> (Report, String) {
        let (mut report, mut out) = (Report::new(as_json), Vec::new());
        report.add(Check::pass("cpu", "a\x1b[2J\0b"), &mut out).unwrap();
        report.add(Check::that("clock", false, "600 MHz"), &mut out).unwrap();
        report.add(Check::not_here("thermal", "no zones"), &mut out).unwrap();
        report.set_logits_hash("00ff".into());
        report.end(&mut out).unwrap();
        (report, String::from_utf8(out).unwrap())
    }

    #[test]
    fn a_report_is_plain_text_with_its_sum_at_the_end() {
        let (report, text) = report(false);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[1], "cpu         PASS      a[2Jb");
        assert_eq!(lines[2], "clock       FAIL      600 MHz");
        assert_eq!(lines[3], "thermal     not here  no zones");
        assert_eq!(lines[4], "selftest    FAIL      1 passed, 1 failed, 1 not here");
        assert_eq!((report.failed(), report.checks().len()), (1, 3));
    }

    #[test]
    fn the_same_as_one_json_object() {
        let (_, text) = report(true);
        assert_eq!(text.lines().count(), 1);
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!((&json["failed"], &json["logits_hash"]), (&1.into(), &"00ff".into()));
        let wanted = serde_json::json!({"name": "thermal", "verdict": "not here", "found": "no zones"});
        assert_eq!(json["checks"][2], wanted);
    }

    #[test]
    fn what_is_found_is_bounded() {
        assert_eq!(Check::pass("x", "ä".repeat(1000)).found.len(), MAX_FOUND_BYTES);
    }
}
