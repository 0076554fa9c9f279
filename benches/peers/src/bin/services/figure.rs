//! A figure, what it stands beside, and what was wanted; and the tables made of them.

use serde::Serialize;

use crate::shared::spread::Spread;

#[derive(Clone, Debug, Serialize)]
pub(crate) struct Figure {
    pub(crate) what: String,
    pub(crate) unit: &'static str,
    pub(crate) measured: Option<Spread>,
    /// What does the same without Headwater, in the same rounds.
    pub(crate) beside: Option<Beside>,
    pub(crate) wanted: Vec<Wanted>,
    pub(crate) note: String,
}

#[derive(Clone, Debug, Serialize)]
pub(crate) struct Beside {
    pub(crate) what: &'static str,
    pub(crate) measured: Option<Spread>,
    /// The figure over this, round by round.
    pub(crate) ratio: Option<Spread>,
}

/// What was set beforehand.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) enum Wanted {
    AtMost(f64),
    RatioAtMost(f64),
    RatioAtLeast(f64),
}

impl Figure {
    pub(crate) fn new(
        what: impl Into<String>,
        unit: &'static str,
        measured: Option<Spread>,
    ) -> Self {
        let (beside, wanted, note) = (None, Vec::new(), String::new());
        Self { what: what.into(), unit, measured, beside, wanted, note }
    }

    pub(crate) fn beside(
        self,
        what: &'static str,
        measured: Option<Spread>,
        ratio: Option<Spread>,
    ) -> Self {
        Self { beside: Some(Beside { what, measured, ratio }), ..self }
    }

    pub(crate) fn wanted(mut self, wanted: Wanted) -> Self {
        self.wanted.push(wanted);
        self
    }

    pub(crate) fn note(self, note: impl Into<String>) -> Self {
        Self { note: note.into(), ..self }
    }

    fn row(&self) -> String {
        let Self { what, unit, measured, beside, wanted, note } = self;
        let (beside_what, beside_measured, ratio) = beside.as_ref().map_or_else(
            || (String::new(), String::new(), String::new()),
            |it| (format!("{}: ", it.what), shown(it.measured, unit), shown(it.ratio, "x")),
        );
        let verdicts: Vec<_> = wanted.iter().map(|it| it.judge(self)).collect();
        let wanted: Vec<_> = wanted.iter().map(|it| it.shown(unit)).collect();
        format!(
            "| {what} | {} | {beside_what}{beside_measured} | {ratio} | {} | {} | {note} |\n",
            shown(*measured, unit),
            wanted.join("<br>"),
            verdicts.join("<br>"),
        )
    }
}

impl Wanted {
    fn judge(self, figure: &Figure) -> &'static str {
        let ratio = figure.beside.as_ref().and_then(|beside| beside.ratio);
        let reached = match self {
            Self::AtMost(limit) => figure.measured.map(|it| it.median <= limit),
            Self::RatioAtMost(limit) => ratio.map(|it| it.median <= limit),
            Self::RatioAtLeast(limit) => ratio.map(|it| it.median >= limit),
        };
        match reached {
            Some(true) => "reached",
            Some(false) => "**missed**",
            None => "not measured",
        }
    }

    fn shown(self, unit: &str) -> String {
        match self {
            Self::AtMost(limit) => format!("at most {limit} {unit}"),
            Self::RatioAtMost(limit) => format!("at most {limit:.2}x"),
            Self::RatioAtLeast(limit) => format!("at least {limit:.2}x"),
        }
    }
}

/// Three digits that count, and the spread below.
fn shown(spread: Option<Spread>, unit: &str) -> String {
    let Some(Spread { median, min, max }) = spread else { return "-".to_owned() };
    let digits = match median.abs() {
        it if it >= 100.0 => 0,
        it if it >= 10.0 => 1,
        it if it >= 0.1 => 2,
        _ => 3,
    };
    let space = if unit == "x" { "" } else { " " };
    let range = match min == max {
        true => String::new(),
        false => format!("<br>*{min:.digits$} to {max:.digits$}*"),
    };
    format!("{median:.digits$}{space}{unit}{range}")
}

pub(crate) fn table(figures: &[Figure]) -> String {
    let mut text =
        "| | Headwater | beside it | ratio | wanted | | |\n|---|---:|---:|---:|---|---|---|\n"
            .to_owned();
    figures.iter().for_each(|figure| text += &figure.row());
    text
}
