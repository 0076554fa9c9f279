//! `headwater token`, `pin` and `access`: what is needed to say who may follow a journal.

use std::io::{self, Write};
use std::path::PathBuf;

use serde_json::json;

use super::failure::Failure;
use super::stat::plain;
use crate::shipping::security::{
    AccessList, AccessToken, Anonymous, Journals, KeyPin, Mode, Peer, Pem, Right, TokenSource,
};

/// What `token` is told.
#[derive(Debug, clap::Args)]
pub(crate) struct TokenArgs {
    /// Makes none: prints the hash of the token in this file
    #[arg(long, value_name = "FILE")]
    hash: Option<PathBuf>,
    /// Prints JSON, with the fields of docs/cli.md
    #[arg(long)]
    json: bool,
}

/// A file, and how the answer is printed.
#[derive(Debug, clap::Args)]
pub(crate) struct FileArgs {
    /// The file
    file: PathBuf,
    /// Prints JSON, with the fields of docs/cli.md
    #[arg(long)]
    json: bool,
}

pub(crate) fn token(args: &TokenArgs) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match (&args.hash, args.json) {
        (Some(file), json) => {
            let hash = TokenSource::File(file.clone()).token()?.hash();
            match json {
                true => writeln!(out, "{}", json!({ "hash": hash }))?,
                false => writeln!(out, "{hash}")?,
            }
        }
        (None, json) => {
            let token = AccessToken::generate()?;
            let (secret, hash) = (token.expose(), token.hash());
            match json {
                true => writeln!(out, "{}", json!({ "token": secret, "hash": hash }))?,
                false => writeln!(out, "token  {secret}\nhash   {hash}")?,
            }
        }
    }
    Ok(out.flush()?)
}

pub(crate) fn pin(args: &FileArgs) -> Result<(), Failure> {
    let pin = KeyPin::of(&Pem::file(&args.file))?;
    let mut out = io::stdout().lock();
    match args.json {
        true => writeln!(out, "{}", json!({ "pin": pin }))?,
        false => writeln!(out, "{pin}")?,
    }
    Ok(out.flush()?)
}

pub(crate) fn access(args: &FileArgs) -> Result<(), Failure> {
    let list = AccessList::read(&args.file)?;
    let mut out = io::stdout().lock();
    if args.json {
        let peers: Vec<&Peer> = list.peers().iter().map(AsRef::as_ref).collect();
        writeln!(out, "{}", json!({ "peers": peers }))?;
    } else {
        let mut table = plain();
        table.set_header(["peer", "is known by", "may have"]);
        for peer in list.peers() {
            let rights: Vec<_> = peer.may.iter().map(right).collect();
            table.add_row([peer.name.clone(), known_by(peer), rights.join(", ")]);
        }
        writeln!(out, "{}", table.trim_fmt())?;
    }
    Ok(out.flush()?)
}

fn known_by(peer: &Peer) -> String {
    let counted = |count: usize, one: &str| match count {
        0 => None,
        1 => Some(format!("1 {one}")),
        count => Some(format!("{count} {one}s")),
    };
    let anonymous = match peer.anonymous {
        Anonymous::No => None,
        Anonymous::Loopback => Some("nothing, on this machine".to_owned()),
        Anonymous::Anywhere => Some("nothing, from anywhere".to_owned()),
    };
    let by = [
        counted(peer.keys.len(), "key"),
        counted(peer.tokens.len(), "token"),
        counted(peer.names.len(), "name"),
        peer.any_certificate.then(|| "any certificate of an authority".to_owned()),
        anonymous,
    ];
    by.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

fn right(right: &Right) -> String {
    let journal = match right.journal {
        Journals::All => "all journals".to_owned(),
        Journals::One(journal) => journal.to_string(),
    };
    match &right.mode {
        Mode::Verbatim => journal,
        Mode::Filtered(filter) => format!("{journal}, filtered: {filter}"),
    }
}
