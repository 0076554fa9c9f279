//! What changing segments costs those who append: the slowest appends with and without it.

use headwater::{JournalOptions, Store};

use crate::append::{batch_bytes, one_append};
use crate::corpus::Corpus;
use crate::measure::Measured;
use crate::shared::held::{self, Held};
use crate::shared::spread::Spread;
use crate::{Group, Outcome, Scratch};

/// Ten events are about 4 KiB: some hundred appends fill a segment, so that a roll is among the slowest two of
/// a thousand.
const EVENTS: usize = 10;
const SEGMENT_BYTES: u64 = 2 << 20;

pub(crate) fn rolls(scratch: &Scratch, _: &Corpus) -> Outcome<Group> {
    let folder = scratch.folder("rolls")?;
    let store = |name: &str, segment_bytes: u64| {
        let sizes = JournalOptions {
            segment_bytes_first: segment_bytes,
            segment_bytes_max: segment_bytes,
            ..JournalOptions::default()
        };
        Store::builder(folder.join(name)).create_if_missing().journal_options(sizes).open()
    };
    let (steady, rolling) =
        (store("steady", scratch.scale.steady_bytes)?, store("rolling", SEGMENT_BYTES)?);
    let bytes = batch_bytes(&rolling, EVENTS)?;
    let (steady_journal, rolling_journal) = (steady.journal().clone(), rolling.journal().clone());
    let ways = vec![
        one_append("append, no roll", steady, EVENTS, bytes)?,
        one_append("append, a roll every 2 MiB", rolling, EVENTS, bytes)?,
    ];
    let held = move |measured: &[Measured]| {
        let [steady, rolling] = measured else { return Vec::new() };
        // The tail of a turn is too short: the tails of all turns are compared.
        let tails = rolling.quantile(0.999).zip(steady.quantile(0.999));
        let ratio = tails.map(|(rolling, steady)| rolling.as_secs_f64() / steady.as_secs_f64());
        let rolls = rolling_journal.segments().len() - 1;
        let steady_rolls = steady_journal.segments().len() - 1;
        let note = tails.map_or_else(String::new, |(rolling, steady)| {
            let ms = |time: std::time::Duration| time.as_secs_f64() * 1e3;
            let (rolling, steady) = (ms(rolling), ms(steady));
            format!("{rolling:.2} ms with {rolls} rolls, {steady:.2} ms without")
        });
        let held = Held::new(held::ROLLS, Spread::of(ratio), note);
        let void = (steady_rolls > 0).then(|| "the steady one rolled, too".to_owned());
        vec![held.map(|held| Held { void, ..held })]
    };
    let durable = "fdatasync before every answer";
    let group = Group::new("appends across rolls", durable, ways);
    Ok(Group { held: Box::new(held), patience: 3.0, ..group })
}
