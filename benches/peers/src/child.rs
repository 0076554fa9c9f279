//! Starting a worker, hearing its result, killing it.

use std::io::{BufRead, BufReader, Read as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::Outcome;
use crate::engine::Peer;
use crate::worker::{READY, SAYS, Sample, Task};

/// How long a worker may take before it counts as stuck.
const PATIENCE: Duration = Duration::from_secs(60);

/// A worker, with the program that runs it (a tracer), if any.
pub(crate) struct Worker {
    child: Child,
    /// Shared with the pipe's reader.
    said: thread::JoinHandle<Option<String>>,
    stderr: thread::JoinHandle<String>,
    ready: std::sync::mpsc::Receiver<()>,
}

impl Worker {
    pub(crate) fn start(tracer: &[&str], peer: &Peer, dir: &Path, task: Task) -> Outcome<Self> {
        let this = std::env::current_exe()?;
        let mut command = match tracer.split_first() {
            Some((program, arguments)) => {
                let mut command = Command::new(program);
                command.args(arguments).arg(this);
                command
            }
            None => Command::new(this),
        };
        let mut child = command
            .args(["worker", peer.name])
            .arg(dir)
            .arg(serde_json::to_string(&task)?)
            .env("WALRUS_QUIET", "1")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let stdout = child.stdout.take().ok_or("no pipe")?;
        let stderr = child.stderr.take().ok_or("no pipe")?;
        let (tell, ready) = std::sync::mpsc::channel();
        let said = thread::spawn(move || {
            let mut last = None;
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                match line.strip_prefix(SAYS) {
                    Some(READY) => tell.send(()).unwrap_or_default(),
                    Some(said) => last = Some(said.to_owned()),
                    None => {}
                }
            }
            last
        });
        let stderr = thread::spawn(move || {
            let mut text = Vec::new();
            BufReader::new(stderr).read_to_end(&mut text).unwrap_or_default();
            String::from_utf8_lossy(&text).into_owned()
        });
        Ok(Self { child, said, stderr, ready })
    }

    /// Waits for the result.
    pub(crate) fn finish(mut self) -> Outcome<Sample> {
        let began = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break Some(status);
            }
            if began.elapsed() > PATIENCE {
                self.child.kill()?;
                self.child.wait()?;
                break None;
            }
            thread::sleep(Duration::from_millis(2));
        };
        let said = self.said.join().map_err(|_| "a reader panicked")?;
        let stderr = self.stderr.join().map_err(|_| "a reader panicked")?;
        match (status, said) {
            (Some(status), Some(said)) if status.success() => Ok(serde_json::from_str(&said)?),
            (Some(status), _) => {
                let last = stderr.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("");
                Err(format!("{status}: {last}").into())
            }
            (None, _) => Err(format!("stuck for {} s", PATIENCE.as_secs()).into()),
        }
    }

    /// Kills it (SIGKILL) once it has said that it is ready.
    pub(crate) fn kill_when_ready(mut self) -> Outcome<()> {
        let ready = self.ready.recv_timeout(PATIENCE);
        self.child.kill()?;
        self.child.wait()?;
        self.said.join().map_err(|_| "a reader panicked")?;
        let stderr = self.stderr.join().map_err(|_| "a reader panicked")?;
        Ok(ready.map_err(|_| stderr)?)
    }
}

/// Does a task in a process of its own.
pub(crate) fn perform(peer: &Peer, dir: &Path, task: Task) -> Outcome<Sample> {
    Worker::start(&[], peer, dir, task)?.finish()
}
