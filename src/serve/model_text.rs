//! A loaded model's vocabulary and chat template as the I/O thread uses them.
//! Next on the data's way: `serve::admit` for prompts, `serve::server` for answers.

use super::memory::max_text_bytes;
use super::text::{AnswerText, TextModel};
use crate::text::chat::{ChatInput, ChatTemplate};
use crate::text::constrain::Grammars;
use crate::text::quote::quote;
use crate::text::{Detokenizer, StopMatcher, TokenId, Vocab};
use crate::wire::Message;

/// The text side of one model.
#[derive(Clone, Copy, Debug)]
pub struct ModelText<'m> {
    /// Its vocabulary.
    pub vocab: &'m Vocab<'m>,
    /// Its chat template; without one only `/v1/completions` is served.
    pub template: Option<&'m ChatTemplate>,
    /// Positions of a sequence: longer texts are not worth encoding.
    pub context_tokens: usize,
}

impl TextModel for ModelText<'_> {
    fn encode_chat(&self, messages: &[Message], date: Option<&str>) -> Result<Vec<TokenId>, String> {
        let Some(template) = self.template else {
            return Err(
                "this model has no chat template; give one with --chat-template, or use /v1/completions".to_owned()
            );
        };
        let contents: Vec<&str> = messages.iter().map(|message| message.content.as_str()).collect();
        let quoted = quote(self.vocab, &contents).map_err(|e| e.to_string())?;
        let mut value = serde_json::to_value(messages).map_err(|e| e.to_string())?;
        for (i, text) in quoted.iter().flat_map(|quoted| &quoted.texts).enumerate() {
            value[i]["content"] = text.as_str().into();
        }
        let input = ChatInput { date, ..ChatInput::new(&value) };
        let rendered = template.render(&input).map_err(|e| e.to_string())?;
        let most = max_text_bytes(self.context_tokens);
        if rendered.len() > most {
            return Err(format!("the rendered messages have {} bytes: at most {most} are taken", rendered.len()));
        }
        let ids = match &quoted {
            None => self.vocab.encode(&rendered, false, true),
            Some(quoted) => self.vocab.encode_quoted(&rendered, quoted.mark),
        };
        let mut ids = ids.map_err(|e| e.to_string())?;
        // Some templates write the first token themselves, some leave it to the tokenizer; the model wants it once.
        if let Some(bos) = self.vocab.bos().filter(|_| self.vocab.add_bos())
            && ids.first() != Some(&bos)
        {
            ids.insert(0, bos);
        }
        Ok(ids)
    }

    fn encode(&self, text: &str) -> Result<Vec<TokenId>, String> {
        // As `hearth generate` takes a prompt: special tokens written in it count, so that any prompt can be given.
        self.vocab.encode(text, true, true).map_err(|e| e.to_string())
    }

    fn tokenize(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<TokenId>, String> {
        self.vocab.encode(text, add_special, parse_special).map_err(|e| e.to_string())
    }

    fn decode(&self, tokens: &[TokenId]) -> Vec<u8> {
        self.vocab.decode(tokens, true)
    }

    fn token_bytes(&self, token: TokenId) -> &[u8] {
        self.vocab.token_bytes(token, true)
    }

    fn vocabulary_len(&self) -> usize {
        self.vocab.len()
    }

    fn grammars(&self) -> Result<Grammars, String> {
        Grammars::new(self.vocab).map_err(|e| e.to_string())
    }

    fn answer(&self, stop: &[String]) -> Result<Box<dyn AnswerText + '_>, String> {
        let stop = StopMatcher::new(stop).map_err(|e| e.to_string())?;
        Ok(Box::new(ModelAnswer { vocab: self.vocab, detokenizer: Detokenizer::new(), stop }))
    }
}

/// Tokens to bytes, bytes to whole characters, characters to text that no stop string can still claim.
struct ModelAnswer<'m> {
    vocab: &'m Vocab<'m>,
    detokenizer: Detokenizer,
    stop: StopMatcher,
}

impl AnswerText for ModelAnswer<'_> {
    fn push(&mut self, token: TokenId, out: &mut String) -> bool {
        let text = self.detokenizer.push(self.vocab, token);
        out.push_str(self.stop.push(text));
        self.stop.found().is_some()
    }

    fn finish(&mut self, out: &mut String) {
        out.push_str(self.stop.push(self.detokenizer.finish()));
        out.push_str(self.stop.finish());
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::text::vocab::{RawVocab, SpecialIds};

    /// Control tokens `<s>` 1 and `</s>` 2, the bytes of é, and letters.
    fn vocab() -> Vocab<'static> {
        let tokens = ["<unk>", "<s>", "</s>", "<0xC3>", "<0xA9>", "a", "b", "c"];
        let tokens: Vec<&[u8]> = tokens.iter().map(|t| t.as_bytes()).collect();
        Vocab::new(&RawVocab {
            model: "llama",
            pre: None,
            name: None,
            tokens: tokens.iter().copied(),
            scores: vec![0.0; 8],
            token_types: vec![2, 3, 3, 6, 6, 1, 1, 1],
            merges: None,
            special: SpecialIds { bos: Some(TokenId(1)), eos: Some(TokenId(2)), ..SpecialIds::default() },
            add_bos: Some(true),
            add_eos: None,
            add_space_prefix: Some(false),
        })
        .unwrap()
    }

    fn ids(ids: &[u32]) -> Vec<TokenId> {
        ids.iter().map(|&id| TokenId(id)).collect()
    }

    #[test]
    fn the_first_token_stands_there_once() {
        let vocab = vocab();
        let messages = [Message::user("ab")];
        for source in ["{{ messages[0].content }}</s>", "{{ bos_token }}{{ messages[0].content }}</s>"] {
            let template = ChatTemplate::compile(source, "<s>", "</s>").unwrap();
            let text = ModelText { vocab: &vocab, template: Some(&template), context_tokens: 64 };
            assert_eq!(text.encode_chat(&messages, None), Ok(ids(&[1, 5, 6, 2])), "{source}");
        }
        let text = ModelText { vocab: &vocab, template: None, context_tokens: 64 };
        assert!(text.encode_chat(&messages, None).unwrap_err().contains("--chat-template"));
        assert_eq!(text.encode("a"), Ok(ids(&[1, 5])));
        assert_eq!(text.vocabulary_len(), 8);
    }

    #[test]
    fn dates_and_refusals_come_from_the_template() {
        let vocab = vocab();
        let template =
            ChatTemplate::compile("{% if date_string %}a{% else %}{{ raise_exception('no day') }}{% endif %}", "", "")
                .unwrap();
        let text = ModelText { vocab: &vocab, template: Some(&template), context_tokens: 64 };
        assert_eq!(text.encode_chat(&[], Some("2026-11-23")), Ok(ids(&[1, 5])));
        assert!(text.encode_chat(&[], None).unwrap_err().contains("no day"));
        assert!(text.encode_chat(&[], Some("tomorrow")).is_err());
    }

    #[test]
    fn text_is_whole_characters_up_to_a_stop_string() {
        let vocab = vocab();
        let text = ModelText { vocab: &vocab, template: None, context_tokens: 64 };
        let mut answer = text.answer(&["bc".to_owned()]).unwrap();
        let mut pieces = Vec::new();
        for token in [5, 3, 4, 6, 5, 6, 7] {
            let mut piece = String::new();
            let stopped = answer.push(TokenId(token), &mut piece);
            pieces.push(piece);
            assert_eq!(stopped, token == 7);
        }
        assert_eq!(pieces, ["a", "", "é", "", "ba", "", ""]);

        let mut answer = text.answer(&["bc".to_owned()]).unwrap();
        let mut rest = String::new();
        for token in [6, 3] {
            answer.push(TokenId(token), &mut rest);
        }
        assert_eq!(rest, "");
        answer.finish(&mut rest);
        assert_eq!(rest, "b\u{fffd}", "what was held back is not lost");
        assert!(text.answer(&[String::new()]).is_err());
    }
}
