//! What mirrors still need of a journal, kept across restarts.
//!
//! A lease moves on with what its mirror acknowledges. It is written behind that, so after a crash it may
//! hold back more than it must. Only retention reads it: a mirror without a lease is served all the same.

#[cfg(any(test, feature = "shipping"))]
use std::collections::HashMap;

use crate::error::{IoContext, IoError};
use crate::format::leases::{self, LEASE_BYTES, LEASES_HEADER_BYTES, LEASES_MAX, Lease};
use crate::fs::{self, Fs, OpenMode};
use crate::journal::Journal;
use crate::journal::layout::{self, Layout};
use crate::position::JournalId;

const FILE_BYTES_MAX: u64 = (LEASES_HEADER_BYTES + LEASES_MAX * LEASE_BYTES + 4) as u64;

/// The leases of an open journal.
pub(crate) type Known = parking_lot::Mutex<Leases>;

/// What this process knows of them.
#[derive(Debug, Default)]
pub(crate) struct Leases {
    /// `None` until they are asked for.
    known: Option<Vec<Lease>>,
    #[cfg(feature = "shipping")]
    connected: Connected,
}

/// The leases without a name whose mirrors are connected, and whether one that has got a name since may be the
/// same mirror: then this one goes on no more, and goes when it ends.
#[cfg(any(test, feature = "shipping"))]
type Connected = HashMap<[u8; 16], bool>;

/// Where a session stands when it notes its lease.
#[cfg(any(test, feature = "shipping"))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    Begins,
    GoesOn,
    Ends,
}

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
        if let Some(known) = &self.0.leases.lock().known {
            return Some(known.clone());
        }
        let fs = self.0.files.fs();
        read(&**fs, &self.0.layout, self.id()).ok()?.ok()
    }

    /// Where the leases are kept.
    pub(crate) fn leases_path(&self) -> std::path::PathBuf {
        self.0.layout.file(layout::LEASES)
    }

    /// Notes what mirrors still need, durably, with one write for all of them. A mirror that is new under its name
    /// goes on with a lease that was given to it before it had one: the newest that isn't ahead of it. So one
    /// without a name begins once, and isn't given again when it was taken over. That of a session that is still
    /// connected is taken over only if it goes on no more: it may be another mirror's.
    ///
    /// # Errors
    /// [`IoError`]; until this process ends the leases hold all the same. A file that can't be understood is
    /// left as it is, and holds back everything.
    #[cfg(feature = "shipping")]
    pub(crate) fn note_leases(&self, notes: &[(Lease, Stage)]) -> Result<(), IoError> {
        let fs = self.0.files.fs();
        let mut held = self.0.leases.lock();
        let Leases { known, connected } = &mut *held;
        let path = self.leases_path();
        if known.is_none() {
            let found = read(&**fs, &self.0.layout, self.id())?;
            let damaged =
                |_| IoError::new("understanding", &path, std::io::ErrorKind::InvalidData.into());
            *known = Some(found.map_err(damaged)?);
        }
        let leases = known.get_or_insert_default();
        notes.iter().for_each(|(lease, stage)| renew(leases, connected, *lease, *stage));
        self.0.layout.replace(&**fs, layout::LEASES, &leases::encode(self.id(), leases))
    }

    /// The session `id` has ended. Without a name, its mirror comes back under one, and takes its lease over;
    /// unless it has done so.
    #[cfg(feature = "shipping")]
    pub(crate) fn end_lease(&self, id: &[u8; 16]) {
        let mut held = self.0.leases.lock();
        let taken_over = held.connected.remove(id).unwrap_or(false);
        if let Some(leases) = held.known.as_mut().filter(|_| taken_over) {
            leases.retain(|lease| lease.id != *id);
            // An effort: what stays in the file holds back more than it must.
            let bytes = leases::encode(self.id(), leases);
            drop(self.0.layout.replace(&**self.0.files.fs(), layout::LEASES, &bytes));
        }
    }
}

#[cfg(any(test, feature = "shipping"))]
fn renew(leases: &mut Vec<Lease>, connected: &mut Connected, lease: Lease, stage: Stage) {
    let known = leases.iter().position(|other| other.is_of(&lease));
    if lease.nameless {
        match stage {
            Stage::Begins => drop(connected.insert(lease.id, false)),
            _ if known.is_none() => return,
            Stage::GoesOn
                if known
                    .and_then(|at| leases.get(at))
                    .is_some_and(|old| old.position < lease.position) =>
            {
                connected.insert(lease.id, false);
            }
            Stage::GoesOn | Stage::Ends => {}
        }
    }
    let inherited = || {
        let free = |other: &Lease| {
            other.nameless && other.feed == lease.feed && connected.get(&other.id) != Some(&true)
        };
        let nameless = leases.iter().enumerate().filter(|(_, other)| free(other));
        let behind = nameless.filter(|(_, other)| other.position <= lease.position);
        let rank = |other: &Lease| (!connected.contains_key(&other.id), other.position);
        behind.max_by_key(|(_, other)| rank(other)).map(|(index, _)| index)
    };
    let replaced = known.or_else(|| if lease.nameless { None } else { inherited() });
    if let Some(index) = replaced {
        match leases.get(index).and_then(|old| connected.get_mut(&old.id)) {
            Some(taken_over) if known.is_none() => *taken_over = true,
            _ => drop(leases.remove(index)),
        }
    }
    if leases.len() >= LEASES_MAX {
        // Whoever comes again and again without a name doesn't push out a mirror that is only away.
        let rank = |lease: &Lease| (!lease.nameless, lease.heard_at_us);
        let oldest = leases.iter().enumerate().min_by_key(|(_, lease)| rank(lease));
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
        let heard_at_us = i64::from(id);
        Lease { id: [id; 16], nameless, feed: false, position, offset: 0, heard_at_us }
    }

    #[test]
    fn a_mirror_that_gets_a_name_goes_on_with_its_lease() {
        let mut leases = vec![lease(1, false, 5), lease(2, true, 7), lease(3, true, 9)];
        let mut connected = Connected::new();
        let mut renew = |lease, stage| renew(&mut leases, &mut connected, lease, stage);
        renew(lease(4, false, 8), Stage::Begins); // new: takes over the second
        renew(lease(2, true, 8), Stage::Ends); // which ends only now
        renew(lease(4, false, 20), Stage::Begins); // known: takes over none
        assert_eq!(leases, [lease(1, false, 5), lease(3, true, 9), lease(4, false, 20)]);
    }

    #[test]
    fn the_lease_of_a_mirror_that_is_connected_and_goes_on_stays() {
        let (mut leases, mut connected) = (Vec::new(), Connected::new());
        renew(&mut leases, &mut connected, lease(1, true, 3), Stage::Begins);
        renew(&mut leases, &mut connected, lease(2, true, 3), Stage::Begins);
        renew(&mut leases, &mut connected, lease(8, false, 8), Stage::Begins);
        renew(&mut leases, &mut connected, lease(9, false, 8), Stage::Begins);
        renew(&mut leases, &mut connected, lease(7, false, 8), Stage::Begins); // finds none
        assert_eq!(leases.len(), 5);
        assert_eq!(connected, Connected::from([([1; 16], true), ([2; 16], true)]));
        renew(&mut leases, &mut connected, lease(1, true, 4), Stage::GoesOn); // another mirror's
        renew(&mut leases, &mut connected, lease(2, true, 4), Stage::Ends); // was one of those
        assert_eq!(connected, Connected::from([([1; 16], false), ([2; 16], true)]));
        assert!(leases.contains(&lease(1, true, 4)));
    }

    #[test]
    fn a_mirror_and_a_feed_of_one_node_have_a_lease_each() {
        let (mut leases, mut connected) = (Vec::new(), Connected::new());
        let feed = |id, nameless, position| Lease { feed: true, ..lease(id, nameless, position) };
        let (mirror, other) = (lease(1, false, 5), feed(2, true, 3));
        for lease in [other, mirror, feed(1, false, 9), mirror] {
            renew(&mut leases, &mut connected, lease, Stage::GoesOn);
        }
        renew(&mut leases, &mut connected, other, Stage::Begins);
        renew(&mut leases, &mut connected, lease(3, false, 7), Stage::Begins); // takes over none of a feed
        assert_eq!(leases, [feed(1, false, 9), mirror, other, lease(3, false, 7)]);
    }

    #[test]
    fn of_too_many_leases_the_one_heard_of_first_is_left_out() {
        let mut leases: Vec<_> = (0..LEASES_MAX)
            .map(|index| {
                let mut lease = lease(0, false, 1);
                lease.id[..8].copy_from_slice(&(index as u64).to_le_bytes());
                lease.heard_at_us = (LEASES_MAX - index) as i64;
                lease
            })
            .collect();
        renew(&mut leases, &mut Connected::new(), lease(9, false, 2), Stage::Begins);
        assert_eq!(leases.len(), LEASES_MAX);
        assert!(leases.contains(&lease(9, false, 2)));
        assert!(!leases.iter().any(|lease| lease.heard_at_us == 1));
        leases.push(Lease { id: [8; 16], heard_at_us: 5000, ..lease(8, true, 1) });
        renew(&mut leases, &mut Connected::new(), lease(10, true, 2), Stage::Begins);
        assert!(!leases.iter().any(|lease| lease.id == [8; 16]), "one without a name goes first");
    }
}
