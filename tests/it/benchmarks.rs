//! How the benchmarks judge and write down what they measured.

use std::fs;

#[allow(dead_code, reason = "the benchmarks use all of it")]
#[path = "../../benches/shared/mod.rs"]
mod shared;

use shared::held::{self, Held};
use shared::page::{self, Part};
use shared::spread::Spread;

const PART: Part = Part { begin: "<!-- b -->", end: "<!-- e -->" };

#[test]
fn the_median_of_an_even_number_lies_between_the_two_in_the_middle() {
    let spread = Spread::of([4.0, 1.0, 3.0, 2.0]).unwrap();
    assert_eq!(spread, Spread { median: 2.5, min: 1.0, max: 4.0 });
}

#[test]
fn nothing_has_no_spread() {
    assert_eq!(Spread::of([f64::NAN]), None);
}

#[test]
fn a_falling_function_turns_the_spread_around() {
    let spread = Spread { median: 2.0, min: 1.0, max: 4.0 };
    assert_eq!(spread.map(|it| 4.0 / it), Spread { median: 2.0, min: 1.0, max: 4.0 });
}

#[test]
fn what_a_person_wrote_around_a_generated_part_stays() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("page.md");
    fs::write(&path, "# Mine\n<!-- b -->\nold\n<!-- e -->\nand mine\n").unwrap();
    page::write(&path, &PART, "new\n").unwrap();
    let written = fs::read_to_string(&path).unwrap();
    assert_eq!(written, "# Mine\n<!-- b -->\nnew\n<!-- e -->\nand mine\n");
}

#[test]
fn a_part_without_an_end_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("page.md");
    let broken = "# Mine\n<!-- b -->\nold\n";
    fs::write(&path, broken).unwrap();
    assert!(page::write(&path, &PART, "new").is_err());
    assert_eq!(fs::read_to_string(&path).unwrap(), broken);
}

/// The row of a target, with its figure in one of the two files.
fn row(file: &str, id: &str, value: f64, void: Option<&str>) -> String {
    let dir = tempfile::tempdir().unwrap();
    let held = Held::new(id, Spread::of([value]), "a note").unwrap();
    let held = Held { void: void.map(str::to_owned), ..held };
    let data = serde_json::json!({ "held": [held], "other": 1 });
    fs::write(dir.path().join(file), data.to_string()).unwrap();
    held::write(dir.path(), &dir.path().join("README.md")).unwrap();
    let page = fs::read_to_string(dir.path().join("README.md")).unwrap();
    let mut rows = page.lines().filter(|line| line.contains("a note"));
    let row = rows.next().unwrap().to_owned();
    assert_eq!(rows.next(), None);
    assert!(page.contains("not measured"), "the other targets");
    row
}

#[test]
fn a_limit_is_reached_or_missed_by_the_figure() {
    for (id, reached, missed) in [
        (held::ONE_WRITER, 1.10, 1.11),
        (held::BEST_PEER_64, 1.5, 1.49),
        (held::SYNCS, 1.0, 0.99), // fewer syncs than commits are worse, not better
        (held::SYNCS, 1.0, 1.01),
        (held::DIRECTORY_SYNCS, 0.0, 0.01),
        (held::BUFFERED, 3.0, 2.99),
        (held::OPEN, 100.0, 100.1),
    ] {
        assert!(row("paths.json", id, reached, None).contains("| reached |"), "{id}");
        assert!(row("peers.json", id, missed, None).contains("| **missed** |"), "{id}");
    }
}

#[test]
fn where_a_limit_says_nothing_it_is_neither_reached_nor_missed() {
    let row = row("paths.json", held::OWN_64, 3.0, Some("a quick device"));
    assert!(row.contains("says nothing here") && row.contains("a quick device; a note"), "{row}");
    assert!(!row.contains("missed") && !row.contains("reached"), "{row}");
}
