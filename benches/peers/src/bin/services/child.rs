//! This program again, as a process of its own that takes lines and says lines.

use std::ffi::OsStr;
use std::io::{BufRead as _, BufReader, Lines, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use crate::Outcome;

pub(crate) struct Service {
    child: Child,
    input: ChildStdin,
    /// `None` once somebody else listens.
    output: Option<Lines<BufReader<ChildStdout>>>,
}

impl Service {
    pub(crate) fn start(args: &[&OsStr]) -> Outcome<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let input = child.stdin.take().ok_or("no standard input")?;
        let output = BufReader::new(child.stdout.take().ok_or("no standard output")?).lines();
        Ok(Self { child, input, output: Some(output) })
    }

    pub(crate) fn say(&mut self, line: &str) -> Outcome<()> {
        Ok(writeln!(self.input, "{line}")?)
    }

    /// The words of the next line.
    pub(crate) fn hear(&mut self) -> Outcome<Vec<String>> {
        let output = self.output.as_mut().ok_or("somebody else listens")?;
        let line = output.next().ok_or("a service ended unexpectedly")??;
        Ok(line.split(' ').map(str::to_owned).collect())
    }

    /// Everything that is said from here on.
    pub(crate) fn listen(&mut self) -> Outcome<Lines<BufReader<ChildStdout>>> {
        Ok(self.output.take().ok_or("somebody else listens")?)
    }

    /// SIGKILL: no handler runs, nothing is flushed.
    pub(crate) fn kill(mut self) -> Outcome<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
