//! Stop strings in streamed text: what may be the beginning of one is held back until it is clear whether it is.
//! Next on the data's way: the client's connection; a match cancels the job in the engine.

/// Stop strings a request may give.
pub const MAX_STOP_STRINGS: usize = 16;
/// Bytes of a stop string.
pub const MAX_STOP_BYTES: usize = 256;

/// Why a request's stop strings are refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum StopError {
    /// Too many of them.
    #[error("{found} stop strings; at most {MAX_STOP_STRINGS} are taken")]
    TooMany {
        /// How many there are.
        found: usize,
    },
    /// One that is empty or too long.
    #[error("stop string {index} has {bytes} bytes; 1 to {MAX_STOP_BYTES} are taken")]
    Length {
        /// Which one, counted from 0.
        index: usize,
        /// Its length.
        bytes: usize,
    },
}

/// Watches a stream of text for stop strings.
///
/// The stop string that is complete first ends the text, the longer one of two that end together: how the text was cut
/// into pieces makes no difference.
#[derive(Debug, Default)]
pub struct StopMatcher {
    stops: Vec<Box<str>>,
    /// Text that is not emitted yet because it may begin a stop string.
    held: String,
    out: String,
    found: Option<usize>,
}

impl StopMatcher {
    /// A matcher for these stop strings, which may be none.
    ///
    /// # Errors
    /// More than [`MAX_STOP_STRINGS`], or one that is empty or longer than [`MAX_STOP_BYTES`].
    pub fn new<T: AsRef<str>>(stops: &[T]) -> Result<Self, StopError> {
        if stops.len() > MAX_STOP_STRINGS {
            return Err(StopError::TooMany { found: stops.len() });
        }
        for (index, stop) in stops.iter().enumerate() {
            let bytes = stop.as_ref().len();
            if bytes == 0 || bytes > MAX_STOP_BYTES {
                return Err(StopError::Length { index, bytes });
            }
        }
        Ok(Self { stops: stops.iter().map(|stop| stop.as_ref().into()).collect(), ..Self::default() })
    }

    /// Takes text; returns what may be emitted. After a match that is nothing.
    pub fn push(&mut self, text: &str) -> &str {
        self.out.clear();
        if self.found.is_some() {
            return "";
        }
        self.held.push_str(text);
        let emit = match self.first_match() {
            Some((start, stop)) => {
                self.found = Some(stop);
                start
            }
            None => self.held.len() - self.possible_beginning(),
        };
        self.out.push_str(&self.held[..emit]);
        match self.found {
            Some(_) => self.held.clear(),
            None => drop(self.held.drain(..emit)),
        }
        &self.out
    }

    /// Ends the stream; returns what was held back.
    pub fn finish(&mut self) -> &str {
        self.out.clear();
        std::mem::swap(&mut self.out, &mut self.held);
        &self.out
    }

    /// The stop string that ended the text.
    pub fn found(&self) -> Option<&str> {
        self.found.and_then(|index| self.stops.get(index)).map(|stop| &**stop)
    }

    /// Where the first complete stop string begins, and which one it is.
    fn first_match(&self) -> Option<(usize, usize)> {
        let ends = self.stops.iter().enumerate().filter_map(|(index, stop)| {
            let start = self.held.find(&**stop)?;
            Some((start + stop.len(), start, index))
        });
        ends.min().map(|(_, start, index)| (start, index))
    }

    /// Bytes at the end of the held text that begin a stop string.
    fn possible_beginning(&self) -> usize {
        let beginning = |stop: &str| {
            let longest = self.held.len().min(stop.len() - 1);
            (1..=longest).rev().find(|&len| self.held.as_bytes().ends_with(&stop.as_bytes()[..len])).unwrap_or(0)
        };
        self.stops.iter().map(|stop| beginning(stop)).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    fn stream(stops: &[&str], pieces: &[&str]) -> (String, Option<String>) {
        let mut matcher = StopMatcher::new(stops).unwrap();
        let mut text: String = pieces.iter().map(|piece| matcher.push(piece).to_string()).collect();
        text.push_str(matcher.finish());
        (text, matcher.found().map(str::to_string))
    }

    #[test]
    fn holds_back_what_may_begin_a_stop_string() {
        let mut matcher = StopMatcher::new(&["END", "\n\n"]).unwrap();
        assert_eq!(matcher.push("say E"), "say ");
        assert_eq!(matcher.push("NT\n"), "ENT");
        assert_eq!(matcher.push("x EEN"), "\nx E");
        assert_eq!(matcher.push("D more"), "");
        assert_eq!(matcher.found(), Some("END"));
        assert_eq!(matcher.push("more"), "");
        assert_eq!(matcher.finish(), "");
    }

    #[test]
    fn what_was_held_comes_at_the_end() {
        assert_eq!(stream(&["END"], &["the EN"]), ("the EN".to_string(), None));
        assert_eq!(stream(&["é!"], &["caf", "é", "?"]), ("café?".to_string(), None));
        assert_eq!(stream(&[], &["any", "thing"]), ("anything".to_string(), None));
    }

    #[test]
    fn limits() {
        assert_eq!(StopMatcher::new(&["x"; 17]).unwrap_err(), StopError::TooMany { found: 17 });
        assert_eq!(StopMatcher::new(&["x", ""]).unwrap_err(), StopError::Length { index: 1, bytes: 0 });
        assert!(StopMatcher::new(&["x".repeat(257)]).is_err());
    }

    proptest! {
        #[test]
        fn how_text_is_cut_makes_no_difference(
            text in "[ab\u{e9}]{0,20}",
            stops in prop::collection::vec("[ab\u{e9}]{1,4}", 0..4),
            cut in 0usize..20,
        ) {
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let each: Vec<String> = text.chars().map(String::from).collect();
            let each: Vec<&str> = each.iter().map(String::as_str).collect();
            let whole = stream(&stops, &[&text]);
            prop_assert_eq!(&stream(&stops, &each), &whole);
            let cut = each.len().min(cut);
            prop_assert_eq!(&stream(&stops, &[&each[..cut].concat(), &each[cut..].concat()]), &whole);
            match &whole.1 {
                Some(stop) => prop_assert!(text[whole.0.len()..].starts_with(stop.as_str())),
                None => prop_assert_eq!(&whole.0, &text),
            }
        }
    }
}
