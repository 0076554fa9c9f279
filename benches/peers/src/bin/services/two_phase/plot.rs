//! One picture: orders in each tenth of a second, while the customers' side is gone for some seconds. Light and dark.

use std::fmt::{self, Write as _};

use super::Data;
use super::outage::{BUCKET, Down};

pub(super) const FILE: &str = "two-phase.svg";

const WIDTH: f64 = 960.0;
const LEFT: f64 = 20.0;
const RIGHT: f64 = 940.0;
const TOP: f64 = 76.0;
/// Of a panel: a heading, and bars below.
const HEADING: f64 = 26.0;
const BARS: f64 = 74.0;
const GAP: f64 = 22.0;
/// Bars are cut at so many times the rate of orders.
const CUT: f64 = 3.0;

const STYLE: &str = "<style>\
    text { font-family: sans-serif; font-size: 13px; fill: #24292e } .muted { fill: #57606b } .title { font-size: 19px } \
    .middle { text-anchor: middle } .heading { font-weight: bold } .paper { fill: #fefefe } .line { stroke: #8c959f } \
    .down { fill: #cf4a4a; fill-opacity: 0.13 } .placed { fill: #1f6feb } .failed { fill: #cf4a4a } \
    @media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .muted { fill: #9da7b1 } .paper { fill: #0d1117 } \
    .placed { fill: #58a6ff } .failed { fill: #ff7b72 } .down { fill-opacity: 0.25 } }</style>";

struct Panel<'a> {
    heading: &'a str,
    placed: &'a [u64],
    failed: &'a [u64],
    down: Down,
}

pub(super) fn draw(data: &Data) -> Result<String, fmt::Error> {
    let (two_phase, headwater) = (&data.outage.two_phase, &data.outage.headwater);
    let panels = [
        Panel {
            heading: "Two-phase commit: placed, known to both (red: failed)",
            placed: &two_phase.placed,
            failed: &two_phase.failed,
            down: two_phase.down,
        },
        Panel {
            heading: "Headwater: placed, durable at orders (red: failed)",
            placed: &headwater.answered,
            failed: &headwater.failed,
            down: headwater.down,
        },
        Panel {
            heading: "Headwater: shown by customers",
            placed: &headwater.seen,
            failed: &[],
            down: headwater.down,
        },
    ];
    let bottom = TOP + panels.len() as f64 * (HEADING + BARS + GAP);
    let height = bottom + 36.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\">{STYLE}\n\
         <rect class=\"paper\" width=\"{WIDTH}\" height=\"{height}\"/>\n"
    );
    text(
        &mut svg,
        "title",
        LEFT,
        30.0,
        "Orders, while the customers' side is gone for some seconds",
    )?;
    let note = format!(
        "{}{} orders/s are tried; bars are tenths of a second; the coloured time is the outage.",
        if data.quick { "NOT TO BE QUOTED. " } else { "" },
        data.outage.orders_per_second
    );
    text(&mut svg, "muted", LEFT, 54.0, &note)?;
    let per_bucket = f64::from(data.outage.orders_per_second) * BUCKET.as_secs_f64();
    for (number, panel) in panels.iter().enumerate() {
        let top = TOP + number as f64 * (HEADING + BARS + GAP);
        panel.draw(&mut svg, top, data.scale.whole.as_secs_f64(), per_bucket)?;
    }
    text(&mut svg, "muted", LEFT, height - 14.0, &data.machine.line())?;
    svg += "</svg>\n";
    Ok(svg)
}

impl Panel<'_> {
    fn draw(&self, svg: &mut String, top: f64, whole_s: f64, per_bucket: f64) -> fmt::Result {
        let x = |seconds: f64| LEFT + (seconds / whole_s).clamp(0.0, 1.0) * (RIGHT - LEFT);
        text(svg, "heading", LEFT, top + 14.0, self.heading)?;
        let (bars, base) = (top + HEADING, top + HEADING + BARS);
        let (from, to) = (x(self.down.from_ms / 1e3), x(self.down.to_ms / 1e3));
        rectangle(svg, "down", (from, bars), (to - from, BARS))?;
        let width = x(BUCKET.as_secs_f64()) - x(0.0);
        for (index, placed) in self.placed.iter().enumerate() {
            let left = x(index as f64 * BUCKET.as_secs_f64());
            let failed = self.failed.get(index).copied().unwrap_or(0);
            let mut at = base;
            for (class, orders) in [("placed", *placed), ("failed", failed)] {
                let part = (orders as f64 / per_bucket / CUT).min(1.0);
                let height = (part * BARS).min(at - bars);
                at -= height;
                if height > 0.0 {
                    rectangle(svg, class, (left + 0.5, at), (width - 1.0, height))?;
                }
            }
            if *placed as f64 > per_bucket * CUT {
                text(svg, "middle", left + width / 2.0, bars - 4.0, &format!("↑ {placed}"))?;
            }
        }
        writeln!(
            svg,
            "<line class=\"line\" x1=\"{LEFT:.1}\" y1=\"{base:.1}\" x2=\"{RIGHT:.1}\" y2=\"{base:.1}\"/>"
        )?;
        for second in (0..=whole_s as u32).step_by(2) {
            let at = f64::from(second);
            text(svg, "muted", x(at), base + 15.0, &format!("{second} s"))?;
        }
        Ok(())
    }
}

fn rectangle(svg: &mut String, class: &str, at: (f64, f64), size: (f64, f64)) -> fmt::Result {
    let ((x, y), (width, height)) = (at, size);
    writeln!(
        svg,
        "<rect class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\"/>"
    )
}

fn text(svg: &mut String, class: &str, x: f64, y: f64, text: &str) -> fmt::Result {
    let text = text.replace('&', "&amp;").replace('<', "&lt;");
    writeln!(svg, "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\">{text}</text>")
}
