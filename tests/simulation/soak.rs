//! The soak: the simulated world for as long as one likes. `./run soak` calls it.
//!
//! ```text
//! soak [--seed N] [--for 90s|8m|1h] [--crashes N] [--pairs]
//! soak --replay PART SEED
//! ```
//! Seeds that failed are kept in the file that `HEADWATER_SOAK_FAILURES` names, and run first.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a test: what was tried is printed"
)]

use std::collections::BTreeSet;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

#[path = "mod.rs"]
mod simulation;

use simulation::Check;
use simulation::campaign::{Tally, Until, over_seeds};
use simulation::every_fault::{self, SCENARIOS, Second};
use simulation::reached::Reached;
use simulation::{bits, life, misdirected, threads};

/// The parts that a seed is run through, and the share of the time that each gets, in percent.
const PARTS: [(&str, u32); 4] = [("life", 70), ("fault", 15), ("threads", 10), ("misdirected", 5)];

struct Wanted {
    first_seed: u64,
    time: Option<Duration>,
    crashes: Option<u64>,
    second: Second,
    replay: Option<(String, u64)>,
}

fn main() -> ExitCode {
    match wanted(std::env::args().skip(1)) {
        Ok(wanted) => match soak(&wanted) {
            Ok(()) => ExitCode::SUCCESS,
            Err(what) => {
                eprintln!("\n{what}");
                ExitCode::FAILURE
            }
        },
        Err(what) => {
            eprintln!(
                "{what}\nusage: soak [--seed N] [--for 90s|8m|1h] [--crashes N] [--pairs] | soak --replay PART SEED"
            );
            ExitCode::from(2)
        }
    }
}

fn wanted(mut args: impl Iterator<Item = String>) -> Check<Wanted> {
    let mut wanted = Wanted {
        first_seed: u64::from(fastrand::u32(..)) << 16,
        time: None,
        crashes: None,
        second: Second::Sampled(2),
        replay: None,
    };
    let number = |text: Option<String>| -> Check<u64> {
        text.and_then(|text| text.parse().ok()).ok_or_else(|| "a number is missing".into())
    };
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--seed" => wanted.first_seed = number(args.next())?,
            "--crashes" => wanted.crashes = Some(number(args.next())?),
            "--for" => wanted.time = Some(duration(&args.next().unwrap_or_default())?),
            "--pairs" => wanted.second = Second::Every,
            "--replay" => {
                let part = args.next().unwrap_or_default();
                wanted.replay = Some((part, number(args.next())?));
            }
            // From `cargo test`.
            "--nocapture" => {}
            other => return Err(format!("{other} means nothing here")),
        }
    }
    if wanted.time.is_none() && wanted.crashes.is_none() {
        wanted.time = Some(Duration::from_secs(8 * 60));
    }
    Ok(wanted)
}

fn duration(text: &str) -> Check<Duration> {
    let units = [("s", 1), ("m", 60), ("h", 3600), ("", 1)];
    let found = units.iter().find_map(|(unit, seconds)| {
        let number: u64 = text.strip_suffix(unit)?.parse().ok()?;
        Some(Duration::from_secs(number * seconds))
    });
    found.ok_or_else(|| format!("{text:?} is no time: 90s, 8m or 1h"))
}

/// What the random lives have met.
static REACHED: parking_lot::Mutex<(Reached, u64)> = parking_lot::Mutex::new((Reached::NOTHING, 0));

fn one(part: &str, seed: u64, second: Second) -> Check<u64> {
    match part {
        "life" => {
            let outcome = life::run(seed, None)?;
            let mut all = REACHED.lock();
            all.0.add(&outcome.reached);
            all.1 += 1;
            Ok(outcome.crashes)
        }
        "fault" => {
            let scenario = &SCENARIOS[(seed % SCENARIOS.len() as u64) as usize];
            every_fault::run(scenario, seed, second, None)
        }
        "threads" => threads::run(seed),
        "misdirected" => misdirected::run(seed).map(|_| 1),
        other => Err(format!("there is no part {other:?}")),
    }
}

fn soak(wanted: &Wanted) -> Check<()> {
    if let Some((part, seed)) = &wanted.replay {
        let crashes = one(part, *seed, wanted.second)?;
        println!("{part} {seed}: {crashes} crashes, 0 violations");
        return Ok(());
    }
    replay_failures(wanted)?;
    let began = Instant::now();
    let bits = every_bit(wanted.first_seed)?;
    let mut all = Tally::default();
    for (part, percent) in PARTS {
        let share = |whole: u64| whole * u64::from(percent) / 100;
        let until = Until {
            crashes: wanted.crashes.map(share),
            time: wanted.time.map(|time| time * percent / 100),
        };
        let seeds = |seed| one(part, seed, wanted.second);
        let tally = over_seeds(wanted.first_seed, until, seeds, |now| show(part, &all, now, began));
        all.crashes += tally.crashes;
        all.runs += tally.runs;
        if let Some((seed, what)) = tally.failures.first() {
            keep(part, *seed);
            return Err(format!(
                "{part}: {what}\nreplay it with: ./run soak --replay {part} {seed}"
            ));
        }
    }
    clear_line();
    let (reached, runs) = *REACHED.lock();
    let (text, seldom) = reached.judge(runs);
    println!("met in {} random lives:\n{text}", grouped(runs));
    if runs > 1_000 && !seldom.is_empty() {
        return Err(format!("met too seldom to prove anything: {seldom:?}"));
    }
    println!(
        "{} crashes, {} runs, {} bits flipped, 0 violations, seed {}, {} s",
        grouped(all.crashes),
        grouped(all.runs),
        grouped(bits),
        wanted.first_seed,
        began.elapsed().as_secs()
    );
    Ok(())
}

/// Every bit of a segment.
fn every_bit(seed: u64) -> Check<u64> {
    let journal = bits::Journal::new(seed)?;
    let chunk = 64;
    let chunks = journal.bits / chunk;
    let next = std::sync::atomic::AtomicU64::new(0);
    let failed = parking_lot::Mutex::new(None);
    let worker = || {
        loop {
            let number = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            if number >= chunks || failed.lock().is_some() {
                return;
            }
            for bit in number * chunk..(number + 1) * chunk {
                if let Err(what) = journal.flip(bit) {
                    *failed.lock() = Some(what);
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, std::num::NonZero::get) {
            scope.spawn(worker);
        }
    });
    match failed.into_inner() {
        Some(what) => Err(what),
        None => Ok(journal.bits),
    }
}

// ------------------------------------------------------------------------------------------------ failures

fn failures_file() -> Option<PathBuf> {
    std::env::var_os("HEADWATER_SOAK_FAILURES").map(PathBuf::from)
}

fn kept() -> BTreeSet<(String, u64)> {
    let text = failures_file().and_then(|path| std::fs::read_to_string(path).ok());
    let text = text.unwrap_or_default();
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(part, seed)| Some((part.to_owned(), seed.parse().ok()?)))
        .collect()
}

fn write_kept(failures: &BTreeSet<(String, u64)>) {
    let Some(path) = failures_file() else { return };
    let text: String = failures.iter().map(|(part, seed)| format!("{part} {seed}\n")).collect();
    if let Err(error) = std::fs::write(&path, text) {
        eprintln!("{}: {error}", path.display());
    }
}

fn keep(part: &str, seed: u64) {
    let mut failures = kept();
    failures.insert((part.to_owned(), seed));
    write_kept(&failures);
}

/// What failed before comes first, and is forgotten once it passes.
fn replay_failures(wanted: &Wanted) -> Check<()> {
    let mut failures = kept();
    for (part, seed) in failures.clone() {
        one(&part, seed, wanted.second).map_err(|what| {
            format!("still: {what}\nreplay it with: ./run soak --replay {part} {seed}")
        })?;
        println!("{part} {seed} had failed and passes now");
        failures.remove(&(part, seed));
        write_kept(&failures);
    }
    Ok(())
}

// ------------------------------------------------------------------------------------------------ progress

fn show(part: &str, before: &Tally, now: &Tally, began: Instant) {
    let crashes = before.crashes + now.crashes;
    let seconds = began.elapsed().as_secs().max(1);
    let line = format!(
        "{seconds} s  {} crashes, {} runs ({part}), {}/s",
        grouped(crashes),
        grouped(before.runs + now.runs),
        grouped(crashes / seconds)
    );
    if std::io::stdout().is_terminal() {
        print!("\r\x1b[K{line}");
        drop(std::io::stdout().flush());
    } else if seconds.is_multiple_of(30) {
        println!("{line}");
    }
}

fn clear_line() {
    if std::io::stdout().is_terminal() {
        print!("\r\x1b[K");
    }
}

fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
