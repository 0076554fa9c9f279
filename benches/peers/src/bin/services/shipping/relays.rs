//! Many relays of one origin, in a process of their own.
//!
//! It says `relaying ADDRESS ...`, one for each, then takes `peers` (says `peers STREAMING`, over all).

use std::ffi::OsStr;
use std::io::{self, BufRead as _};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use headwater::fs::Fs;
use headwater::fs::os::OsFs;
use headwater::shipping::{
    FollowOptions, Mirror, ServeOptions, Served, Server, follow, serve as serve_at,
};

use super::PATIENCE;
use super::origin::{self, CONNECTIONS_MAX, Door};
use crate::Outcome;
use crate::child::Service;

pub(crate) fn serve(dir: &Path, origin: &str, count: usize) -> Outcome<()> {
    let relays = (0..count)
        .map(|number| relay(&dir.join(number.to_string()), origin))
        .collect::<Outcome<Vec<_>>>()?;
    let mut said = "relaying".to_owned();
    for (mirror, server) in &relays {
        mirror.wait_caught_up(PATIENCE)?;
        said = format!("{said} {}", server.local_addr());
    }
    origin::say(&said)?;
    for line in io::stdin().lock().lines() {
        match line?.as_str() {
            "peers" => {
                let streaming: usize = relays.iter().map(|(_, it)| origin::streaming(it)).sum();
                origin::say(&format!("peers {streaming}"))?;
            }
            other => return Err(format!("what is {other:?}?").into()),
        }
    }
    Ok(())
}

fn relay(dir: &Path, origin: &str) -> Outcome<(Mirror, Server)> {
    let disk: Arc<dyn Fs> = Arc::new(OsFs);
    let mirror = follow(disk, dir, origin, FollowOptions::default())?;
    let options = ServeOptions { connections_max: CONNECTIONS_MAX, ..ServeOptions::default() };
    let server = serve_at(Served::from(&mirror), "127.0.0.1:0", options)?;
    Ok((mirror, server))
}

/// The other end of it.
pub(super) struct Relays {
    service: Service,
    pub(super) doors: Vec<Door>,
}

impl Relays {
    pub(super) fn start(dir: &Path, origin: SocketAddr, count: usize) -> Outcome<Self> {
        let (origin, count) = (origin.to_string(), count.to_string());
        let args = [OsStr::new("relays"), dir.as_os_str(), OsStr::new(&origin), OsStr::new(&count)];
        Self::run(&args, false)
    }

    /// The machine alone in their place.
    pub(super) fn start_bare(
        dir: &Path,
        origin: SocketAddr,
        count: usize,
        message_bytes: u64,
    ) -> Outcome<Self> {
        let [origin, count, bytes] =
            [origin.to_string(), count.to_string(), message_bytes.to_string()];
        let args = ["bare-relays", &origin, &count, &bytes].map(OsStr::new);
        let [verb, origin, count, bytes] = args;
        Self::run(&[verb, dir.as_os_str(), origin, count, bytes], true)
    }

    fn run(args: &[&OsStr], is_bare: bool) -> Outcome<Self> {
        let mut service = Service::start(args)?;
        let said = service.hear()?;
        let door = |it: &String| Ok(Door { address: it.parse()?, tls: None, is_bare });
        Ok(Self { doors: said.iter().skip(1).map(door).collect::<Outcome<_>>()?, service })
    }

    pub(super) fn wait_streaming(&mut self, peers: usize) -> Outcome<()> {
        origin::wait_peers(&mut self.service, |streaming| streaming >= peers as u64)
    }
}
