#![allow(clippy::unwrap_used)]
use super::*;
use proptest::prelude::*;

fn sample(params: &SamplingParams, generated: &[TokenId], logits: &[f32]) -> Option<TokenId> {
    let mut sampler = Sampler::new(logits.len(), 64);
    sampler.sample(params, &mut MirostatState::default(), &[], generated, &mut logits.to_vec())
}

fn ids(generated: &[u32]) -> Vec<TokenId> {
    generated.iter().map(|&id| TokenId(id)).collect()
}

/// How often each token is drawn over many seeds.
fn shares(params: SamplingParams, logits: &[f32]) -> Vec<f64> {
    let draws = 20_000u32;
    let mut counts = vec![0.0; logits.len()];
    for seed in 0..u64::from(draws) {
        let params = SamplingParams { seed, ..params.clone() };
        counts[sample(&params, &[], logits).unwrap().index()] += 1.0 / f64::from(draws);
    }
    counts
}

#[test]
fn greedy_takes_the_largest_and_of_equals_the_first() {
    assert_eq!(sample(&SamplingParams::default(), &[], &[0.5, 2.0, 2.0, -1.0]), Some(TokenId(1)));
}

#[test]
fn greedy_agrees_with_a_plain_loop_wherever_the_largest_and_infinities_lie() {
    for len in [1, 31, 32, 33, 511, 512, 513, 1100] {
        for at in [0, len / 3, len - 1] {
            let mut logits: Vec<f32> = (0..len).map(|i| ((i * 7919) % 97) as f32 * -0.5).collect();
            logits[at] = 0.5;
            logits[(at + len / 2) % len] = if len > 1 { f32::NEG_INFINITY } else { 0.5 };
            logits[len - 1] = logits[len - 1].max(if at == len - 1 { 0.5 } else { -1.0 });
            let mut plain = (0, f32::NEG_INFINITY);
            for (i, &logit) in logits.iter().enumerate() {
                if logit > plain.1 {
                    plain = (i, logit);
                }
            }
            assert_eq!(argmax(&logits), Some((TokenId(u32::try_from(plain.0).unwrap()), plain.1)), "{len} {at}");
            logits[len / 2] = f32::NAN;
            assert_eq!(argmax(&logits), None, "{len} {at}");
        }
    }
}

#[test]
fn broken_logits_give_no_token() {
    let params = SamplingParams { temperature: 1.0, ..SamplingParams::default() };
    for logits in [[f32::NAN, 1.0], [f32::INFINITY, 1.0], [f32::NEG_INFINITY; 2]] {
        assert_eq!(sample(&SamplingParams::default(), &[], &logits), None, "{logits:?}");
        assert_eq!(sample(&params, &[], &logits), None, "{logits:?}");
    }
}

#[test]
fn draws_follow_the_softmax() {
    let logits = [0.0, 1.0, 2.0, -30.0];
    let params = SamplingParams { temperature: 2.0, ..SamplingParams::default() };
    let weights: Vec<f64> = logits.iter().map(|&logit: &f32| (f64::from(logit) / 2.0).exp()).collect();
    let total: f64 = weights.iter().sum();
    for (share, weight) in shares(params, &logits).iter().zip(&weights) {
        assert!((share - weight / total).abs() < 0.02, "{share} for {}", weight / total);
    }
}

#[test]
fn top_k_top_p_and_min_p_cut_where_they_say() {
    let logits: Vec<f32> = [0.5f32, 0.25, 0.15, 0.1].iter().map(|p| p.ln()).collect();
    let base = SamplingParams { temperature: 1.0, ..SamplingParams::default() };
    let drawn = |params: SamplingParams| shares(params, &logits).iter().filter(|&&share| share > 0.0).count();
    assert_eq!(drawn(base.clone()), 4);
    assert_eq!(drawn(SamplingParams { top_k: 2, ..base.clone() }), 2);
    assert_eq!(drawn(SamplingParams { top_p: 0.7, ..base.clone() }), 2);
    assert_eq!(drawn(SamplingParams { top_p: 0.8, ..base.clone() }), 3);
    assert_eq!(drawn(SamplingParams { min_p: 0.25, ..base.clone() }), 3);
    assert_eq!(drawn(SamplingParams { top_k: 3, top_p: 0.5, ..base }), 1);
}

#[test]
fn penalties_are_the_published_formulas() {
    let generated = ids(&[1, 1, 2]);
    let mut sampler = Sampler::new(4, 64);
    let mut logits = vec![1.0, 1.0, -1.0, 1.0];
    let params = SamplingParams { repetition_penalty: 2.0, ..SamplingParams::default() };
    sampler.history.penalize(&params, &ids(&[3]), &generated, &mut logits);
    assert_eq!(logits, [1.0, 0.5, -2.0, 0.5]);

    let mut logits = vec![1.0; 4];
    let params = SamplingParams { frequency_penalty: 0.25, presence_penalty: 0.5, ..SamplingParams::default() };
    sampler.history.penalize(&params, &ids(&[3]), &generated, &mut logits);
    assert_eq!(logits, [1.0, 0.0, 0.25, 1.0]);
}

#[test]
fn logit_bias_is_added_before_all_else() {
    let params = SamplingParams { logit_bias: vec![(TokenId(0), 3.0), (TokenId(9), 1.0)], ..SamplingParams::default() };
    assert_eq!(sample(&params, &[], &[0.0, 2.0]), Some(TokenId(0)));
}

#[test]
fn xtc_leaves_the_least_likely_of_the_top_tokens() {
    let logits: Vec<f32> = [0.4f32, 0.3, 0.2, 0.1].iter().map(|p| p.ln()).collect();
    let base =
        SamplingParams { temperature: 1.0, xtc_probability: 1.0, xtc_threshold: 0.15, ..SamplingParams::default() };
    let drawn = shares(base.clone(), &logits);
    assert_eq!((drawn[0], drawn[1]), (0.0, 0.0));
    assert!((drawn[2] - 2.0 / 3.0).abs() < 0.02, "{drawn:?}");
    let one_over = SamplingParams { xtc_threshold: 0.35, ..base.clone() };
    assert!((shares(one_over, &logits)[0] - 0.4).abs() < 0.02, "one alone is not dropped");
    let half = shares(SamplingParams { xtc_probability: 0.5, ..base }, &logits);
    assert!((half[0] - 0.2).abs() < 0.02, "half of the time: {half:?}");
}

#[test]
fn typical_keeps_what_surprises_as_much_as_is_usual() {
    // Entropy 1.47 nat: 0.2 (1.61) is nearest, then 0.3 (1.2), then 0.1 (2.3), then 0.4... by distance.
    let p = [0.4f32, 0.3, 0.2, 0.1];
    let logits: Vec<f32> = p.iter().map(|p| p.ln()).collect();
    let entropy: f32 = -p.iter().map(|p| p * p.ln()).sum::<f32>();
    let mut order: Vec<usize> = (0..4).collect();
    order.sort_by(|&a, &b| (-p[a].ln() - entropy).abs().total_cmp(&(-p[b].ln() - entropy).abs()));
    let base = SamplingParams { temperature: 1.0, ..SamplingParams::default() };
    let drawn = shares(SamplingParams { typical_p: p[order[0]] * 0.9, ..base.clone() }, &logits);
    assert_eq!(drawn.iter().filter(|&&share| share > 0.0).count(), 1);
    assert!(drawn[order[0]] > 0.99, "{drawn:?} {order:?}");
    let drawn = shares(SamplingParams { typical_p: p[order[0]] + 0.01, ..base }, &logits);
    assert!(drawn[order[0]] > 0.0 && drawn[order[1]] > 0.0 && drawn.iter().filter(|&&s| s > 0.0).count() == 2);
}

#[test]
fn a_dynamic_temperature_is_low_where_the_model_is_sure() {
    let base = SamplingParams { temperature: 1.0, dynatemp_range: 1.0, ..SamplingParams::default() };
    let sure = shares(base.clone(), &[5.0, 0.0]);
    let fixed = shares(SamplingParams { dynatemp_range: 0.0, ..base.clone() }, &[5.0, 0.0]);
    assert!(sure[1] == 0.0 && fixed[1] > 0.0, "{sure:?} {fixed:?}");
    // As unsure as can be: twice the temperature, which changes nothing of equals.
    assert!((shares(base, &[1.0, 1.0])[0] - 0.5).abs() < 0.02);
}

#[test]
fn dry_makes_the_next_token_of_a_known_passage_expensive() {
    let mut sampler = Sampler::new(16, 64);
    let params = SamplingParams { dry_multiplier: 1.0, dry_base: 2.0, ..SamplingParams::default() };
    let mut cost = |text: &[u32]| {
        let mut logits = vec![0.0; 16];
        sampler.history.dry(&params, &[], &ids(text), &mut logits);
        logits.iter().enumerate().filter(|(_, l)| **l != 0.0).map(|(i, l)| (i, -l)).collect::<Vec<_>>()
    };
    assert_eq!(cost(&[1, 2, 3, 4, 9, 2, 3]), [(4, 1.0)], "two tokens are known: multiplier * base^0");
    assert_eq!(cost(&[1, 2, 3, 4, 9, 1, 2, 3]), [(4, 2.0)]);
    assert_eq!(cost(&[1, 2, 3, 4, 9, 3]), [], "one token is allowed");
    sampler.set_dry_breakers(&ids(&[2]));
    let mut logits = vec![0.0; 16];
    sampler.history.dry(&params, &[], &ids(&[1, 2, 3, 4, 9, 1, 2, 3]), &mut logits);
    assert_eq!(logits, vec![0.0; 16], "a passage does not reach over a breaker");
}

#[test]
fn dry_agrees_with_comparing_every_passage() {
    let mut sampler = Sampler::new(4, 256);
    let params = SamplingParams { dry_multiplier: 0.5, dry_base: 1.5, ..SamplingParams::default() };
    let mut seed = 1;
    for len in 3..120 {
        let text: Vec<u32> = (0..len)
            .map(|_| {
                seed = draw::splitmix64(seed);
                (seed % 3) as u32
            })
            .collect();
        let mut plain = [0usize; 4];
        for at in 0..len - 1 {
            let same = (0..=at).take_while(|&k| text[at - k] == text[len - 1 - k]).count();
            let next = text[at + 1] as usize;
            plain[next] = plain[next].max(same);
        }
        let mut logits = vec![0.0; 4];
        sampler.history.dry(&params, &[], &ids(&text), &mut logits);
        for (token, &longest) in plain.iter().enumerate() {
            let cost = if longest < 2 { 0.0 } else { (0..(longest - 2).min(64)).fold(0.5f32, |cost, _| cost * 1.5) };
            assert_eq!(logits[token], -cost.min(1.0e6), "{text:?} {token}");
        }
    }
}

#[test]
fn mirostat_keeps_the_surprise_near_its_target() {
    let logits: Vec<f32> = (0..1000).map(|i| -1.1 * ((i + 1) as f32).ln()).collect();
    let total: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
    for mirostat in [1, 2] {
        let mean = |tau: f32| {
            let params = SamplingParams { temperature: 1.0, mirostat, mirostat_tau: tau, ..SamplingParams::default() };
            let (mut sampler, mut state) = (Sampler::new(1000, 64), MirostatState::default());
            let (mut generated, mut sum) = (vec![], 0.0);
            for _ in 0..2000 {
                let token = sampler.sample(&params, &mut state, &[], &generated, &mut logits.clone()).unwrap();
                sum -= (f64::from(logits[token.index()]).exp() / total).log2();
                generated.push(token);
            }
            sum / 2000.0
        };
        let (low, high) = (mean(2.0), mean(5.0));
        assert!(low < high - 0.5, "mirostat {mirostat}: {low} {high}");
    }
}

#[test]
fn log_probabilities_are_those_of_the_softmax() {
    let logits = [1.0f32, 3.0, 3.0, f32::NEG_INFINITY, 2.0];
    let total: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
    let told = logprobs(&logits, TokenId(0), 3);
    let of = |id: usize| f64::from(logits[id]) - total.ln();
    assert!((f64::from(told.logprob) - of(0)).abs() < 1e-5);
    assert_eq!(told.top().iter().map(|(token, _)| token.0).collect::<Vec<_>>(), [1, 2, 4]);
    assert!(told.top().iter().all(|&(token, p)| (f64::from(p) - of(token.index())).abs() < 1e-5));
    assert!(logprobs(&logits, TokenId(0), 0).top().is_empty());
    assert_eq!(logprobs(&logits, TokenId(0), 50).top().len(), 5);
}

proptest! {
    #[test]
    fn the_same_seed_and_step_give_the_same_token_and_it_is_a_kept_one(
        logits in prop::collection::vec(-8.0f32..8.0, 1..600),
        seed: u64, temperature in 0.05f32..3.0, top_k in 0u32..50, top_p in 0.05f32..=1.0, min_p in 0.0f32..0.9,
    ) {
        let params = SamplingParams { temperature, top_k, top_p, min_p, seed, ..SamplingParams::default() };
        let token = sample(&params, &[], &logits).unwrap();
        prop_assert_eq!(sample(&params, &[], &logits), Some(token));
        let rank = logits.iter().filter(|&&logit| logit > logits[token.index()]).count();
        prop_assert!(top_k == 0 || rank < top_k as usize);
    }
}
