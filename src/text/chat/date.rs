//! A date as a request or the configuration gives it, and Python's `strftime` for it. There is no clock here.
//! Next on the data's way: `strftime_now` in a chat template.

use std::str::FromStr;

/// Bytes that one `strftime` may produce.
const MAX_FORMATTED_BYTES: usize = 4096;
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// A day of the Gregorian calendar with a time of day.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Date {
    year: u16,
    /// 1 to 12.
    month: u8,
    /// 1 to 31.
    day: u8,
    hour: u8,
    minute: u8,
    second: u8,
}

/// Why a date is none, or cannot be written as asked.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum DateError {
    /// Not in the form wanted, or no such day.
    #[error("`{found}` is no date; wanted YYYY-MM-DD, or YYYY-MM-DDTHH:MM:SS")]
    NoDate {
        /// What was given, at most 40 characters of it.
        found: String,
    },
    /// A directive of `strftime` that is not known here.
    #[error("strftime directive `%{directive}` is not supported")]
    Directive {
        /// The character after the percent sign.
        directive: char,
    },
    /// The format would produce too much.
    #[error("strftime result exceeds {MAX_FORMATTED_BYTES} bytes")]
    TooLong,
}

impl FromStr for Date {
    type Err = DateError;

    fn from_str(text: &str) -> Result<Self, DateError> {
        parse(text).ok_or_else(|| DateError::NoDate { found: text.chars().take(40).collect() })
    }
}

impl Date {
    /// Writes the date as Python's `strftime` would in the C locale.
    ///
    /// # Errors
    /// A directive that is not known, or too long a result.
    pub fn strftime(&self, format: &str) -> Result<String, DateError> {
        let mut out = String::new();
        let mut chars = format.chars();
        while let Some(character) = chars.next() {
            if character != '%' {
                out.push(character);
            } else {
                let mut directive = chars.next().unwrap_or('%');
                let padded = directive != '-';
                if !padded {
                    directive = chars.next().unwrap_or('-');
                }
                let piece = self.directive(directive)?;
                out.push_str(if padded { &piece } else { unpadded(&piece) });
            }
            if out.len() > MAX_FORMATTED_BYTES {
                return Err(DateError::TooLong);
            }
        }
        Ok(out)
    }

    fn directive(&self, directive: char) -> Result<String, DateError> {
        let month = MONTHS[usize::from(self.month - 1)];
        let weekday = WEEKDAYS[self.weekday()];
        let hour12 = (self.hour + 11) % 12 + 1;
        Ok(match directive {
            'Y' => format!("{:04}", self.year),
            'y' => format!("{:02}", self.year % 100),
            'm' => format!("{:02}", self.month),
            'd' => format!("{:02}", self.day),
            'e' => format!("{:2}", self.day),
            'j' => format!("{:03}", self.day_of_year()),
            'B' => month.to_string(),
            'b' | 'h' => month[..3].to_string(),
            'A' => weekday.to_string(),
            'a' => weekday[..3].to_string(),
            'H' => format!("{:02}", self.hour),
            'I' => format!("{hour12:02}"),
            'M' => format!("{:02}", self.minute),
            'S' => format!("{:02}", self.second),
            'p' => if self.hour < 12 { "AM" } else { "PM" }.to_string(),
            'F' => format!("{:04}-{:02}-{:02}", self.year, self.month, self.day),
            'T' => format!("{:02}:{:02}:{:02}", self.hour, self.minute, self.second),
            '%' => "%".to_string(),
            directive => return Err(DateError::Directive { directive }),
        })
    }

    fn day_of_year(&self) -> u16 {
        let before: u16 = (1..self.month).map(|month| u16::from(days_in(self.year, month))).sum();
        before + u16::from(self.day)
    }

    /// 0 is Sunday. Zeller's congruence, in Sakamoto's form.
    fn weekday(&self) -> usize {
        const SHIFT: [u32; 12] = [0, 3, 2, 5, 0, 3, 5, 1, 4, 6, 2, 4];
        let year = u32::from(self.year) - u32::from(self.month < 3);
        let shift = SHIFT[usize::from(self.month - 1)];
        ((year + year / 4 - year / 100 + year / 400 + shift + u32::from(self.day)) % 7) as usize
    }
}

fn parse(text: &str) -> Option<Date> {
    let (day, time) = match text.split_once(['T', ' ']) {
        Some((day, time)) => (day, Some(time.strip_suffix('Z').unwrap_or(time))),
        None => (text, None),
    };
    let year = number(day.get(..4)?, 1..=9999)?;
    let month = number(day.get(4..)?.strip_prefix('-')?.get(..2)?, 1..=12)?;
    let month = u8::try_from(month).ok()?;
    let day = number(day.get(7..)?.strip_prefix('-')?, 1..=u16::from(days_in(year, month)))?;
    let mut clock = [0u8; 3];
    if let Some(time) = time {
        let parts: Vec<&str> = time.split(':').collect();
        if !(2..=3).contains(&parts.len()) {
            return None;
        }
        for ((slot, part), last) in clock.iter_mut().zip(parts).zip([23, 59, 59]) {
            *slot = u8::try_from(number(part, 0..=last)?).ok()?;
        }
    }
    let [hour, minute, second] = clock;
    Some(Date { year, month, day: u8::try_from(day).ok()?, hour, minute, second })
}

/// A number of two or four digits.
fn number(text: &str, range: std::ops::RangeInclusive<u16>) -> Option<u16> {
    let digits = matches!(text.len(), 2 | 4) && text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().ok())?.filter(|number| range.contains(number))
}

fn days_in(year: u16, month: u8) -> u8 {
    match month {
        2 if year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400)) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

fn unpadded(piece: &str) -> &str {
    let rest = piece.trim_start_matches(['0', ' ']);
    if rest.is_empty() { "0" } else { rest }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn format(date: &str, format: &str) -> String {
        date.parse::<Date>().unwrap().strftime(format).unwrap()
    }

    #[test]
    fn formats_as_python_does() {
        assert_eq!(format("2026-11-23", "%d %b %Y"), "23 Nov 2026");
        assert_eq!(format("2024-02-29", "%A, %-d %B %y, day %j"), "Thursday, 29 February 24, day 060");
        assert_eq!(
            format("2026-01-05T00:07", "%a %e %I:%M:%S %p %-m/%-d %F %T 100%%"),
            "Mon  5 12:07:00 AM 1/5 2026-01-05 00:07:00 100%"
        );
        assert_eq!(format("2000-03-01 23:59:58Z", "%H %I %p %a"), "23 11 PM Wed");
    }

    #[test]
    fn refuses_what_is_no_date() {
        for text in [
            "",
            "2026",
            "2026-13-01",
            "2025-02-29",
            "2026-1-1",
            "2026-01-01T25:00",
            "2026-01-01T1",
            "é026-01-01",
            "2026-é1-01",
        ] {
            assert!(text.parse::<Date>().is_err(), "{text}");
        }
        assert!("2026-01-01".parse::<Date>().unwrap().strftime("%Q").is_err());
        assert!("2026-01-01".parse::<Date>().unwrap().strftime(&"%A".repeat(5000)).is_err());
    }
}
