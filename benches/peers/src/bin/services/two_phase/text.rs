//! The tables of the page.

use std::fmt::Write as _;

use super::away::{Away, Side};
use super::death::Death;
use super::outage::TimeLine;
use super::plot;
use super::rates::{Kind, Way};
use super::{Data, Scale};
use crate::shared::page::grouped;
use crate::shared::spread::Spread;

impl Kind {
    const fn name(self) -> &'static str {
        match self {
            Self::Bare => "bare machine: sync, send, sync, reply",
            Self::OneDatabase => "one PostgreSQL database; the other service isn't told",
            Self::TwoPhase => "**two-phase commit over two PostgreSQL databases**",
            Self::Answered => "**Headwater, until the order is durable at orders**",
            Self::Seen => "**Headwater, until customers show it**",
        }
    }
}

pub(super) fn all(data: &Data) -> String {
    let warning = if data.quick { "A quick run: not to be quoted.\n\n" } else { "" };
    format!(
        "{warning}| | |\n|---|---|\n{}| PostgreSQL | {}, its defaults for durability; Unix sockets |\n\n{}\n{}\n![Orders in each tenth of a second](benchmarks/{})\n\n{}\n{}",
        data.machine.rows(),
        data.postgres,
        rates(&data.rates),
        outage(&data.outage),
        plot::FILE,
        away(&data.away, &data.scale),
        death(&data.death),
    )
}

pub(super) fn rates(ways: &[Way]) -> String {
    let mut text = "| clients | | an order: p50 | p99 | two-phase commit takes | orders/s |\n|---:|---|---:|---:|---:|---:|\n".to_owned();
    for way in ways {
        let ms = |it| shown(it, 2, " ms");
        let times = match way.kind {
            Kind::TwoPhase => String::new(),
            _ => shown(way.times_faster_p50, 1, "x"),
        };
        let per_second = way.per_second.map_or_else(String::new, |it| grouped(it.median));
        let (clients, name) = (way.clients, way.kind.name());
        writeln!(
            text,
            "| {clients} | {name} | {} | {} | {times} | {per_second} |",
            ms(way.p50_ms),
            ms(way.p99_ms)
        )
        .unwrap_or_default();
    }
    text
}

fn shown(spread: Option<Spread>, digits: usize, unit: &str) -> String {
    spread.map_or_else(
        || "-".to_owned(),
        |it| {
            format!("{:.digits$}{unit}<br>*{:.digits$} to {:.digits$}*", it.median, it.min, it.max)
        },
    )
}

pub(super) fn outage(line: &TimeLine) -> String {
    let TimeLine { orders_per_second, two_phase, headwater } = line;
    let down = |it: &super::outage::Down| format!("{:.1} s", (it.to_ms - it.from_ms) / 1e3);
    let sum = |these: &[u64]| grouped(these.iter().sum::<u64>() as f64);
    format!(
        "| customers gone, {orders_per_second} orders/s | two-phase commit | Headwater |\n|---|---:|---:|\n\
         | gone for | {} | {} |\n\
         | orders placed in all | {} | {} |\n\
         | orders that failed | {} | {} |\n\
         | longest that an order took | {:.0} ms | {:.0} ms |\n\
         | customers know of every order, after their start | nothing to catch up: there were none | {:.0} ms |\n",
        down(&two_phase.down),
        down(&headwater.down),
        sum(&two_phase.placed),
        sum(&headwater.answered),
        sum(&two_phase.failed),
        sum(&headwater.failed),
        two_phase.longest_ms,
        headwater.longest_ms,
        headwater.caught_up_ms,
    )
}

pub(super) fn away(it: &Away, scale: &Scale) -> String {
    let row = |what: &str, of: &dyn Fn(&Side) -> String| {
        format!("| {what} | {} | {} |\n", of(&it.two_phase), of(&it.headwater))
    };
    let rate = scale.orders_per_second;
    format!(
        "| orders gone, {rate} orders/s, {rate} reads/s at customers | two-phase commit | Headwater |\n|---|---:|---:|\n"
    ) + &row("gone for", &|it| format!("{:.1} s", (it.down.to_ms - it.down.from_ms) / 1e3))
        + &row("orders placed meanwhile", &|it| it.placed.to_string())
        + &row("reads at customers meanwhile", &|it| it.read.to_string())
        + &row("of which failed", &|it| it.failed.to_string())
        + &row("longest that a read took", &|it| format!("{:.2} ms", it.longest_read_ms))
        + &row("customers know of an order again, after the start of orders", &|it| {
            format!("{:.0} ms", it.again_ms)
        })
}

pub(super) fn death(it: &Death) -> String {
    format!(
        "| the coordinator is killed between the phases, 8 clients | |\n|---|---:|\n\
         | transactions left prepared at orders | {} |\n\
         | at customers | {} |\n\
         | customers whose next order has to wait | {} |\n\
         | the same {:.1} s later, when the coordinator comes back | {} |\n\
         | committed, rolled back by its log (at both sides together) | {}, {} |\n\
         | which took | {:.0} ms |\n",
        it.prepared_at_orders,
        it.prepared_at_customers,
        it.locked,
        it.dead_ms / 1e3,
        it.locked_later,
        it.recovered.committed,
        it.recovered.rolled_back,
        it.recovery_ms,
    )
}
