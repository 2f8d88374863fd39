//! A vocabulary's tables as a packed model holds them: written once by `hearth pack`, used where they are mapped.
//! Nothing in them is trusted: every index is checked where it is used, so a damaged table gives other tokens, not a crash.
//! Next on the data's way: `Vocab::encode`.

use super::{Arena, IndexTable, Kind, Merger, RawVocab, Seed, Texts, Vocab, VocabError, eog};
use crate::text::bpe::Bpe;
use crate::text::spm::Spm;

const TEXTS: &str = "texts";
const TEXT_ENDS: &str = "text_ends";
const INDEX: &str = "index";
const PRINTED: &str = "printed";
const PRINTED_ENDS: &str = "printed_ends";
const KINDS: &str = "kinds";
/// Kinds by the byte that stands for them.
const KIND_BYTES: [Kind; 6] = [Kind::Normal, Kind::Unknown, Kind::Control, Kind::UserDefined, Kind::Unused, Kind::Byte];

/// The tables of a packed model, by name.
#[derive(Clone, Debug, Default)]
pub struct Tables<'m> {
    tables: Vec<(&'m str, &'m [u8])>,
}

impl<'m> Tables<'m> {
    /// The tables with these names and bytes.
    pub fn new(tables: Vec<(&'m str, &'m [u8])>) -> Self {
        Self { tables }
    }

    /// Whether there are none: the vocabulary must be built.
    pub fn is_empty(&self) -> bool {
        self.tables.is_empty()
    }

    pub(in crate::text) fn get(&self, name: &'static str) -> Result<&'m [u8], VocabError> {
        let found = self.tables.iter().find(|table| table.0 == name);
        found.map(|table| table.1).ok_or(VocabError::Table { name })
    }
}

impl<'m> Vocab<'m> {
    /// Takes the tables of a packed model as they are. Scores, types and merges of `raw` are not looked at.
    ///
    /// # Errors
    /// A table is missing or does not fit the vocabulary, or the file wants what it does not name.
    pub fn mapped<'r, S>(raw: &RawVocab<'r, S>, tables: &Tables<'m>) -> Result<Self, VocabError>
    where
        S: ExactSizeIterator<Item = &'r [u8]> + Clone,
    {
        let is_spm = raw.is_spm()?;
        let tokens = raw.tokens.len();
        let texts = Texts {
            arena: Arena::mapped(tables.get(TEXTS)?, tables.get(TEXT_ENDS)?),
            index: IndexTable::mapped(tables.get(INDEX)?).ok_or(VocabError::Table { name: INDEX })?,
            seed: Seed::PACKED,
            tokens: u32::try_from(tokens).map_err(|_| VocabError::Size { found: tokens })?,
        };
        let printed = Arena::mapped(tables.get(PRINTED)?, tables.get(PRINTED_ENDS)?);
        let kind_of = |&byte: &u8| KIND_BYTES.get(usize::from(byte)).copied().ok_or(VocabError::Table { name: KINDS });
        let mut kinds: Vec<Kind> = tables.get(KINDS)?.iter().map(kind_of).collect::<Result<_, _>>()?;
        for (name, len) in [(TEXT_ENDS, texts.arena.len()), (PRINTED_ENDS, printed.len()), (KINDS, kinds.len())] {
            // Behind the tokens there may be strings that only merges speak of.
            if len < tokens || (len > tokens && name != TEXT_ENDS) {
                return Err(VocabError::Table { name });
            }
        }
        let ids = raw.special_ids(is_spm);
        let merger = if is_spm {
            Merger::Spm(Box::new(Spm::mapped(tables, &texts, ids.unk)?))
        } else {
            Merger::Bpe(Box::new(Bpe::mapped(raw.pre, tables, &texts)?))
        };
        let eog = eog::detect(&texts, &ids, &mut kinds);
        Self::assemble(raw, texts, printed, kinds, eog, merger)
    }

    /// Builds the tables that [`Vocab::mapped`] takes, with their names.
    ///
    /// # Errors
    /// As [`Vocab::new`].
    pub fn tables<'r, S>(raw: &RawVocab<'r, S>) -> Result<Vec<(&'static str, Vec<u8>)>, VocabError>
    where
        S: ExactSizeIterator<Item = &'r [u8]> + Clone,
    {
        let vocab = Vocab::build(raw, Seed::PACKED)?;
        let [texts, text_ends] = vocab.texts.arena.to_tables();
        let [printed, printed_ends] = vocab.printed.to_tables();
        let byte_of =
            |kind: &Kind| KIND_BYTES.iter().zip(0u8..).find(|known| known.0 == kind).map_or(0, |known| known.1);
        let mut tables = vec![
            (TEXTS, texts),
            (TEXT_ENDS, text_ends),
            (INDEX, vocab.texts.index.to_table()),
            (PRINTED, printed),
            (PRINTED_ENDS, printed_ends),
            (KINDS, vocab.kinds.iter().map(byte_of).collect()),
        ];
        tables.extend(match &vocab.merger {
            Merger::Bpe(bpe) => bpe.to_tables(),
            Merger::Spm(spm) => spm.to_tables(),
        });
        Ok(tables)
    }
}
