//! Few numbers, and how far they lie apart.

use serde::{Deserialize, Serialize};

/// The median of some rounds, the smallest and the largest.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

impl Spread {
    /// `None` if there is nothing. What isn't finite doesn't count.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().filter(|value| value.is_finite()).collect();
        values.sort_unstable_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = match values.len() % 2 {
            0 => f64::midpoint(values[middle - 1], values[middle]),
            _ => values[middle],
        };
        Some(Self { median, min, max })
    }

    /// Of something that grows or shrinks with this.
    pub(crate) fn map(self, of: impl Fn(f64) -> f64) -> Self {
        let (one, other) = (of(self.min), of(self.max));
        Self { median: of(self.median), min: one.min(other), max: one.max(other) }
    }
}
