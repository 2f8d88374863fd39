//! Which tokens end an answer. Files name one or two; the rest is known by its text, as other programs know it.
//! Next on the data's way: `Vocab::eog_ids`, looked through for every generated token.

use super::{Kind, SpecialIds, Texts};
use crate::text::TokenId;

/// Texts of tokens that end an answer wherever they occur; they are control tokens even where the file forgets it.
const ENDS: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
];
/// Fill-in-the-middle: padding, repository, file separator. They end an answer too; a file names them or their text does.
const FIM_PAD: &[&str] = &["<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"];
const FIM_REP: &[&str] = &["<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"];
const FIM_SEP: &[&str] = &["<|file_sep|>"];
/// Fill-in-the-middle markers that are control tokens but end nothing.
const FIM_MARKS: &[&[&str]] = &[
    &[
        "<|fim_prefix|>",
        "<fim-prefix>",
        "<fim_prefix>",
        "<｜fim▁begin｜>",
        "<PRE>",
        "▁<PRE>",
        "<|code_prefix|>",
        "<|prefix|>",
    ],
    &[
        "<|fim_suffix|>",
        "<fim-suffix>",
        "<fim_suffix>",
        "<｜fim▁hole｜>",
        "<SUF>",
        "▁<SUF>",
        "<|code_suffix|>",
        "<|suffix|>",
    ],
    &[
        "<|fim_middle|>",
        "<fim-middle>",
        "<fim_middle>",
        "<｜fim▁end｜>",
        "<MID>",
        "▁<MID>",
        "<|code_middle|>",
        "<|middle|>",
    ],
];
/// Markers of the harmony format, which are always shown.
const SHOWN: &[&str] = &["<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"];

/// Finds them all, in order, and corrects the kinds of tokens whose text gives them away.
pub(super) fn detect(texts: &Texts<'_>, ids: &SpecialIds, kinds: &mut [Kind]) -> Vec<TokenId> {
    let token = |text: &str| texts.token(text.as_bytes());
    let lowest = |names: &[&str]| names.iter().filter_map(|name| token(name)).min();
    let mut set = |id: TokenId, kind: Kind| {
        if let Some(slot) = kinds.get_mut(id.index()) {
            *slot = kind;
        }
    };
    let mut eog: Vec<TokenId> = Vec::new();

    for names in FIM_MARKS {
        lowest(names).into_iter().for_each(|id| set(id, Kind::Control));
    }
    for (named, names) in [(ids.fim_pad, FIM_PAD), (ids.fim_rep, FIM_REP), (ids.fim_sep, FIM_SEP)] {
        let by_text = lowest(names).filter(|_| named.is_none());
        by_text.into_iter().for_each(|id| set(id, Kind::Control));
        eog.extend(named.or(by_text));
    }
    for id in ENDS.iter().filter_map(|name| token(name)) {
        set(id, Kind::Control);
        eog.push(id);
    }
    for id in SHOWN.iter().filter_map(|name| token(name)) {
        set(id, Kind::UserDefined);
    }
    eog.extend([ids.eos, ids.eot, ids.eom].into_iter().flatten());
    eog.sort_unstable();
    eog.dedup();

    // In the harmony format `<|end|>` ends a message, not the answer.
    let has = |name: &str| token(name).is_some();
    let calls = has("<|call|>") || has("<|calls|>");
    if let Some(end) = token("<|end|>")
        && calls
        && (has("<|return|>") || has("<|flush|>"))
    {
        eog.retain(|id| *id != end);
        set(end, Kind::UserDefined);
    }
    // Where `<|tool_response>` exists, `</s>` is the HTML tag.
    if let Some(tag) = token("</s>")
        && has("<|tool_response>")
    {
        eog.retain(|id| *id != tag);
        set(tag, Kind::Normal);
    }
    eog
}
