//! `headwater bootstrap`: makes a mirror of a backup, or of a view's base, before its service follows.

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use signal_hook::consts::{SIGINT, SIGTERM};

use super::failure::Failure;
use super::target;
use crate::fs::{Fs, os::OsFs};
use crate::journal::{self, Watched};
use crate::{OpenError, RestoreError};

/// How often it is looked how far it is.
const TICK: Duration = Duration::from_millis(50);

/// What `bootstrap` is told.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A store
    store: PathBuf,
    /// The mirror's name in it
    name: String,
    /// The directory of a backup, or of the base of a view
    backup: PathBuf,
    /// Prints JSON, with the fields of docs/cli.md
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let fs: Arc<dyn Fs> = Arc::new(OsFs);
    if !crate::store::is_mirror_name(&args.name) {
        let (option, reason) = ("mirror name", crate::store::MIRROR_NAME);
        return Err(OpenError::InvalidOption { option, reason }.into());
    }
    let dir = args.store.join("mirrors").join(&args.name).join("journal");
    if journal::is_begun(&*fs, &dir) {
        return Err(RestoreError::NotEmpty { path: dir }.into());
    }
    copy(&fs, args, &dir)?;
    let (mirror, _) = target::open(&dir)?;
    let (start, end) = (mirror.start(), mirror.end());
    let mut out = io::stdout().lock();
    if args.json {
        let value = json!({
            "journal": end.journal.to_string(),
            "node": mirror.node().to_string(),
            "first_position": start.position.get(),
            "end_position": end.position.get(),
            "end_offset": end.offset,
            "chain": end.chain.to_string(),
        });
        writeln!(out, "{value}")?;
    } else {
        let (first, position, chain) = (start.position, end.position, end.chain);
        writeln!(out, "mirror {} holds positions {first}..{position}, chain {chain}", args.name)?;
    }
    Ok(out.flush()?)
}

/// Copies, and shows how far it is; Ctrl-C ends it, and the same command goes on.
fn copy(fs: &Arc<dyn Fs>, args: &Args, dir: &std::path::Path) -> Result<(), Failure> {
    let interrupted = Arc::new(AtomicBool::new(false));
    let mut signals = Vec::new();
    for signal in [SIGINT, SIGTERM] {
        signals.push(signal_hook::flag::register(signal, Arc::clone(&interrupted))?);
    }
    let watched = Watched::default();
    let bar = io::stderr().is_terminal().then(|| {
        let style =
            ProgressStyle::with_template("[{wide_bar}] {bytes} of {total_bytes}, {eta} left");
        let bar = ProgressBar::new(1);
        style.into_iter().for_each(|style| bar.set_style(style.progress_chars("=> ")));
        bar
    });
    let copied = thread::scope(|scope| {
        let copying =
            scope.spawn(|| journal::begin_mirror(fs, (&args.backup, None), dir, &watched));
        while !copying.is_finished() {
            if interrupted.load(Ordering::Relaxed) {
                watched.cancel();
            }
            let (bytes, bytes_total) = watched.bytes();
            bar.iter().for_each(|bar| {
                bar.set_length(bytes_total.max(1));
                bar.set_position(bytes);
            });
            thread::sleep(TICK);
        }
        copying.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    bar.iter().for_each(ProgressBar::finish_and_clear);
    signals.into_iter().for_each(|signal| {
        signal_hook::low_level::unregister(signal);
    });
    Ok(copied?)
}
