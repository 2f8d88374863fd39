//! Token ids back to text as a stream: a character whose bytes are spread over tokens is emitted once it is whole.
//! Next on the data's way: `stop`, then the client's connection.

use super::{TokenId, Vocab};

/// Turns tokens into text, one at a time. Bytes that are no UTF-8 become U+FFFD.
///
/// However the bytes are spread over tokens, the text put together is that of `String::from_utf8_lossy` over all of them.
#[derive(Debug, Default)]
pub struct Detokenizer {
    /// The first bytes of a character that is not whole yet. Invariant: at most 3.
    pending: Vec<u8>,
    out: String,
}

impl Detokenizer {
    /// An empty stream.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes a token; returns the text it completes, which may be empty. Control tokens are not shown.
    pub fn push(&mut self, vocab: &Vocab, id: TokenId) -> &str {
        self.push_bytes(vocab.token_bytes(id, false))
    }

    /// Takes bytes; returns the text they complete.
    pub fn push_bytes(&mut self, bytes: &[u8]) -> &str {
        self.out.clear();
        self.pending.extend_from_slice(bytes);
        let mut rest = self.pending.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(text) => {
                    self.out.push_str(text);
                    rest = &[];
                    break;
                }
                Err(e) => {
                    let (valid, after) = rest.split_at(e.valid_up_to());
                    self.out.push_str(&String::from_utf8_lossy(valid));
                    rest = after;
                    let Some(bad) = e.error_len() else { break };
                    self.out.push(char::REPLACEMENT_CHARACTER);
                    rest = &rest[bad..];
                }
            }
        }
        let kept = rest.len();
        self.pending.drain(..self.pending.len() - kept);
        &self.out
    }

    /// Ends the stream; returns U+FFFD if it stopped inside a character. The detokenizer is then as new.
    pub fn finish(&mut self) -> &str {
        self.out.clear();
        if !self.pending.is_empty() {
            self.pending.clear();
            self.out.push(char::REPLACEMENT_CHARACTER);
        }
        &self.out
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn stream(pieces: &[&[u8]]) -> String {
        let mut detokenizer = Detokenizer::new();
        let mut text: String = pieces.iter().map(|piece| detokenizer.push_bytes(piece).to_string()).collect();
        text.push_str(detokenizer.finish());
        text
    }

    #[test]
    fn a_character_is_held_until_whole() {
        let mut detokenizer = Detokenizer::new();
        assert_eq!(detokenizer.push_bytes(b"a\xf0\x9f"), "a");
        assert_eq!(detokenizer.push_bytes(b"\x9a"), "");
        assert_eq!(detokenizer.push_bytes(b"\x80b"), "🚀b");
        assert_eq!(detokenizer.push_bytes(b"\xe2\x82"), "");
        assert_eq!(detokenizer.push_bytes(b"x"), "\u{fffd}x");
        assert_eq!(detokenizer.push_bytes(b"\xe2"), "");
        assert_eq!(detokenizer.finish(), "\u{fffd}");
        assert_eq!(detokenizer.finish(), "");
    }

    #[test]
    fn split_at_every_byte() {
        let bytes =
            "aé漢🚀\u{0}".bytes().chain(*b"\xff\xc3(\xe2\x82\xf0\x9f\x9a\xed\xa0\x80z\xf4\x90").collect::<Vec<_>>();
        let whole = String::from_utf8_lossy(&bytes);
        let each: Vec<&[u8]> = bytes.chunks(1).collect();
        assert_eq!(stream(&each), whole);
        for at in 0..=bytes.len() {
            let (left, right) = bytes.split_at(at);
            assert_eq!(stream(&[left, right]), whole, "split at {at}");
        }
    }

    proptest! {
        #[test]
        fn any_split_of_any_bytes_gives_the_same_text(pieces: Vec<Vec<u8>>) {
            let slices: Vec<&[u8]> = pieces.iter().map(Vec::as_slice).collect();
            prop_assert_eq!(stream(&slices), String::from_utf8_lossy(&pieces.concat()).into_owned());
        }
    }
}
