//! The plots, as SVG: logarithmic axes, whiskers from the lowest to the highest round, labels at the lines.
//! Text, grid and background follow the reader's light or dark theme.

use std::fs;
use std::ops::Range;
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::Outcome;
use crate::engine::Kind;
use crate::report::Data;
use crate::runner::{Cell, Entry, Measured};
use crate::shared::page::{grouped, time};
use crate::worker::Load;

/// A plot that was drawn.
#[derive(Debug)]
pub(crate) struct Plot {
    pub(crate) file: &'static str,
    pub(crate) title: &'static str,
}

pub(crate) fn draw(out: &Path, data: &Data) -> Outcome<Vec<Plot>> {
    let mut plots = Vec::new();
    for lines in [&WRITERS, &BATCHES] {
        if lines.points(data).len() > 1 {
            save(out, lines.file, |area| lines.draw(area, data))?;
            plots.push(Plot { file: lines.file, title: lines.title });
        }
    }
    for dots in [&READS, &OPENS] {
        if dots.panels.iter().any(|(measured, _)| data.cell(*measured).is_some()) {
            save(out, dots.file, |area| dots.draw(area, data))?;
            plots.push(Plot { file: dots.file, title: dots.title });
        }
    }
    Ok(plots)
}

// ------------------------------------------------------------------------------------------------ colours

const BACKGROUND: RGBColor = RGBColor(0xFE, 0xFE, 0xFE);
const TEXT: RGBColor = RGBColor(0x24, 0x29, 0x2E);
const MUTED: RGBColor = RGBColor(0x57, 0x60, 0x6B);
const GRID: RGBColor = RGBColor(0xD8, 0xDE, 0xE3);

/// What these colours become for a reader with a dark theme.
const DARK: &str = "<style>@media (prefers-color-scheme: dark) {\
    [fill=\"#FEFEFE\"] { fill: #0D1117; } [fill=\"#24292E\"] { fill: #E6EDF3; } \
    [fill=\"#57606B\"] { fill: #9DA7B1; } [stroke=\"#57606B\"] { stroke: #9DA7B1; } \
    [stroke=\"#D8DEE3\"] { stroke: #2A313A; } }</style>";

const HEADWATER: RGBColor = RGBColor(0x1F, 0x6F, 0xEB);
const DEVICE: RGBColor = RGBColor(0x8C, 0x95, 0x9F);
/// Readable on light and on dark.
const PEERS: [RGBColor; 8] = [
    RGBColor(0xE1, 0x6F, 0x24),
    RGBColor(0x2D, 0xA4, 0x4E),
    RGBColor(0xCF, 0x4A, 0x4A),
    RGBColor(0xA4, 0x75, 0xF9),
    RGBColor(0xBF, 0x87, 0x00),
    RGBColor(0xE0, 0x5A, 0xA8),
    RGBColor(0x14, 0xA5, 0xA5),
    RGBColor(0x8F, 0x78, 0x60),
];

fn colour(data: &Data, name: &str) -> RGBColor {
    let kind = data.kind(name);
    match kind {
        Kind::Headwater => HEADWATER,
        Kind::Baseline => DEVICE,
        Kind::Peer => {
            let mut peers = data.peers.iter().filter(|peer| peer.kind == kind);
            PEERS[peers.position(|peer| peer.name == name).unwrap_or(0) % PEERS.len()]
        }
    }
}

// -------------------------------------------------------------------------------------------------- frame

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn std::error::Error>>;

const WIDTH: u32 = 960;
const HEIGHT: u32 = 540;

fn save(out: &Path, file: &str, draw: impl Fn(&Area<'_>) -> Drawn) -> Outcome<()> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (WIDTH, HEIGHT)).into_drawing_area();
        let drawn = area.fill(&BACKGROUND).map_err(Into::into).and_then(|()| draw(&area));
        drawn.map_err(|error| error.to_string())?;
        area.present().map_err(|error| error.to_string())?;
    }
    let at = svg.find('>').map_or(0, |end| end + 1);
    svg.insert_str(at, DARK);
    Ok(fs::write(out.join(file), svg)?)
}

fn font(size: u32, colour: RGBColor) -> TextStyle<'static> {
    ("sans-serif", size).into_font().color(&colour)
}

fn write(area: &Area<'_>, text: &str, style: &TextStyle<'_>, at: (i32, i32)) -> Drawn {
    Ok(area.draw(&Text::new(text.to_owned(), at, style.clone()))?)
}

/// The title above, where it was measured below; in between is room for the plot.
fn framed<'a>(
    area: &Area<'a>,
    title: &str,
    data: &Data,
) -> Result<Area<'a>, Box<dyn std::error::Error>> {
    write(area, title, &font(19, TEXT), (20, 16))?;
    let smoke = if data.settings.smoke || data.settings.quick { "NOT TO BE QUOTED. " } else { "" };
    let rounds = match data.settings.rounds {
        1 => "One round".to_owned(),
        rounds => format!("Medians of {rounds} rounds, bars from the lowest to the highest"),
    };
    let note = format!("{smoke}{rounds}; logarithmic. Grey: the bare device, without an engine.");
    write(area, &note, &font(13, MUTED), (20, 42))?;
    let height = i32::try_from(HEIGHT)?;
    write(
        area,
        &format!("{}; an append is durable (fdatasync) when it is answered", data.machine.line()),
        &font(13, MUTED),
        (20, height - 24),
    )?;
    Ok(area.margin(66, 34, 12, 12))
}

/// Whole powers of ten around the values.
fn decades(values: impl Iterator<Item = f64> + Clone) -> Range<f64> {
    let low = values.clone().fold(f64::INFINITY, f64::min).max(1e-9);
    let high = values.fold(low, f64::max);
    10f64.powf(low.log10().floor())..10f64.powf((high * 1.02).log10().ceil())
}

fn power_of_ten(value: f64) -> String {
    match value {
        value if value >= 1e6 => format!("{} M", grouped(value / 1e6)),
        value => grouped(value),
    }
}

// -------------------------------------------------------------------------------------------------- lines

/// One line for each peer.
pub(crate) struct Lines {
    pub(crate) file: &'static str,
    pub(crate) title: &'static str,
    x_title: &'static str,
    loads: &'static [Load],
    /// What grows along the axis.
    x: fn(&Load) -> f64,
}

const ONE: Load = Load { writers: 1, batch: 1, payload_bytes: 256 };

pub(crate) const WRITERS: Lines = Lines {
    file: "appends-by-writers.svg",
    title: "Durable appends: events per second, by the number of writers (256 B each)",
    x_title: "writers, each waiting for its append to be durable",
    loads: &[
        ONE,
        Load { writers: 16, ..ONE },
        Load { writers: 64, ..ONE },
        Load { writers: 256, ..ONE },
    ],
    x: |load| f64::from(load.writers),
};

const BATCHES: Lines = Lines {
    file: "appends-by-batch.svg",
    title: "Durable appends: events per second of one writer, by the size of its batches (256 B each)",
    x_title: "events in a batch",
    loads: &[ONE, Load { batch: 100, ..ONE }, Load { batch: 1000, ..ONE }],
    x: |load| load.batch as f64,
};

impl Lines {
    fn points<'d>(&self, data: &'d Data) -> Vec<(f64, &'d Cell)> {
        let cell = |load: &Load| Some(((self.x)(load).log2(), data.cell(Measured::Append(*load))?));
        self.loads.iter().filter_map(cell).collect()
    }

    fn draw(&self, area: &Area<'_>, data: &Data) -> Drawn {
        const LABELS_WIDTH: i32 = 150;
        let area = framed(area, self.title, data)?;
        let points = self.points(data);
        let all = points.iter().flat_map(|(_, cell)| &cell.entries).filter_map(|it| it.value);
        let values = all.flat_map(|it| [it.min, it.max]);
        let ticks: Vec<f64> = points.iter().map(|(x, _)| *x).collect();
        let right = ticks.last().copied().unwrap_or(1.0);
        let mut chart = ChartBuilder::on(&area)
            .margin_right(LABELS_WIDTH)
            .x_label_area_size(46)
            .y_label_area_size(76)
            .build_cartesian_2d(-0.15..right + 0.15, decades(values).log_scale())?;
        chart
            .configure_mesh()
            .axis_style(MUTED)
            .bold_line_style(GRID)
            .light_line_style(TRANSPARENT)
            .label_style(font(14, MUTED))
            .x_desc(self.x_title)
            .axis_desc_style(font(14, MUTED))
            .disable_x_mesh()
            .x_labels(0)
            .y_label_formatter(&|y| power_of_ten(*y))
            .draw()?;
        let y_range = chart.as_coord_spec().get_y_range();
        chart.draw_series(ticks.iter().map(|x| {
            PathElement::new([(*x, y_range.start), (*x, y_range.end)], GRID.stroke_width(1))
        }))?;
        for x in ticks {
            let (tick, base) = (chart.backend_coord(&(x, y_range.start)), area.get_base_pixel());
            let style = font(14, MUTED).pos(Pos::new(HPos::Center, VPos::Top));
            let at = (tick.0 - base.0, tick.1 - base.1 + 8);
            write(&area, &format!("{:.0}", x.exp2()), &style, at)?;
        }
        let mut ends = Vec::new();
        // The first peer is Headwater: last, so that it lies above the others.
        for (index, peer) in data.peers.iter().enumerate().rev() {
            let colour = colour(data, &peer.name);
            let width = if peer.kind == Kind::Headwater { 4 } else { 2 };
            let value = |(x, cell): &(f64, &Cell)| Some((*x, cell.entries.get(index)?.value?));
            let line: Vec<_> = points.iter().filter_map(value).collect();
            let medians = line.iter().map(|(x, value)| (*x, value.median));
            chart.draw_series(LineSeries::new(medians.clone(), colour.stroke_width(width)))?;
            chart.draw_series(medians.map(|at| Circle::new(at, width + 1, colour.filled())))?;
            chart.draw_series(line.iter().map(|(x, value)| {
                PathElement::new([(*x, value.min), (*x, value.max)], colour.stroke_width(1))
            }))?;
            if let Some((x, value)) = line.last() {
                ends.push((chart.backend_coord(&(*x, value.median)), &peer.name, colour));
            }
        }
        label_ends(&area, ends)
    }
}

/// Writes each name beside the end of its line, and moves names apart that would lie over each other.
fn label_ends(area: &Area<'_>, mut ends: Vec<((i32, i32), &String, RGBColor)>) -> Drawn {
    const APART: i32 = 17;
    let (left, top) = area.get_base_pixel();
    ends.sort_by_key(|((_, y), ..)| *y);
    let mut free = i32::MIN;
    for ((x, y), name, colour) in ends {
        let at = y.max(free);
        free = at + APART;
        let (from, to) = ((x - left + 8, y - top), (x - left + 24, at - top));
        area.draw(&PathElement::new([from, to], colour.stroke_width(1)))?;
        let style = font(14, colour).pos(Pos::new(HPos::Left, VPos::Center));
        write(area, name, &style, (to.0 + 4, to.1))?;
    }
    Ok(())
}

// --------------------------------------------------------------------------------------------------- dots

/// A row for each peer, a panel for each operation.
struct Dots {
    file: &'static str,
    title: &'static str,
    panels: &'static [(Measured, &'static str)],
}

const READS: Dots = Dots {
    file: "reads.svg",
    title: "Reading from the page cache (right is better)",
    panels: &[
        (Measured::Replay, "replay: events/s"),
        (Measured::Random, "one event by position: reads/s"),
        (Measured::Stream, "one stream of many: streams/s"),
    ],
};

const OPENS: Dots = Dots {
    file: "opens.svg",
    title: "Opening (left is better)",
    panels: &[
        (Measured::OpenClean, "after a clean stop: milliseconds"),
        (Measured::OpenUnclean, "after a kill while appending: milliseconds"),
    ],
};

const NAMES_WIDTH: i32 = 130;

impl Dots {
    fn draw(&self, area: &Area<'_>, data: &Data) -> Drawn {
        let area = framed(area, self.title, data)?;
        let (names, panels) = area.split_horizontally(NAMES_WIDTH);
        let panels = panels.split_evenly((1, self.panels.len()));
        let mut rows = Vec::new();
        for (panel, (measured, head)) in panels.iter().zip(self.panels) {
            if let Some(cell) = data.cell(*measured) {
                rows = self.panel(panel, data, cell, head)?;
            }
        }
        for (y, peer) in rows.into_iter().zip(&data.peers) {
            let style = font(14, colour(data, &peer.name)).pos(Pos::new(HPos::Right, VPos::Center));
            write(&names, &peer.name, &style, (NAMES_WIDTH - 4, y - names.get_base_pixel().1))?;
        }
        Ok(())
    }

    /// Answers where the rows are.
    fn panel(
        &self,
        area: &Area<'_>,
        data: &Data,
        cell: &Cell,
        head: &str,
    ) -> Result<Vec<i32>, Box<dyn std::error::Error>> {
        // Seconds are shown as milliseconds.
        let scale = if cell.measured.is_time() { 1e3 } else { 1.0 };
        let values = cell.entries.iter().filter_map(|entry| entry.value);
        let values = values.flat_map(|it| [it.min * scale, it.max * scale]);
        let rows = data.peers.len() as f64;
        let row = |index: usize| rows - index as f64 - 0.5;
        let mut chart = ChartBuilder::on(area)
            .margin_right(34)
            .margin_left(12)
            .caption(head, font(14, TEXT))
            .x_label_area_size(30)
            .build_cartesian_2d(decades(values).log_scale(), 0.0..rows)?;
        chart
            .configure_mesh()
            .disable_y_mesh()
            .axis_style(MUTED)
            .bold_line_style(GRID)
            .light_line_style(TRANSPARENT)
            .label_style(font(12, MUTED))
            .x_label_formatter(&|x| if *x < 1.0 { format!("{x}") } else { power_of_ten(*x) })
            .draw()?;
        for (index, entry) in cell.entries.iter().enumerate() {
            let (y, colour) = (row(index), colour(data, &entry.peer));
            let style = font(12, MUTED);
            let Some(value) = entry.value else { continue };
            let (min, max, at) = (value.min * scale, value.max * scale, value.median * scale);
            let size = if data.kind(&entry.peer) == Kind::Headwater { 6 } else { 4 };
            chart.draw_series([PathElement::new([(min, y), (max, y)], colour.stroke_width(2))])?;
            chart.draw_series([Circle::new((at, y), size, colour.filled())])?;
            let (x, y) = chart.backend_coord(&(at, y));
            let (left, top) = area.get_base_pixel();
            let style = style.pos(Pos::new(HPos::Center, VPos::Bottom));
            write(area, &number(cell, entry), &style, (x - left, y - top - 7))?;
        }
        let middle = chart.as_coord_spec().get_x_range().start;
        Ok((0..data.peers.len()).map(|it| chart.backend_coord(&(middle, row(it))).1).collect())
    }
}

fn number(cell: &Cell, entry: &Entry) -> String {
    entry.value.map_or_else(String::new, |value| match cell.measured.is_time() {
        true => time(value.median),
        false => grouped(value.median),
    })
}
