//! Every chunk once, no lost wake-up, panics, and what happens to a worker that loses its core.
#![allow(clippy::unwrap_used)]
use super::*;

#[test]
fn every_chunk_is_computed_once_for_any_thread_count() {
    for threads in 1..5 {
        let mut pool = Workers::new(threads).unwrap();
        let mut scratch = vec![0usize; threads];
        for len in [0, 1, 7, 64, 1000] {
            let mut out = vec![0u32; len];
            pool.chunks(
                &mut scratch,
                &mut out,
                3,
                |_, _| (),
                |_| (),
                |count, index, chunk| {
                    *count += 1;
                    for (offset, value) in chunk.iter_mut().enumerate() {
                        *value += u32::try_from(index * 3 + offset + 1).unwrap();
                    }
                },
            );
            assert!(out.iter().enumerate().all(|(i, &value)| value as usize == i + 1));
        }
        let chunks: usize = [0usize, 1, 7, 64, 1000].iter().map(|len| len.div_ceil(3)).sum();
        assert_eq!(scratch.iter().sum::<usize>(), chunks);
    }
}

#[test]
fn thousands_of_operations_with_pauses_do_not_hang() {
    let mut pool = Workers::new(3).unwrap();
    let mut scratch = vec![(); 3];
    let mut out = vec![0u64; 16];
    for round in 0..5000 {
        pool.chunks(&mut scratch, &mut out, 1, |_, _| (), |()| (), |(), _, chunk| chunk[0] += 1);
        if round % 500 == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    assert_eq!(out, vec![5000; 16]);
}

/// Pauses as long as a worker spins: the operation begins just as it parks.
#[test]
fn an_operation_that_meets_a_parking_worker_wakes_it() {
    let mut pool = Workers::new(2).unwrap();
    pool.pin_caller();
    let mut scratch = vec![(); 2];
    let mut out = vec![0u64; 2];
    for round in 0..20_000u32 {
        pool.chunks(&mut scratch, &mut out, 1, |_, _| (), |()| (), |(), _, chunk| chunk[0] += 1);
        let (begun, pause) = (Instant::now(), SPIN * (round % 100) / 75);
        while begun.elapsed() < pause {
            std::hint::spin_loop();
        }
    }
    assert_eq!(out, vec![20_000; 2]);
}

/// Whether a thread other than this one computed a chunk of an operation of `len` chunks that take `each`.
fn others_helped(pool: &mut Workers, len: usize, each: Duration) -> bool {
    let caller = std::thread::current().id();
    let mut by_others = vec![false; len];
    let mut scratch = vec![(); pool.threads()];
    pool.chunks(
        &mut scratch,
        &mut by_others,
        1,
        |_, _| (),
        |()| (),
        |(), _, chunk| {
            std::thread::sleep(each);
            chunk[0] = std::thread::current().id() != caller;
        },
    );
    by_others.contains(&true)
}

#[test]
fn steps_of_few_rows_use_their_own_number_of_threads() {
    let each = Duration::from_millis(1);
    let mut pool = Workers::new(2).unwrap().split(1, 2);
    pool.begin_step(true);
    assert!((0..20).all(|_| !others_helped(&mut pool, 8, each)), "one thread for decode");
    pool.begin_step(false);
    assert!((0..200).any(|_| others_helped(&mut pool, 8, each)), "two for prefill");
}

#[test]
fn a_worker_that_lost_its_core_is_passed_over_for_a_while_and_then_comes_back() {
    let mut pool = Workers::new(2).unwrap();
    let caller = std::thread::current().id();
    let mut late = || {
        let mut nothing = vec![(); 2];
        let mut out = vec![(); 2];
        // The worker keeps its chunk long after the caller has done the other.
        let both = std::sync::Barrier::new(2);
        let body = |(): &mut (), _, _: &mut [()]| {
            both.wait();
            if std::thread::current().id() != caller {
                std::thread::sleep(20 * LATE);
            }
        };
        pool.chunks(&mut nothing, &mut out, 1, |_, _| (), |()| (), body);
        Instant::now()
    };
    let benched = late();
    let short = Duration::from_micros(1);
    while benched.elapsed() < BENCH / 2 {
        assert!(
            !others_helped(&mut pool, 100, short) || benched.elapsed() >= BENCH,
            "an offer to a worker on the bench"
        );
    }
    assert!((0..2000).any(|_| others_helped(&mut pool, 100, short)), "offers again after {BENCH:?}");
}

#[test]
fn a_panic_in_a_worker_reaches_the_caller_and_the_pool_lives_on() {
    let mut pool = Workers::new(2).unwrap();
    let mut scratch = vec![(); 2];
    let mut out = vec![0u8; 64];
    // Both threads are in the operation before either panics: the worker's own is the only panic.
    let both = std::sync::Barrier::new(2);
    let caller = std::thread::current().id();
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        pool.chunks(
            &mut scratch,
            &mut out,
            1,
            |_, _| (),
            |()| {
                both.wait();
            },
            |(), _, _| assert!(std::thread::current().id() == caller, "not on the caller's thread"),
        );
    }));
    let message = panicked.unwrap_err();
    assert_eq!(message.downcast_ref(), Some(&"a worker thread panicked"));
    pool.chunks(&mut scratch, &mut out, 1, |_, _| (), |()| (), |(), _, chunk| chunk[0] = 9);
    assert_eq!(out, vec![9; 64]);
}
