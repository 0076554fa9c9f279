//! File systems of our own, in files, and what can be done to them that needs no kernel module.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::Stop;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Ext4,
    Xfs,
}

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
        }
    }

    /// Sparse; XFS refuses less.
    fn image_megabytes(self) -> u64 {
        match self {
            Self::Ext4 => 32,
            Self::Xfs => 300,
        }
    }
}

/// Runs a program; its output, or why it failed.
pub(crate) fn tool<S: AsRef<OsStr>>(program: &str, args: &[S]) -> Result<String, String> {
    match Command::new(program).args(args).stdin(Stdio::null()).output() {
        Ok(ran) if ran.status.success() => Ok(String::from_utf8_lossy(&ran.stdout).into_owned()),
        Ok(ran) => {
            let said = String::from_utf8_lossy(&ran.stderr).trim().replace('\n', "; ");
            Err(format!("{program}: {said}"))
        }
        Err(error) => Err(format!("{program}: {error}")),
    }
}

/// Skips where there is no such program.
pub(crate) fn need(program: &str) -> Result<(), Stop> {
    match Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status()
    {
        Ok(_) => Ok(()),
        Err(error) => Err(Stop::Skipped(format!("{program}: {error}"))),
    }
}

/// Whether file systems can be mounted here, tried; `namespace` is [`NAMESPACE`](crate::NAMESPACE).
pub(crate) fn available(scratch: &Path, namespace: Option<&str>) -> Result<(), String> {
    if namespace.is_none() {
        return Err("needs root and a mount namespace of its own (unshare --mount)".into());
    }
    let image = Image::make(scratch, "try", Kind::Ext4)?;
    image.mount().map(drop)
}

/// A file with a file system in it.
#[derive(Debug)]
pub(crate) struct Image {
    kind: Kind,
    pub(crate) file: PathBuf,
    point: PathBuf,
}

impl Image {
    pub(crate) fn make(dir: &Path, name: &str, kind: Kind) -> Result<Self, String> {
        Self::make_sized(dir, name, kind, kind.image_megabytes() << 20)
    }

    pub(crate) fn make_sized(
        dir: &Path,
        name: &str,
        kind: Kind,
        bytes: u64,
    ) -> Result<Self, String> {
        let (file, point) = (dir.join(format!("{name}.img")), dir.join(format!("{name}.mnt")));
        let image = std::fs::File::create(&file).and_then(|file| file.set_len(bytes));
        image.map_err(|error| format!("{}: {error}", file.display()))?;
        std::fs::create_dir_all(&point).map_err(|error| error.to_string())?;
        let path = file.to_str().unwrap_or_default();
        match kind {
            Kind::Ext4 => tool("mkfs.ext4", &["-q", "-F", "-b", "4096", path])?,
            Kind::Xfs => tool("mkfs.xfs", &["-q", "-f", path])?,
        };
        Ok(Self { kind, file, point })
    }

    /// The place of another image of this kind, which isn't made yet.
    pub(crate) fn beside(&self, name: &str) -> Self {
        let file = self.file.with_file_name(format!("{name}.img"));
        Self { kind: self.kind, file, point: self.point.clone() }
    }

    /// Mounts it; the loop device goes with the mount.
    pub(crate) fn mount(&self) -> Result<Mount, String> {
        tool("mount", &[OsStr::new("-o"), OsStr::new("loop"), self.file.as_ref(), self.point.as_ref()])?;
        Ok(Mount { point: self.point.clone() })
    }
}

/// A mounted file system; unmounted when dropped.
#[derive(Debug)]
pub(crate) struct Mount {
    pub(crate) point: PathBuf,
}

impl Mount {
    /// A file system in memory of so much space and so many files.
    pub(crate) fn tmpfs(point: &Path, bytes: u64, inodes: u64) -> Result<Self, String> {
        std::fs::create_dir_all(point).map_err(|error| error.to_string())?;
        let options = format!("size={bytes},nr_inodes={inodes}");
        let args = ["-t", "tmpfs", "-o", &options, "tmpfs", point.to_str().unwrap_or_default()];
        tool("mount", &args)?;
        Ok(Self { point: point.to_owned() })
    }

    /// The power fails: nothing more reaches the disk, not even what the file system has in its own log.
    /// What is running goes on and gets errors.
    pub(crate) fn cut(&self) -> Result<(), String> {
        let point = self.point.to_str().unwrap_or_default();
        tool("xfs_io", &["-x", "-c", "shutdown", point]).or_else(|no_xfs_io| {
            // EXT4_IOC_SHUTDOWN and XFS_IOC_GOINGDOWN, without flushing the log.
            let ioctl = "import fcntl, os, sys; \
                         fcntl.ioctl(os.open(sys.argv[1], 0), 0x8004587d, b'\\2\\0\\0\\0')";
            tool("python3", &["-c", ioctl, point])
                .map_err(|no_python| format!("{no_xfs_io}; {no_python}"))
        })?;
        Ok(())
    }

    /// Unmounts it; the next mount reads the disk.
    pub(crate) fn unmount(self) -> Result<(), String> {
        let unmounted = tool("umount", &[&self.point]);
        if unmounted.is_ok() {
            std::mem::forget(self);
        }
        unmounted.map(drop)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if tool("umount", &[&self.point]).is_err() {
            drop(tool("umount", &[OsStr::new("--lazy"), self.point.as_ref()]));
        }
    }
}

// ------------------------------------------------------------------------------------- a device with faults

/// How a sector fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fails {
    Once,
    Always,
}

/// Serves an image as a block device on which writes to some sectors can be made to fail.
#[derive(Debug)]
pub(crate) struct Faulty {
    daemon: Child,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
    point: PathBuf,
}

impl Faulty {
    pub(crate) fn serve(image: &Image) -> Result<Self, String> {
        let file = image.file.to_str().unwrap_or_default();
        let point = image.file.with_extension("export");
        std::fs::write(&point, []).map_err(|error| error.to_string())?;
        let fuse = format!(
            "type=fuse,id=export,node-name=switch,mountpoint={},writable=on",
            point.display()
        );
        // Ends with this process, however that ends.
        let mut daemon = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "qemu-storage-daemon"])
            .args(["--chardev", "stdio,id=commands", "--monitor", "chardev=commands"])
            .args(["--blockdev", &format!("driver=file,node-name=file,filename={file}")])
            .args(["--blockdev", "driver=raw,node-name=switch,file=file", "--export", &fuse])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("qemu-storage-daemon: {error}"))?;
        let (stdin, stdout) = (daemon.stdin.take(), daemon.stdout.take());
        let (Some(commands), Some(stdout)) = (stdin, stdout) else {
            return Err("qemu-storage-daemon has no pipes".into());
        };
        let mut served = Self { daemon, commands, answers: BufReader::new(stdout), point };
        served.answer()?; // its greeting
        served.command("qmp_capabilities", &json!({}))?;
        served.wait()?;
        Ok(served)
    }

    /// From now on, writes that touch a sector (of 512 bytes) of `sectors` fail with EIO.
    pub(crate) fn strike(
        &mut self,
        sectors: std::ops::Range<u64>,
        fails: Fails,
    ) -> Result<(), String> {
        let once = fails == Fails::Once;
        let rule = |sector| json!({"event": "none", "iotype": "write", "errno": 5, "sector": sector, "once": once});
        let rules: Vec<Value> = sectors.map(rule).collect();
        self.command(
            "blockdev-add",
            &json!({"driver": "blkdebug", "node-name": "debug", "image": "file", "inject-error": rules}),
        )?;
        let switched = json!({"driver": "raw", "node-name": "switch", "file": "debug"});
        self.command("blockdev-reopen", &json!({"options": [switched]}))
    }

    fn command(&mut self, name: &str, arguments: &Value) -> Result<(), String> {
        let command = json!({"execute": name, "arguments": arguments});
        writeln!(self.commands, "{command}").map_err(|error| error.to_string())?;
        let answer = self.answer()?;
        if answer.contains("\"error\"") { Err(answer) } else { Ok(()) }
    }

    fn answer(&mut self) -> Result<String, String> {
        let mut line = String::new();
        match self.answers.read_line(&mut line) {
            Ok(0) => Err("qemu-storage-daemon has ended".into()),
            Ok(_) => Ok(line),
            Err(error) => Err(error.to_string()),
        }
    }

    fn wait(&mut self) -> Result<(), String> {
        let until = Instant::now() + Duration::from_secs(20);
        while std::fs::metadata(&self.point).map_or(0, |export| export.len()) == 0 {
            if Instant::now() > until {
                return Err("qemu-storage-daemon serves nothing".into());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// Mounts what is served, at the image's place, past the page cache of the host: with it, the loop
    /// device would turn failed writes into successes.
    pub(crate) fn mount(&self, image: &Image) -> Result<Mount, String> {
        let args = ["--find", "--show", "--direct-io=on", self.point.to_str().unwrap_or_default()];
        let device = tool("losetup", &args)?.trim().to_owned();
        let mounted = tool("mount", &[OsStr::new(&device), image.point.as_ref()]);
        // Goes with the mount.
        let detached = tool("losetup", &["--detach", &device]);
        mounted?;
        let mount = Mount { point: image.point.clone() };
        detached?;
        Ok(mount)
    }
}

impl Drop for Faulty {
    fn drop(&mut self) {
        // TERM, so that it unmounts its export.
        drop(tool("kill", &[self.daemon.id().to_string()]));
        let until = Instant::now() + Duration::from_secs(5);
        while matches!(self.daemon.try_wait(), Ok(None)) {
            if Instant::now() > until {
                drop(self.daemon.kill());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        drop(tool("umount", &[OsStr::new("--quiet"), self.point.as_ref()]));
    }
}
