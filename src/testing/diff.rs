//! What differs between two texts, line by line, for people.

use std::fmt::Debug;

/// Texts of more lines than this are shown one behind the other.
const LINES_MAX: usize = 400;

/// Both values, one line for each that they have in common, `-` for what was expected and `+` for what came.
pub(super) fn diff(expected: &impl Debug, came: &impl Debug) -> String {
    lines(&format!("{expected:#?}"), &format!("{came:#?}"))
}

pub(super) fn lines(expected: &str, came: &str) -> String {
    let (left, right): (Vec<_>, Vec<_>) = (expected.lines().collect(), came.lines().collect());
    let mut out = String::new();
    let mut put = |mark: char, line: &str| out.extend(["  ", &mark.to_string(), " ", line, "\n"]);
    if left.len().max(right.len()) > LINES_MAX {
        left.iter().for_each(|line| put('-', line));
        right.iter().for_each(|line| put('+', line));
        return out;
    }
    // How long the longest common part is of what is left behind (i, j).
    let width = right.len() + 1;
    let mut common = vec![0_u32; (left.len() + 1) * width];
    let at = |common: &[u32], i: usize, j: usize| common.get(i * width + j).copied().unwrap_or(0);
    for i in (0..left.len()).rev() {
        for j in (0..right.len()).rev() {
            let longest = if left.get(i) == right.get(j) {
                at(&common, i + 1, j + 1) + 1
            } else {
                at(&common, i + 1, j).max(at(&common, i, j + 1))
            };
            if let Some(place) = common.get_mut(i * width + j) {
                *place = longest;
            }
        }
    }
    let (mut i, mut j) = (0, 0);
    loop {
        match (left.get(i), right.get(j)) {
            (Some(a), Some(b)) if a == b => {
                put(' ', a);
                (i, j) = (i + 1, j + 1);
            }
            (Some(a), b) if b.is_none() || at(&common, i + 1, j) >= at(&common, i, j + 1) => {
                put('-', a);
                i += 1;
            }
            (_, Some(b)) => {
                put('+', b);
                j += 1;
            }
            _ => return out,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::lines;

    #[test]
    fn lines_that_differ_are_marked() {
        assert_eq!(lines("a\nb\nc", "a\nx\nc\nd"), "    a\n  - b\n  + x\n    c\n  + d\n");
        assert_eq!(lines("", "a"), "  + a\n");
        assert_eq!(lines("a", ""), "  - a\n");
    }
}
