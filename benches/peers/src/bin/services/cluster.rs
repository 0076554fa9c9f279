//! Throw-away PostgreSQL servers, on Unix sockets: no port is taken, nobody else reaches them.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, geteuid, kill_process};
use tokio::runtime::{Builder, Runtime};
use tokio_postgres::{Client, NoTls};

use crate::Outcome;

const PATIENCE: Duration = Duration::from_secs(30);
const USER: &str = "shop";
/// PostgreSQL refuses to run as root.
const SYSTEM_USER: &str = "postgres";
/// Names the socket; there is no TCP.
const PORT: u16 = 5432;
/// What both are started with, besides the durability that is the default (fsync, synchronous_commit).
const SETTINGS: [&str; 5] = [
    "listen_addresses=",
    "wal_level=logical",
    "max_prepared_transactions=200",
    "max_connections=100",
    "log_min_messages=fatal",
];

/// Why there can be none here, if so.
pub(crate) fn missing() -> Option<String> {
    for program in ["postgres", "initdb"] {
        if find(program).is_none() {
            return Some(format!("{program} was not found"));
        }
    }
    if geteuid().is_root() {
        let run = command("true").and_then(|mut command| Ok(command.status()?));
        if !run.is_ok_and(|status| status.success()) {
            return Some(format!("root can't run programs as the user {SYSTEM_USER} (setpriv)"));
        }
    }
    None
}

/// On the path, or where Debian puts it.
fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let debian = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let debian = debian.map(|version| version.path().join("bin"));
    let mut candidates = std::env::split_paths(&path).chain(debian).map(|dir| dir.join(program));
    candidates.find(|candidate| candidate.is_file())
}

/// A program as a user that PostgreSQL accepts.
fn command(program: &str) -> Outcome<Command> {
    let path = find(program).ok_or_else(|| format!("{program} was not found"))?;
    if !geteuid().is_root() {
        return Ok(Command::new(path));
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid", SYSTEM_USER, "--regid", SYSTEM_USER, "--clear-groups"]);
    command.args(["--pdeathsig", "QUIT"]).arg(path); // it doesn't outlive us, however we end
    Ok(command)
}

pub(crate) struct Cluster {
    data: PathBuf,
    sockets: tempfile::TempDir,
    /// `None` while it is down.
    server: Option<Child>,
}

impl Cluster {
    pub(crate) fn start(dir: &Path) -> Outcome<Self> {
        fs::create_dir_all(dir)?;
        let sockets = tempfile::Builder::new().prefix("hw-pg-").tempdir()?; // the path must be short
        owned(dir)?;
        owned(sockets.path())?;
        let data = dir.join("data");
        let log = fs::File::create(dir.join("initdb.log"))?;
        let made = command("initdb")?
            .args(["-U", USER, "-A", "trust", "-E", "UTF8", "--locale", "C", "-D"])
            .arg(&data)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .current_dir("/")
            .status()?;
        if !made.success() {
            let log = fs::read_to_string(dir.join("initdb.log"))?;
            return Err(format!("initdb failed: {}", log.trim()).into());
        }
        let mut cluster = Self { data, sockets, server: None };
        cluster.resume()?;
        Ok(cluster)
    }

    pub(crate) fn socket_dir(&self) -> &Path {
        self.sockets.path()
    }

    /// Starts it again, and waits until it answers. It ends with the thread that calls this.
    pub(crate) fn resume(&mut self) -> Outcome<()> {
        let mut command = command("postgres")?;
        command.arg("-D").arg(&self.data).arg("-k").arg(self.socket_dir()).current_dir("/");
        for setting in SETTINGS {
            command.args(["-c", setting]);
        }
        let log = self.data.with_file_name("server.log");
        let log = fs::OpenOptions::new().create(true).append(true).open(log)?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        self.server = Some(command.spawn()?);
        let began = Instant::now();
        while let Err(error) = Session::open(self.socket_dir()) {
            if began.elapsed() > PATIENCE {
                return Err(format!("PostgreSQL doesn't start: {error}").into());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// As if it had crashed: nothing is written that wasn't written.
    pub(crate) fn crash(&mut self) -> Outcome<()> {
        let Some(mut server) = self.server.take() else { return Ok(()) };
        let pid = Pid::from_raw(i32::try_from(server.id())?).ok_or("no process")?;
        kill_process(pid, Signal::QUIT)?;
        server.wait()?;
        Ok(())
    }

    pub(crate) fn open(&self) -> Outcome<Session> {
        Session::open(self.socket_dir())
    }

    pub(crate) fn version() -> Outcome<String> {
        let output = command("postgres")?.arg("--version").output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok(text
            .split_whitespace()
            .take(3)
            .collect::<Vec<_>>()
            .join(" ")
            .replace("postgres (PostgreSQL)", "PostgreSQL"))
    }

    /// As libpq wants it.
    pub(crate) fn connection_string(&self) -> String {
        let host = self.socket_dir().display();
        format!("host={host} port={PORT} user={USER} dbname=postgres")
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        drop(self.crash());
    }
}

fn owned(dir: &Path) -> Outcome<()> {
    if !geteuid().is_root() {
        return Ok(());
    }
    let id = |flag: &str| -> Outcome<u32> {
        let output = Command::new("id").args([flag, SYSTEM_USER]).output()?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().parse()?)
    };
    Ok(chown(dir, Some(id("-u")?), Some(id("-g")?))?)
}

/// A connection, driven by whoever waits for an answer.
pub(crate) struct Session {
    pub(crate) client: Client,
    pub(crate) runtime: Runtime,
}

impl Session {
    pub(crate) fn open(socket_dir: &Path) -> Outcome<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let client = runtime.block_on(connect(socket_dir))?;
        Ok(Self { client, runtime })
    }

    pub(crate) fn run(&self, statements: &str) -> Outcome<()> {
        Ok(self.runtime.block_on(self.client.batch_execute(statements))?)
    }

    /// The first column of all rows.
    pub(crate) fn texts(&self, query: &str) -> Outcome<Vec<String>> {
        let rows = self.runtime.block_on(self.client.query(query, &[]))?;
        Ok(rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?)
    }

    pub(crate) fn number(&self, query: &str) -> Outcome<i64> {
        let row = self.runtime.block_on(self.client.query_one(query, &[]))?;
        Ok(row.try_get(0)?)
    }
}

/// Within a runtime of one thread, which drives the connection too.
pub(crate) async fn connect(socket_dir: &Path) -> Result<Client, tokio_postgres::Error> {
    let mut config = tokio_postgres::Config::new();
    config.host_path(socket_dir).port(PORT).user(USER).dbname("postgres");
    let (client, connection) = config.connect(NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

/// For the verbs that are called with it.
pub(crate) fn argument(path: &Path) -> &OsStr {
    path.as_os_str()
}
