//! One picture: every path as a multiple of what the machine gives without Headwater. Light and dark.

use std::fmt::{self, Write as _};

use crate::figures::{Data, WayData};
use crate::shared::page::{grouped, ratio};
use crate::shared::spread::Spread;

pub(crate) const FILE: &str = "paths.svg";

const WIDTH: f64 = 960.0;
const LEFT: f64 = 330.0;
const RIGHT: f64 = 800.0;
const TOP: f64 = 84.0;
const ROW: f64 = 22.0;
const GROUP_GAP: f64 = 10.0;

const STYLE: &str = "<style>\
    text { font-family: sans-serif; font-size: 13px; fill: #24292e } .muted { fill: #57606b } \
    .title { font-size: 19px } .heading { paint-order: stroke; stroke: #fefefe; stroke-width: 5px; stroke-linejoin: round } .group { font-weight: bold } .right { text-anchor: end } .middle { text-anchor: middle } \
    .paper { fill: #fefefe } .grid { stroke: #d8dee3 } .bare { stroke: #57606b; stroke-width: 1.5 } \
    .spread { stroke: #1f6feb; stroke-width: 2 } .dot { fill: #1f6feb } .device { stroke: #8c959f; stroke-width: 2; fill: #8c959f } \
    @media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .muted { fill: #9da7b1 } .paper { fill: #0d1117 } .heading { stroke: #0d1117 } \
    .grid { stroke: #2a313a } .bare { stroke: #9da7b1 } .spread { stroke: #58a6ff } .dot { fill: #58a6ff } }</style>";

/// A logarithmic axis from a power of ten to another.
struct Axis {
    from: i32,
    to: i32,
}

impl Axis {
    fn around(values: impl Iterator<Item = f64>) -> Self {
        let usable = values.filter(|value| value.is_finite() && *value > 0.0);
        let (low, high) =
            usable.fold((0.5, 2.0), |(low, high), it| (f64::min(low, it), f64::max(high, it)));
        Self { from: low.log10().floor() as i32, to: high.log10().ceil() as i32 }
    }

    fn x(&self, value: f64) -> f64 {
        let part =
            (value.max(1e-9).log10() - f64::from(self.from)) / f64::from(self.to - self.from);
        LEFT + part.clamp(0.0, 1.0) * (RIGHT - LEFT)
    }
}

pub(crate) fn draw(data: &Data) -> Result<String, fmt::Error> {
    let ways = || data.groups.iter().flat_map(|group| group.ways.iter().skip(1));
    let spreads = ways().filter_map(|way| way.times_bare);
    let axis = Axis::around(spreads.flat_map(|it| [it.min, it.max]));
    let rows = ways().count() + data.groups.len();
    let bottom = TOP + rows as f64 * ROW + data.groups.len() as f64 * GROUP_GAP;
    let height = bottom + 62.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\">{STYLE}\n\
         <rect class=\"paper\" width=\"{WIDTH}\" height=\"{height}\"/>\n"
    );
    text(
        &mut svg,
        "title",
        20.0,
        30.0,
        "Headwater's own paths, as multiples of the bare machine's speed",
    )?;
    let note = data.warning.unwrap_or(
        "Medians; bars from the lowest to the highest turn; logarithmic. 1x is what stands beside the heading, in the same turn.",
    );
    text(&mut svg, "muted", 20.0, 54.0, note)?;
    for power in axis.from..=axis.to {
        let (value, x) = (10f64.powi(power), axis.x(10f64.powi(power)));
        let class = if power == 0 { "bare" } else { "grid" };
        line(&mut svg, class, (x, TOP - 8.0), (x, bottom))?;
        text(&mut svg, "muted middle", x, bottom + 18.0, &format!("{value}x"))?;
    }
    text(&mut svg, "muted right", WIDTH - 20.0, bottom + 18.0, "events/s")?;
    let mut y = TOP;
    for group in &data.groups {
        y += ROW;
        let bare = group.ways.first().map_or("", |way| way.name);
        let heading = format!(
            "<tspan class=\"group\">{}</tspan><tspan class=\"muted\" dx=\"10\">1x: {}; durable: {}</tspan>",
            escaped(group.name),
            escaped(bare),
            escaped(group.durable)
        );
        writeln!(svg, "<text class=\"heading\" x=\"20\" y=\"{:.1}\">{heading}</text>", y - 6.0)?;
        for way in group.ways.iter().skip(1) {
            y += ROW;
            row(&mut svg, &axis, way, y - 6.0)?;
        }
        y += GROUP_GAP;
    }
    text(&mut svg, "muted", 20.0, height - 16.0, &data.machine.line())?;
    svg += "</svg>\n";
    Ok(svg)
}

fn row(svg: &mut String, axis: &Axis, way: &WayData, y: f64) -> fmt::Result {
    text(svg, "right", LEFT - 16.0, y, way.name)?;
    if let Some(Spread { median, min, max }) = way.times_bare {
        let (class, y) = if way.is_bare() { ("device", y - 4.0) } else { ("spread dot", y - 4.0) };
        let (from, to, at) = (axis.x(min), axis.x(max), axis.x(median));
        line(svg, class, (from, y), (to, y))?;
        writeln!(svg, "<circle class=\"{class}\" cx=\"{at:.1}\" cy=\"{y:.1}\" r=\"5\"/>")?;
        text(svg, "right", RIGHT + 60.0, y + 4.0, &ratio(median))?;
    }
    let per_second = way.events_per_second.map_or_else(String::new, |it| grouped(it.median));
    text(svg, "muted right", WIDTH - 20.0, y, &per_second)
}

fn line(svg: &mut String, class: &str, from: (f64, f64), to: (f64, f64)) -> fmt::Result {
    let ((x1, y1), (x2, y2)) = (from, to);
    writeln!(
        svg,
        "<line class=\"{class}\" x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\"/>"
    )
}

fn text(svg: &mut String, class: &str, x: f64, y: f64, text: &str) -> fmt::Result {
    let text = escaped(text);
    writeln!(svg, "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\">{text}</text>")
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}
