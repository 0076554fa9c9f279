//! What mirrors still need of a journal, kept across restarts.
//!
//! A lease moves on with what its mirror acknowledges. It is written behind that, so after a crash it may
//! hold back more than it must. Only retention reads it: a mirror without a lease is served all the same.

use crate::error::{IoContext, IoError};
use crate::format::leases::{self, LEASE_BYTES, LEASES_HEADER_BYTES, LEASES_MAX, Lease};
use crate::fs::{self, Fs, OpenMode};
use crate::journal::Journal;
use crate::journal::layout::{self, Layout};
use crate::position::JournalId;

const FILE_BYTES_MAX: u64 = (LEASES_HEADER_BYTES + LEASES_MAX * LEASE_BYTES + 4) as u64;

/// The leases of an open journal: `None` until they are asked for.
pub(crate) type Known = parking_lot::Mutex<Option<Vec<Lease>>>;

/// Reads the file; none if there is none. The inner error: it can't be understood.
fn read(
    fs: &dyn Fs,
    layout: &Layout,
    journal: JournalId,
) -> Result<Result<Vec<Lease>, crate::format::FormatError>, IoError> {
    let path = layout.file(layout::LEASES);
    let file = match fs.open(&path, OpenMode::Read) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Ok(Vec::new())),
        Err(error) => return Err(IoError::new("opening", &path, error)),
    };
    let len = file.size().context("measuring", &path)?.min(FILE_BYTES_MAX);
    let mut bytes = vec![0; len as usize];
    let read = fs::read_full_at(&*file, &mut bytes, 0).context("reading", &path)?;
    bytes.truncate(read);
    Ok(leases::decode(&bytes, journal))
}

impl Journal {
    /// What mirrors still need; `None` if the file that says it can't be read, so that nobody knows.
    pub(crate) fn leases(&self) -> Option<Vec<Lease>> {
        if let Some(known) = &*self.0.leases.lock() {
            return Some(known.clone());
        }
        let fs = self.0.files.fs();
        read(&**fs, &self.0.layout, self.id()).ok()?.ok()
    }

    /// Where the leases are kept.
    pub(crate) fn leases_path(&self) -> std::path::PathBuf {
        self.0.layout.file(layout::LEASES)
    }

    /// Notes what a mirror still needs, durably. A mirror that is new under its name goes on with a lease
    /// that was given to it before it had one: the newest that isn't ahead of it. So one without a name
    /// `begins` once, and isn't given again when it was taken over.
    ///
    /// # Errors
    /// [`IoError`]; until this process ends the lease holds all the same. A file that can't be understood is
    /// left as it is, and holds back everything.
    #[cfg(feature = "shipping")]
    pub(crate) fn note_lease(&self, lease: Lease, begins: bool) -> Result<(), IoError> {
        let fs = self.0.files.fs();
        let mut known = self.0.leases.lock();
        let path = self.leases_path();
        if known.is_none() {
            let found = read(&**fs, &self.0.layout, self.id())?;
            let damaged =
                |_| IoError::new("understanding", &path, std::io::ErrorKind::InvalidData.into());
            *known = Some(found.map_err(damaged)?);
        }
        let leases = known.get_or_insert_default();
        renew(leases, lease, begins);
        self.0.layout.replace(&**fs, layout::LEASES, &leases::encode(self.id(), leases))
    }
}

#[cfg(any(test, feature = "shipping"))]
fn renew(leases: &mut Vec<Lease>, lease: Lease, begins: bool) {
    let known = leases.iter().position(|other| other.id == lease.id);
    if lease.nameless && known.is_none() && !begins {
        return;
    }
    let inherited = || {
        let nameless = leases.iter().enumerate().filter(|(_, other)| other.nameless);
        let behind = nameless.filter(|(_, other)| other.position <= lease.position);
        behind.max_by_key(|(_, other)| other.position).map(|(index, _)| index)
    };
    let replaced = known.or_else(|| if lease.nameless { None } else { inherited() });
    if let Some(index) = replaced {
        leases.remove(index);
    }
    if leases.len() >= LEASES_MAX {
        let oldest = leases.iter().enumerate().min_by_key(|(_, lease)| lease.heard_at_us);
        if let Some(index) = oldest.map(|(index, _)| index) {
            leases.remove(index);
        }
    }
    leases.push(lease);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::position::Position;

    fn lease(id: u8, nameless: bool, position: u64) -> Lease {
        let position = Position::new(position);
        Lease { id: [id; 16], nameless, position, offset: 0, heard_at_us: i64::from(id) }
    }

    #[test]
    fn a_mirror_that_gets_a_name_goes_on_with_its_lease() {
        let mut leases = vec![lease(1, false, 5)];
        renew(&mut leases, lease(2, true, 7), true);
        renew(&mut leases, lease(3, true, 9), true);
        renew(&mut leases, lease(4, false, 8), true); // new: takes over the second
        renew(&mut leases, lease(2, true, 8), false); // which ends only now
        assert_eq!(leases, [lease(1, false, 5), lease(3, true, 9), lease(4, false, 8)]);
        renew(&mut leases, lease(4, false, 20), true); // known: takes over none
        assert_eq!(leases, [lease(1, false, 5), lease(3, true, 9), lease(4, false, 20)]);
    }

    #[test]
    fn of_too_many_leases_the_one_heard_of_first_is_left_out() {
        let mut leases: Vec<_> = (0..LEASES_MAX)
            .map(|index| {
                let mut lease = lease(0, false, 1);
                lease.id[..8].copy_from_slice(&(index as u64).to_le_bytes());
                lease.heard_at_us = 1000 - index as i64 % 1000;
                lease
            })
            .collect();
        renew(&mut leases, lease(9, false, 2), true);
        assert_eq!(leases.len(), LEASES_MAX);
        assert!(leases.contains(&lease(9, false, 2)));
        assert!(!leases.iter().any(|lease| lease.heard_at_us == 1));
    }
}
