//! What is refused, with which words, and what the error points at.

use proc_macro2::TokenStream;
use std::str::FromStr;

use crate::expand;

/// Each error: its text, and what it points at.
#[track_caller]
fn errors(code: &str) -> Vec<(String, String)> {
    let error = expand(TokenStream::from_str(code).unwrap()).expect_err("it is refused");
    let at = |error: &syn::Error| error.span().source_text().unwrap_or_default();
    error.into_iter().map(|error| (error.to_string(), at(&error))).collect()
}

#[track_caller]
fn assert_refused(code: &str, text: &str, at: &str) {
    let found = errors(code);
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].0.contains(text), "{found:?}");
    assert_eq!(found[0].1, at, "{found:?}");
}

/// An enum with these attributes of its only variant.
fn variant(attributes: &str) -> String {
    format!("enum E {{ #[event({attributes})] A(u64) }}")
}

#[test]
fn raising_a_version_without_an_upcaster_is_refused_at_the_version() {
    let code = variant(r#"name = "a", version = 3, upcast(2 = f)"#);
    assert_refused(&code, r#"nothing reads version 1 of "a""#, "3");
    assert_refused(&code, "upcast(1 = function)", "3");
    let code = variant(r#"name = "a", version = 3, upcast(1 = f)"#);
    assert_refused(&code, r#"nothing reads version 2 of "a""#, "3");
    let code = variant(r#"name = "a", version = 4000000000"#);
    assert_refused(&code, "version 1", "4000000000");
}

#[test]
fn every_older_version_may_be_read_by_an_upcaster_a_variant_or_not_have_been() {
    for code in [
        variant(r#"name = "a", version = 3, upcast(1 = f, 2 = m::g)"#),
        variant(r#"name = "a", version = 3, upcast(1 = f,), upcast(2 = g),"#),
        variant(r#"name = "a", version = 3, since = 2, upcast(2 = g)"#),
        variant(r#"name = "a", version = 3, since = 3"#),
        variant(r#"name = "a", version = 1, upcast("b", 1 = f, 7 = f)"#),
        r#"enum E { #[event(name = "a", version = 1)] A, #[event(name = "a", version = 2)] B(u8) }"#
            .to_owned(),
        r#"#[event(upcast("b", 1 = f), codec = json)]
           enum E { #[event(name = "a")] #[event(version = 1)] A { x: u8, y: String }, }"#
            .to_owned(),
    ] {
        let expanded = expand(TokenStream::from_str(&code).unwrap()).unwrap();
        assert!(expanded.to_string().contains("Event for E"), "{expanded}");
    }
}

#[test]
fn two_readers_of_one_kind_are_refused() {
    let twice =
        r#"enum E { #[event(name = "a", version = 1)] A, #[event(name = "a", version = 1)] B }"#;
    assert_refused(twice, r#""a" is there twice in version 1"#, r#""a""#);
    let code = variant(r#"name = "a", version = 2, upcast(1 = f, 1 = g)"#);
    assert_refused(&code, r#"what reads version 1 of "a" is there twice"#, "1");
    let code = variant(r#"name = "a", version = 2, upcast(1 = f, 2 = g)"#);
    assert_refused(&code, r#"what reads version 2 of "a" is there twice"#, "2");
    let code = variant(r#"name = "a", version = 2, upcast(1 = f, 3 = g)"#);
    assert_refused(&code, r#"version 3 of "a" is newer than what is written"#, "3");
}

#[test]
fn names_and_versions_are_needed_and_valid() {
    assert_refused("enum E { A(u64) }", "under which name and version it is stored", "A");
    assert_refused(&variant(r#"name = "a""#), "under which name and version", "A");
    assert_refused(&variant("version = 1"), "under which name and version", "A");
    assert_refused(&variant(r#"name = "", version = 1"#), "the name is empty", r#""""#);
    assert_refused(&variant(r#"name = "$a", version = 1"#), "are reserved", r#""$a""#);
    assert_refused(&variant(r#"name = "a\n", version = 1"#), "control character", r#""a\n""#);
    let long = format!("\"{}\"", "x".repeat(256));
    assert_refused(&variant(&format!("name = {long}, version = 1")), "longer than 255", &long);
    assert_refused(&variant(r#"name = "a", version = 0"#), "versions begin with 1", "0");
    assert_refused(&variant(r#"name = "a", version = 4294967296"#), "too large", "4294967296");
}

#[test]
fn what_is_not_understood_is_refused_where_it_stands() {
    let code = variant(r#"name = "a", version = 1, colour = "red""#);
    assert_refused(&code, r#"no such thing as "colour""#, "colour");
    let code = variant(r#"name = "a", version = 1, codec = xml"#);
    assert_refused(&code, "expected `bincode` or `json`", "xml");
    let code = variant(r#"name = "a", name = "b", version = 1"#);
    assert_refused(&code, "`name` is there twice", "name");
    let code = variant(r#"name = "a", version = 2, upcast(1 = 7)"#);
    assert_refused(&code, "expected the path of a function", "7");
    let code = variant(r#"name = "a", version = 1, upcast("b")"#);
    assert!(errors(&code)[0].0.contains("what becomes of each old version"));
    let code = variant(r#"name = "a", version = 1, crate = x"#);
    assert_refused(&code, "`crate` belongs to the enum", "crate");
    let code = r#"#[event(name = "a")] enum E { A }"#;
    assert_refused(code, "`name` belongs to a variant", "name");
    let code = r#"#[event(upcast(1 = f))] enum E { A }"#;
    assert_refused(code, "say of which type", "upcast");
}

#[test]
fn only_enums_of_payloads_are_events() {
    assert_refused("struct S { a: u64 }", "the variants of an enum", "S");
    assert_refused("enum E {}", "there is no event", "E");
    assert_refused("enum E<T> { A(T) }", "no generic parameters", "T");
    let code = r#"enum E { #[event(name = "a", version = 1)] A(u8, u8) }"#;
    assert_refused(code, "expected one field", "(u8, u8)");
    let code = r#"enum E { #[event(name = "a", version = 1)] A { #[serde(skip)] x: u8 } }"#;
    assert_refused(code, "a struct of their own", "#[serde(skip)]");
}

#[test]
fn all_variants_errors_are_told_at_once() {
    assert_eq!(errors("enum E { A, B, C }").len(), 3);
}
