//! When what happened from the kernel's start to the first answer: a record of fixed size that PID 1 keeps and prints, on the console as
//! it happens and later as a whole (`/boot-report`, `hearth boot-report`). Next: `sys::report`, where `hearth serve` reads it.

use std::time::Duration;

use crate::sys::marks::{Mark, Stage};

/// Lines that are kept; what comes after them is counted and left out.
pub const MAX_LINES: usize = 40;
/// Longest line's text, in bytes; the rest is left out.
pub const MAX_TEXT_BYTES: usize = 80;

/// Who did something: each has a processor time of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    Init,
    Serve,
}

#[derive(Clone, Debug)]
struct Line {
    mark: Mark,
    who: Who,
    what: String,
}

/// The record.
#[derive(Debug, Default)]
pub struct Timeline {
    lines: Vec<Line>,
    left_out: usize,
    ready: Option<Ready>,
    /// The first answer is there: what comes later is no part of the start.
    is_whole: bool,
}

/// How it was when the first request would have been taken.
#[derive(Clone, Copy, Debug)]
struct Ready {
    at: Duration,
    /// Work of PID 1 up to then, from its first line on.
    init_work: Duration,
}

impl Timeline {
    /// PID 1 did something.
    pub fn add(&mut self, mark: Mark, what: &str) {
        self.push(mark, Who::Init, what);
    }

    /// Serve came by a stage.
    pub fn add_stage(&mut self, mark: Mark, stage: Stage) {
        self.push(mark, Who::Serve, stage.name());
        self.is_whole |= stage == Stage::FirstAnswer;
    }

    /// The first request would be taken.
    pub fn set_ready(&mut self, mark: Mark) {
        if self.ready.is_none() {
            let first =
                self.lines.iter().find(|line| line.who == Who::Init).map_or(Duration::ZERO, |line| line.mark.work);
            self.push(mark, Who::Init, "ready");
            self.ready = Some(Ready { at: mark.at, init_work: mark.work.saturating_sub(first) });
        }
    }

    fn push(&mut self, mark: Mark, who: Who, what: &str) {
        if self.is_whole {
            return;
        }
        if self.lines.len() == MAX_LINES {
            self.left_out += 1;
            return;
        }
        let what = what.chars().scan(0, |len, char| {
            *len += char.len_utf8();
            (*len <= MAX_TEXT_BYTES).then_some(char)
        });
        let line = Line { mark, who, what: what.collect() };
        // What serve tells comes later than it happened.
        let place = self.lines.iter().rposition(|before| before.mark.at <= mark.at).map_or(0, |before| before + 1);
        self.lines.insert(place, line);
    }

    /// The record as lines to print.
    pub fn report(&self) -> Vec<String> {
        let seconds = |time: Duration| format!("{:.3}", time.as_secs_f64());
        let mut report = vec!["    since    step    work  (s; work: processor time of PID 1 or of serve)".to_owned()];
        let (mut before, mut done) = (Duration::ZERO, [Duration::ZERO; 2]);
        for Line { mark, who, what } in &self.lines {
            let work = mark.work.saturating_sub(done[*who as usize]);
            let step = mark.at.saturating_sub(before);
            let who_says = if *who == Who::Serve { "serve: " } else { "" };
            report.push(format!("{:>9} {:>7} {:>7}  {who_says}{what}", seconds(mark.at), seconds(step), seconds(work)));
            (before, done[*who as usize]) = (mark.at, mark.work);
        }
        if self.left_out > 0 {
            report.push(format!("{} more are left out", self.left_out));
        }
        match self.ready {
            None => report.push("not ready yet".to_owned()),
            Some(ready) => report.extend(self.sums(ready)),
        }
        report
    }

    /// What the start comes to.
    fn sums(&self, ready: Ready) -> Vec<String> {
        let pid_1 = self.lines.first().map_or(Duration::ZERO, |line| line.mark.at);
        let ms = |time: Duration| format!("{:.1} ms", time.as_secs_f64() * 1e3);
        let stage = |stage: Stage| {
            let of_serve = |line: &&Line| line.who == Who::Serve && line.what == stage.name();
            // The last one: serve may have been started more than once.
            self.lines.iter().filter(of_serve).rfind(|line| line.mark.at <= ready.at).map(|line| line.mark)
        };
        let mut sums = vec![format!("kernel's start to PID 1: {}", ms(pid_1))];
        let whole = format!("kernel's start to ready: {}", ms(ready.at));
        if let (Some(planned), Some(read), Some(open)) =
            (stage(Stage::Planned), stage(Stage::ModelRead), stage(Stage::Listening))
        {
            let reading = read.work.saturating_sub(planned.work);
            let work = ready.init_work + open.work.saturating_sub(reading);
            sums.push(format!("{whole}, {} without waits", ms(pid_1 + work + reading)));
            sums.push(format!("PID 1 to ready: work {}, and {} to read the model", ms(work), ms(reading)));
        } else {
            sums.push(whole);
        }
        sums
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(at_ms: u64, work_ms: u64) -> Mark {
        Mark { at: Duration::from_millis(at_ms), work: Duration::from_millis(work_ms) }
    }

    fn start() -> Timeline {
        let mut timeline = Timeline::default();
        timeline.add(mark(420, 1), "PID 1");
        timeline.add(mark(470, 50), "14 modules");
        timeline.set_ready(mark(900, 55));
        for (stage, at, work) in [(Stage::Started, 500, 2), (Stage::Planned, 520, 10), (Stage::ModelRead, 800, 90)] {
            timeline.add_stage(mark(at, work), stage);
        }
        timeline.add_stage(mark(890, 120), Stage::Listening);
        timeline
    }

    #[test]
    fn a_start_is_told_in_the_order_in_which_it_happened_with_its_sums() {
        let report = start().report();
        let wanted = [
            "    0.420   0.420   0.001  PID 1",
            "    0.470   0.050   0.049  14 modules",
            "    0.500   0.030   0.002  serve: serve runs",
            "    0.520   0.020   0.008  serve: model planned",
            "    0.800   0.280   0.080  serve: model read",
            "    0.890   0.090   0.030  serve: socket open",
            "    0.900   0.010   0.005  ready",
            "kernel's start to PID 1: 420.0 ms",
            "kernel's start to ready: 900.0 ms, 594.0 ms without waits",
            "PID 1 to ready: work 94.0 ms, and 80.0 ms to read the model",
        ];
        assert_eq!(report[1..], wanted);
    }

    #[test]
    fn it_ends_with_the_first_answer_and_is_bounded() {
        let mut timeline = start();
        timeline.add_stage(mark(1500, 400), Stage::FirstAnswer);
        let whole = timeline.report();
        timeline.add(mark(2000, 60), "off");
        timeline.set_ready(mark(3000, 70));
        assert_eq!(timeline.report(), whole);

        let mut timeline = Timeline::default();
        for number in 0..MAX_LINES as u64 + 3 {
            timeline.add(mark(number, number), &"ä".repeat(100));
        }
        let report = timeline.report();
        assert_eq!(report.len(), MAX_LINES + 3);
        assert!(report.iter().all(|line| line.len() < MAX_TEXT_BYTES + 40));
        assert_eq!(report[MAX_LINES + 1..], ["3 more are left out", "not ready yet"]);
    }
}
