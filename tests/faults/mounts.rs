//! File systems of our own, in files, and what can be done to them that needs no kernel module.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{ErrorKind, Seek, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::FallocateFlags;

use crate::Stop;

/// Of all file systems that are made here.
pub(crate) const BLOCK_BYTES: usize = 4096;

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

    fn image_megabytes(self) -> u64 {
        match self {
            Self::Ext4 => 32,
            Self::Xfs => 64,
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
    match Command::new(program)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
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
        let image = File::create(&file).and_then(|file| file.set_len(bytes));
        image.map_err(|error| format!("{}: {error}", file.display()))?;
        std::fs::create_dir_all(&point).map_err(|error| error.to_string())?;
        let path = file.to_str().unwrap_or_default();
        match kind {
            Kind::Ext4 => tool("mkfs.ext4", &["-q", "-F", "-b", "4096", path])?,
            // Later versions refuse to make small ones, unless they are told that it is for a test.
            Kind::Xfs => tool("mkfs.xfs", &["-q", "-f", "--unsupported", path])
                .or_else(|_| tool("mkfs.xfs", &["-q", "-f", path]))?,
        };
        Ok(Self { kind, file, point })
    }

    /// Mounts it; the loop device goes with the mount.
    pub(crate) fn mount(&self) -> Result<Mount, String> {
        tool(
            "mount",
            &[OsStr::new("-o"), OsStr::new("loop"), self.file.as_ref(), self.point.as_ref()],
        )?;
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

// ------------------------------------------------------------------------------- a device that has no space

/// A thinly provisioned device that has run out of space: an image in a memory file system without a free
/// page, from which the pages of some blocks were taken. Writing one of those fails, however often.
#[derive(Debug)]
pub(crate) struct Thin {
    // Declared in the order in which they must go.
    ballast: File,
    image: Image,
    _memory: Mount,
}

impl Thin {
    /// A copy of an image, with pages for all of it.
    pub(crate) fn copy_of(image: &Image) -> Result<Self, String> {
        let io = |error: std::io::Error| error.to_string();
        let len = std::fs::metadata(&image.file).map_err(io)?.len();
        let memory = Mount::tmpfs(&image.file.with_extension("tmpfs"), len + (1 << 20), 16)?;
        let file = memory.point.join("image");
        tool("cp", &["--sparse=never".as_ref(), image.file.as_os_str(), file.as_os_str()])?;
        let ballast = File::create(memory.point.join("ballast")).map_err(io)?;
        let image = Image { kind: image.kind, file, point: image.point.clone() };
        Ok(Self { ballast, image, _memory: memory })
    }

    pub(crate) fn file(&self) -> &Path {
        &self.image.file
    }

    pub(crate) fn mount(&self) -> Result<Mount, String> {
        let file = self.image.file.to_str().unwrap_or_default();
        let device = tool("losetup", &["--find", "--show", file])?.trim().to_owned();
        let mounted = self.mount_device(&device);
        // Goes with the mount.
        let detached = tool("losetup", &["--detach", &device]);
        let mount = mounted?;
        detached.map(|_| mount)
    }

    /// Requests of one block: a larger one that fails in its middle would count as done.
    fn mount_device(&self, device: &str) -> Result<Mount, String> {
        let name = device.trim_start_matches("/dev/");
        let queue = format!("/sys/block/{name}/queue/max_sectors_kb");
        std::fs::write(&queue, "4").map_err(|error| format!("{queue}: {error}"))?;
        tool("mount", &[OsStr::new(device), self.image.point.as_ref()])?;
        Ok(Mount { point: self.image.point.clone() })
    }

    /// From now on, writing these blocks fails; those that hold anything but zeros are spared. How many
    /// are affected.
    pub(crate) fn strike(&mut self, blocks: &[u64]) -> std::io::Result<usize> {
        let file = File::options().read(true).write(true).open(&self.image.file)?;
        let mut struck = 0;
        for block in blocks {
            let mut bytes = [0; BLOCK_BYTES];
            file.read_exact_at(&mut bytes, block * BLOCK_BYTES as u64)?;
            if bytes == [0; BLOCK_BYTES] {
                let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                let (at, len) = (block * BLOCK_BYTES as u64, BLOCK_BYTES as u64);
                rustix::fs::fallocate(&file, hole, at, len)?;
                struck += 1;
            }
        }
        loop {
            match self.ballast.write_all(&[1; BLOCK_BYTES]) {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::StorageFull => return Ok(struck),
                Err(error) => return Err(error),
            }
        }
    }

    /// There is space again: all blocks can be written.
    pub(crate) fn heal(&mut self) -> std::io::Result<()> {
        self.ballast.set_len(0)?;
        self.ballast.rewind()
    }
}
