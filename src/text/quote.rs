//! Words of strangers on their way through a chat template: what looks like a token that steers the model (`<|im_end|>`) is marked
//! before the template runs, so that afterwards it can be told from the template's own and is taken as plain text.
//! Next on the data's way: `chat`, then [`Vocab::encode_quoted`].

use std::collections::HashSet;

use super::vocab::Vocab;

/// Characters without a meaning of their own (planes 15 and 16): the mark is one that no text at hand has.
const MARKS: [std::ops::RangeInclusive<char>; 2] = ['\u{f0000}'..='\u{ffffd}', '\u{100000}'..='\u{10fffd}'];

/// Texts with marks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quoted {
    /// The texts, in order; those without such words are as they were.
    pub texts: Vec<String>,
    /// What stands in front of every word that must stay text.
    pub mark: char,
}

/// Marks what a stranger may not say; `None` where nobody tries, as in nearly every conversation.
///
/// # Errors
/// The texts use every character that could be a mark.
pub fn quote(vocab: &Vocab, texts: &[&str]) -> Result<Option<Quoted>, NoMark> {
    let points: Vec<Vec<usize>> = texts.iter().map(|text| vocab.steering_points(text)).collect();
    if points.iter().all(Vec::is_empty) {
        return Ok(None);
    }
    let is_mark = |c: &char| MARKS.iter().any(|range| range.contains(c));
    let taken: HashSet<char> = texts.iter().flat_map(|text| text.chars()).filter(is_mark).collect();
    let mark = MARKS.into_iter().flatten().find(|c| !taken.contains(c)).ok_or(NoMark)?;
    let texts = texts.iter().zip(&points).map(|(text, points)| with_marks(text, points, mark)).collect();
    Ok(Some(Quoted { texts, mark }))
}

/// There is no character left for a mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the messages use every private character of Unicode and special tokens as well: leave out one of them")]
pub struct NoMark;

/// Takes the marks out again: the text, and the places where they stood, rising.
pub(super) fn without_marks(text: &str, mark: char) -> (String, Vec<usize>) {
    let mut plain = String::with_capacity(text.len());
    let mut points = Vec::new();
    for (i, piece) in text.split(mark).enumerate() {
        if i > 0 {
            points.push(plain.len());
        }
        plain.push_str(piece);
    }
    (plain, points)
}

fn with_marks(text: &str, points: &[usize], mark: char) -> String {
    let mut out = String::with_capacity(text.len() + points.len() * mark.len_utf8());
    let mut from = 0;
    for &point in points {
        out.push_str(&text[from..point]);
        out.push(mark);
        from = point;
    }
    out + &text[from..]
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn marks_come_out_where_they_went_in() {
        let marked = with_marks("a<s>é<s>", &[1, 6], '!');
        assert_eq!(marked, "a!<s>é!<s>");
        assert_eq!(without_marks(&marked, '!'), ("a<s>é<s>".to_owned(), vec![1, 6]));
        assert_eq!(without_marks("", '!'), (String::new(), vec![]));
    }
}
