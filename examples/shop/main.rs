//! Two services and their demonstration: `orders` owns the purchases, `customers` follows it by address.
//!
//! `cargo run --features cli --example shop -- demo` starts both, kills each of them while it works, and compares every
//! answer with a plain recount of the input file. `shop admin …` is the command line of headwater with the code of
//! these views: `shop admin view scan DIR totals`.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program for people to look at")]

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use headwater::cli::Cli;

mod customers;
mod demo;
mod events;
mod orders;
mod views;

const USAGE: &str = "usage: shop demo [DIR] | shop orders DIR LISTEN INPUT | shop customers DIR ORDERS | shop admin …";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let Some(("admin", rest)) = args.split_first().map(|(verb, rest)| (verb.as_str(), rest)) {
        return admin(rest);
    }
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let outcome = match args[..] {
        ["orders", dir, listen, input] => orders::run(Path::new(dir), listen, Path::new(input)),
        ["customers", dir, orders] => customers::run(Path::new(dir), orders),
        ["demo"] => demo::run(None),
        ["demo", dir] => demo::run(Some(PathBuf::from(dir))),
        _ => Err(USAGE.into()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("shop {}: {}", args.first().unwrap_or(&""), explain(&*error));
            ExitCode::FAILURE
        }
    }
}

/// All that `headwater` can do, and what takes the code of our views.
fn admin(args: &[String]) -> ExitCode {
    let called = "shop admin".to_owned();
    let args = std::iter::once(&called).chain(args);
    Cli::new().view(views::Totals).view(views::ByMonth).run_from(args)
}

/// An error with its causes.
fn explain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}
