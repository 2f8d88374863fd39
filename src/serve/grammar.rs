//! Answers that follow a grammar, as the I/O thread looks after them: the vocabulary's tries, made when the first one is asked for, and
//! beside each such answer its course and the mask that the engine reads. Next on the data's way: `engine::mask`.

use std::sync::Arc;

use super::text::TextModel;
use crate::engine::mask::Mask;
use crate::text::TokenId;
use crate::text::constrain::{COURSE_BYTES, Course, Grammar, GrammarError, Grammars};
use crate::wire::{Constraint, RETRY_AFTER_S, Reject};

/// Answers that may follow a grammar at the same time, unless the configuration says otherwise.
pub const DEFAULT_GRAMMARS: usize = 4;
/// See [`DEFAULT_GRAMMARS`]: as many as there may be sequences.
pub const MAX_GRAMMARS: usize = 256;

/// Bytes that so many answers with a grammar take, with the vocabulary's tries.
pub const fn grammar_bytes(n_vocab: usize, grammars: usize) -> usize {
    if grammars == 0 {
        return 0;
    }
    Grammars::bytes(n_vocab).saturating_add(grammars.saturating_mul(COURSE_BYTES + Mask::bytes(n_vocab)))
}

/// The vocabulary's side of it.
#[derive(Default)]
pub(super) struct Shelf {
    grammars: Option<Grammars>,
}

impl Shelf {
    /// Begins what a request asks for; `under_way` answers with a grammar there are already, `most` there may be.
    pub(super) fn begin(
        &mut self,
        constraint: &Constraint,
        text: &dyn TextModel,
        answers: usize,
        under_way: usize,
        most: usize,
    ) -> Result<Course, Reject> {
        if most < answers {
            let off =
                format!("{answers} answers with a grammar are asked for, this daemon follows {most} (`grammars`)");
            return Err(Reject::unsupported(constraint.field(), off));
        }
        if under_way + answers > most {
            let why = format!("{under_way} answers with a grammar are under way, at most {most} may be (`grammars`)");
            return Err(Reject::over_limit("too_many_grammars", why, RETRY_AFTER_S));
        }
        let grammars = match &mut self.grammars {
            Some(grammars) => grammars,
            none => none.insert(text.grammars().map_err(|why| Reject::unsupported(constraint.field(), why))?),
        };
        let grammar = match constraint {
            Constraint::JsonSchema(schema) => Grammar::JsonSchema(schema.clone()),
            Constraint::Lark(text) => Grammar::Lark(text.clone()),
        };
        grammars.begin(&grammar).map_err(|why| {
            let refused = format!("`{}` cannot be followed: {why}", constraint.field());
            Reject::field(constraint.field(), refused).with_code("invalid_grammar")
        })
    }
}

/// One answer's.
pub(super) struct AnswerGrammar {
    course: Course,
    mask: Arc<Mask>,
    /// Tokens so far.
    tokens: usize,
}

impl AnswerGrammar {
    /// Publishes what the answer may begin with; where that is nothing, it can only end.
    pub(super) fn new(mut course: Course, n_vocab: usize) -> Result<Self, GrammarError> {
        let mask = Arc::new(Mask::new(n_vocab));
        let allowed = course.allowed()?.ok_or_else(GrammarError::empty)?;
        mask.publish(0, allowed.words());
        Ok(Self { course, mask, tokens: 0 })
    }

    /// For the engine.
    pub(super) fn mask(&self) -> Arc<Mask> {
        Arc::clone(&self.mask)
    }

    /// Takes the next token and publishes what may follow it. True: nothing can.
    pub(super) fn push(&mut self, token: TokenId) -> Result<bool, GrammarError> {
        self.tokens += 1;
        if self.course.push(token)? {
            return Ok(true);
        }
        let Some(allowed) = self.course.allowed()? else { return Ok(true) };
        self.mask.publish(self.tokens, allowed.words());
        Ok(false)
    }
}
