//! Small vocabularies, literal in the test; the real ones are checked in `tests/text_vectors.rs`.
#![allow(clippy::unwrap_used)]

use super::*;

type List = std::vec::IntoIter<&'static [u8]>;

fn list(texts: &[&'static str]) -> List {
    texts.iter().map(|text| text.as_bytes()).collect::<Vec<_>>().into_iter()
}

fn raw(model: &'static str, tokens: &[&'static str]) -> RawVocab<'static, List> {
    RawVocab {
        model,
        pre: None,
        name: None,
        tokens: list(tokens),
        scores: Vec::new(),
        token_types: Vec::new(),
        merges: None,
        special: SpecialIds::default(),
        add_bos: None,
        add_eos: None,
        add_space_prefix: None,
    }
}

fn spm() -> RawVocab<'static, List> {
    let mut raw = raw("llama", &["<unk>", "<s>", "</s>", "<0x0A>", "▁", "a", "b", "ab", "▁a", "<x>"]);
    raw.scores = vec![0.0, 0.0, 0.0, 0.0, -1.0, -2.0, -3.0, -0.5, -0.7, 0.0];
    raw.token_types = vec![2, 3, 3, 6, 1, 1, 1, 1, 1, 4];
    raw
}

fn ids(vocab: &Vocab, text: &str, add_special: bool, parse_special: bool) -> Vec<u32> {
    vocab.encode(text, add_special, parse_special).unwrap().into_iter().map(|id| id.0).collect()
}

#[test]
fn sentencepiece_merges_by_score_and_falls_back_to_bytes() {
    let vocab = Vocab::new(&spm()).unwrap();
    assert_eq!(ids(&vocab, "ab a", true, false), [1, 4, 7, 8]);
    assert_eq!(ids(&vocab, "a\né", false, false), [8, 3, 0, 0]);
    assert_eq!(ids(&vocab, "<s>a<x>a", false, false), [4, 0, 0, 0, 5, 9, 8]);
    assert_eq!(ids(&vocab, "<s>a", false, true), [1, 8]);
    assert_eq!(vocab.decode(&[TokenId(4), TokenId(7), TokenId(8)], false), b"ab a");
    assert_eq!(vocab.decode(&[TokenId(1), TokenId(8)], true), b"<s> a");
    assert_eq!(vocab.token_bytes(TokenId(3), false), b"\n");
    assert_eq!(vocab.token_bytes(TokenId(99), true), b"");
    assert_eq!(vocab.eog_ids(), [TokenId(2)]);
}

#[test]
fn byte_level_merges_by_rank() {
    let mut raw = raw("gpt2", &["a", "b", "Ġ", "ab", "Ġab", "<|im_end|>", "é"]);
    // "ba" is no token: where it survives, its letters are looked up one by one.
    raw.merges = Some(list(&["a b", "Ġ ab", "b a"]));
    raw.token_types = vec![1, 1, 1, 1, 1, 1, 1];
    let vocab = Vocab::new(&raw).unwrap();
    assert_eq!(ids(&vocab, "ab ab", true, false), [3, 4]);
    assert_eq!(ids(&vocab, "ba", false, false), [1, 0]);
    assert_eq!(ids(&vocab, "<|im_end|>", false, true), [5], "a control token by its text, whatever its type says");
    assert!(vocab.is_control(TokenId(5)) && vocab.eog_ids().contains(&TokenId(5)));
    assert_eq!(vocab.token_bytes(TokenId(4), false), b" ab");
    assert_eq!(vocab.token_bytes(TokenId(6), false), b"\xe9");
}

#[test]
fn what_cannot_be_used_is_named() {
    let error = |raw: &RawVocab<'static, List>| Vocab::new(raw).unwrap_err().to_string();
    assert!(error(&raw("bert", &["a"])).contains("`bert` is not supported; supported: gpt2"));
    assert!(error(&raw("gpt2", &["a"])).contains("without merges"));
    assert!(error(&raw("llama", &["a", "b"])).contains("0 scores for 2 tokens"));
    assert!(error(&raw("llama", &[])).contains("a vocabulary of 0 tokens"));
    let mut bpe = raw("gpt2", &["a"]);
    bpe.merges = Some(list(&["ab"]));
    assert_eq!(error(&bpe), "merge 0 is no pair separated by a space");
    bpe.pre = Some("tekken");
    assert_eq!(
        error(&bpe),
        "pre-tokenizer `tekken` is not supported; supported: default, gpt-2, llama-bpe, qwen2, smollm"
    );
    bpe.pre = None;
    bpe.merges = Some(list(&[]));
    bpe.add_bos = Some(true);
    bpe.special.bos = Some(TokenId(7));
    assert!(error(&bpe).contains("wants BOS added"));
    bpe.token_types = vec![];
    bpe.add_bos = None;
    assert!(Vocab::new(&bpe).is_ok());
}
