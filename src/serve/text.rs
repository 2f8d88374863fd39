//! What the I/O thread needs of a model's text side. The daemon implements it over `text`; tests with a few lines.
//! Next on the data's way: `serve::admit`.

use crate::text::TokenId;
use crate::text::constrain::Grammars;
use crate::wire::Message;

/// Text to tokens and back, for one loaded model.
pub trait TextModel {
    /// Renders a conversation through the chat template, up to where the assistant is to speak, and encodes it; the special
    /// tokens that the template writes are taken as such, those that stand in a message are text.
    ///
    /// # Errors
    /// The template refused the conversation (for instance roles that do not alternate), in words for the client.
    fn encode_chat(&self, messages: &[Message], date: Option<&str>) -> Result<Vec<TokenId>, String>;

    /// Encodes a text to be continued, with the tokens that the model wants in front.
    ///
    /// # Errors
    /// The text cannot be encoded, in words for the client.
    fn encode(&self, text: &str) -> Result<Vec<TokenId>, String>;

    /// Encodes a text as it stands, with the tokens that the model wants in front if asked.
    ///
    /// # Errors
    /// The text cannot be encoded, in words for the client.
    fn tokenize(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<TokenId>, String>;

    /// The bytes of these tokens, special ones included; all of them are in the vocabulary.
    fn decode(&self, tokens: &[TokenId]) -> Vec<u8>;

    /// Bytes of one token, its name where it is a special one.
    fn token_bytes(&self, token: TokenId) -> &[u8];

    /// Token ids are below this.
    fn vocabulary_len(&self) -> usize;

    /// The vocabulary, ready for grammars; made anew at each call, which takes a moment.
    ///
    /// # Errors
    /// Why answers cannot follow one, in words for the client.
    fn grammars(&self) -> Result<Grammars, String>;

    /// A fresh answer that ends before the first of `stop`.
    ///
    /// # Errors
    /// The stop strings are refused, in words for the client.
    fn answer(&self, stop: &[String]) -> Result<Box<dyn AnswerText + '_>, String>;
}

/// One answer's tokens becoming text.
pub trait AnswerText {
    /// Takes a token and appends what is certain to be part of the answer: whole characters, and nothing that may yet turn
    /// out to be the beginning of a stop string. True: a stop string was found, and the answer is at its end.
    fn push(&mut self, token: TokenId, out: &mut String) -> bool;

    /// No token comes any more: appends what was held back.
    fn finish(&mut self, out: &mut String);
}
