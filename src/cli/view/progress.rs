//! What is shown while rows are built, and Ctrl-C.

use std::io::{self, IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use indicatif::{HumanCount, HumanDuration, ProgressBar, ProgressStyle};
use signal_hook::SigId;
use signal_hook::consts::{SIGINT, SIGTERM};

use super::failure::ViewFailure;
use crate::cli::failure::Failure;
use crate::view::{RebuildPhase, RebuildStatus};

/// How often it is looked how far it is.
const TICK: Duration = Duration::from_millis(50);
/// Where there is no terminal, a line is printed as often as this, but none for what is quickly done.
const LINE_FIRST: Duration = Duration::from_millis(500);
const LINE_INTERVAL: Duration = Duration::from_secs(5);
/// What a shell makes of Ctrl-C.
const INTERRUPTED: i32 = 130;

/// Shows progress, on standard error: a bar on a terminal, else a line now and then.
pub(super) struct Progress {
    bar: Option<ProgressBar>,
    lines: bool,
    next_line: Instant,
    interrupted: Arc<AtomicBool>,
    signals: Vec<SigId>,
}

impl Progress {
    /// From now on Ctrl-C cancels what is followed. A second one ends the process at once.
    pub(super) fn new(json: bool) -> Result<Self, Failure> {
        let interrupted = Arc::new(AtomicBool::new(false));
        let mut signals = Vec::new();
        for signal in [SIGINT, SIGTERM] {
            let second = || {
                signal_hook::flag::register_conditional_shutdown(
                    signal,
                    INTERRUPTED,
                    Arc::clone(&interrupted),
                )
            };
            let first = || signal_hook::flag::register(signal, Arc::clone(&interrupted));
            signals.push(second().map_err(ViewFailure::Signals)?);
            signals.push(first().map_err(ViewFailure::Signals)?);
        }
        let is_terminal = io::stderr().is_terminal();
        let bar = is_terminal.then(|| {
            let bar = ProgressBar::new(1);
            if let Ok(style) =
                ProgressStyle::with_template("{prefix:11} [{wide_bar}] {percent:>3} %  {msg}")
            {
                bar.set_style(style.progress_chars("=> "));
            }
            bar
        });
        let lines = !is_terminal && !json;
        Ok(Self { bar, lines, next_line: Instant::now() + LINE_FIRST, interrupted, signals })
    }

    /// Shows how far it is until it is done, and cancels it if that is asked for.
    pub(super) fn follow(
        &mut self,
        status: impl Fn() -> Option<RebuildStatus>,
        is_done: impl Fn() -> bool,
        cancel: impl Fn(),
    ) {
        let mut cancelled = false;
        while !is_done() {
            if self.is_interrupted() && !cancelled {
                cancelled = true;
                cancel();
            }
            if let Some(status) = status() {
                self.show(&status);
            }
            std::thread::sleep(TICK);
        }
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    pub(super) fn is_interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }

    fn show(&mut self, status: &RebuildStatus) {
        let is_to_begin = status.phase == RebuildPhase::Building && status.events_total == 0;
        if let Some(bar) = &self.bar {
            bar.set_message(rate(status));
            bar.set_prefix(match status.phase {
                RebuildPhase::Copying => "copying",
                RebuildPhase::Building => "building",
                RebuildPhase::Comparing => "comparing",
                RebuildPhase::CatchingUp | RebuildPhase::Ended => "catching up",
            });
            bar.set_length(status.events_total);
            bar.set_position(status.events);
        } else if self.lines && !is_to_begin && Instant::now() >= self.next_line {
            self.next_line = Instant::now() + LINE_INTERVAL;
            // Progress that can't be shown is no failure.
            drop(writeln!(io::stderr(), "{status}"));
        }
    }
}

fn rate(status: &RebuildStatus) -> String {
    let RebuildStatus { events, events_total, events_per_second, .. } = *status;
    if events_total == 0 {
        return String::new(); // it isn't known how much there is to compare
    }
    let pass = if status.pass > 1 { format!("pass {}, ", status.pass) } else { String::new() };
    let left = status.remaining.map(|left| format!(", {} left", HumanDuration(left)));
    format!(
        "{pass}{} of {} events, {}/s{}",
        HumanCount(events),
        HumanCount(events_total),
        HumanCount(events_per_second as u64),
        left.unwrap_or_default()
    )
}

impl Drop for Progress {
    fn drop(&mut self) {
        for signal in self.signals.drain(..) {
            signal_hook::low_level::unregister(signal);
        }
    }
}
