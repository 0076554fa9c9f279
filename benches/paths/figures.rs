//! The groups in one table.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::corpus::Corpus;
use crate::machine::Machine;
use crate::{GROUPS, Group, Outcome, Scale, Scratch, Way};

/// The ways of a group take turns of this length, so that all see the same good and bad moments.
const TURN: Duration = Duration::from_millis(150);

/// A p99 of fewer operations says nothing.
const OPERATIONS_FOR_P99: usize = 200;

/// How long each way is measured.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Effort {
    /// One operation each.
    Smoke,
    Seconds(u64),
}

/// The table as one JSON object; `baseline` is its last column.
pub(crate) fn print_json(scale: Scale, effort: Effort) -> Outcome<()> {
    let scratch = Scratch::new(scale)?;
    let machine = Machine::look(scratch.dir.path());
    let corpus = Corpus::write(&scratch)?;
    let mut groups = Vec::new();
    for setup in GROUPS {
        let mut group = setup(&scratch, &corpus)?;
        let measured = measure(&mut group.ways, effort)?;
        let baseline = baseline(&group, &measured);
        let ways = group.ways.iter().zip(&measured).map(|(way, it)| {
            json!({
                "name": way.name,
                "operations": it.0.len(),
                "events_per_second": it.per_second(way.events),
                "bytes_per_second": it.per_second(way.bytes),
                "p50_us": it.quantile(0.5).as_secs_f64() * 1e6,
                "p99_us": it.p99().map(|time| time.as_secs_f64() * 1e6),
                "baseline": speed(way, it) / baseline,
            })
        });
        let ways: Vec<_> = ways.collect();
        groups.push(json!({ "name": group.name, "durable": group.durable, "ways": ways }));
    }
    let machine = json!({
        "processor": machine.processor, "cores": machine.cores, "memory": machine.memory,
        "system": machine.system, "file_system": machine.file_system, "load": machine.load,
    });
    let all = json!({ "machine": machine, "journal": corpus.to_string(), "groups": groups });
    println!("{}", serde_json::to_string_pretty(&all)?);
    Ok(())
}

pub(crate) fn print(scale: Scale, effort: Effort) -> Outcome<()> {
    let scratch = Scratch::new(scale)?;
    println!("{}", Machine::look(scratch.dir.path()));
    let corpus = Corpus::write(&scratch)?;
    println!("journal    {corpus}");
    if cfg!(debug_assertions) || matches!(effort, Effort::Smoke) {
        println!("NOT TO BE QUOTED: only a look whether everything works");
    }
    for setup in GROUPS {
        let mut group = setup(&scratch, &corpus)?;
        let measured = measure(&mut group.ways, effort)?;
        show(&group, &measured);
    }
    println!("\n{NOTES}");
    Ok(())
}

const NOTES: &str = "\
Events/s and MB/s are of all operations of a way together, MB of 10^6 bytes as they lie in the journal.
p50 and p99 are of one operation. The last column is a way's speed by its median operation, per event,
as a multiple of its group's first line: what the machine gives without Headwater in this same run.
All ways of a group take turns. Reading is from the page cache.";

/// How long each operation of a way took, sorted.
struct Measured(Vec<Duration>);

fn measure(ways: &mut [Way], effort: Effort) -> Outcome<Vec<Measured>> {
    let mut measured: Vec<_> = ways.iter().map(|_| Measured(Vec::new())).collect();
    let (budget, turn) = match effort {
        Effort::Smoke => (Duration::ZERO, Duration::ZERO),
        Effort::Seconds(seconds) => {
            for way in &mut *ways {
                (way.operation)()?; // the first one finds caches cold
            }
            (Duration::from_secs(seconds), TURN)
        }
    };
    let budget = budget * u32::try_from(ways.len())?;
    let began = Instant::now();
    loop {
        for (way, Measured(times)) in ways.iter_mut().zip(&mut measured) {
            take_turn(way, times, turn)?;
        }
        if began.elapsed() >= budget {
            break;
        }
    }
    measured.iter_mut().for_each(|Measured(times)| times.sort_unstable());
    Ok(measured)
}

/// At least one operation.
fn take_turn(way: &mut Way, times: &mut Vec<Duration>, turn: Duration) -> Outcome<()> {
    let began = Instant::now();
    loop {
        times.push((way.operation)()?);
        if began.elapsed() >= turn {
            return Ok(());
        }
    }
}

impl Measured {
    fn quantile(&self, part: f64) -> Duration {
        let last = self.0.len().saturating_sub(1);
        let index = (last as f64 * part).round() as usize;
        self.0.get(index).copied().unwrap_or_default()
    }

    fn p99(&self) -> Option<Duration> {
        (self.0.len() >= OPERATIONS_FOR_P99).then(|| self.quantile(0.99))
    }

    fn per_second(&self, each: u64) -> f64 {
        let total: Duration = self.0.iter().sum();
        each as f64 * self.0.len() as f64 / total.as_secs_f64()
    }
}

/// Events per second of the median operation.
fn speed(way: &Way, measured: &Measured) -> f64 {
    way.events as f64 / measured.quantile(0.5).as_secs_f64()
}

/// The speed of the group's first way.
fn baseline(group: &Group, measured: &[Measured]) -> f64 {
    let first = group.ways.first().zip(measured.first());
    first.map_or(f64::NAN, |(way, it)| speed(way, it))
}

fn show(group: &Group, measured: &[Measured]) {
    println!("\n{} (durable: {})", group.name, group.durable);
    println!(
        "  {:<34} {:>11} {:>8} {:>10} {:>10} {:>7} {:>9}",
        "", "events/s", "MB/s", "p50", "p99", "count", "baseline"
    );
    let baseline = baseline(group, measured);
    for (way, it) in group.ways.iter().zip(measured) {
        let ratio = speed(way, it) / baseline;
        println!(
            "  {:<34} {:>11} {:>8.1} {:>10} {:>10} {:>7} {:>8.2}x",
            way.name,
            grouped(it.per_second(way.events)),
            it.per_second(way.bytes) / 1e6,
            for_people(it.quantile(0.5)),
            it.p99().map_or_else(|| "-".to_owned(), for_people),
            it.0.len(),
            ratio,
        );
    }
}

fn for_people(time: Duration) -> String {
    match time.as_secs_f64() {
        seconds if seconds < 0.001 => format!("{:.0} µs", seconds * 1e6),
        seconds if seconds < 1.0 => format!("{:.2} ms", seconds * 1e3),
        seconds => format!("{seconds:.2} s"),
    }
}

/// `1,234,567`.
fn grouped(number: f64) -> String {
    let digits = format!("{number:.0}");
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index) % 3 == 0 {
            out.push(',');
        }
        out.push(digit);
    }
    out
}
