//! The leader's work: from an open group to its answers.

use std::sync::Arc;

use crate::error::{IoError, Poison};
use crate::journal::appender::append::Appended;
use crate::journal::appender::group::{Group, OpenGroup, Outcome, Slot};
use crate::journal::appender::{
    AppendError, ClosedGroup, CommitterState, Ended, Receipt, Shared, State, closed,
};
use crate::journal::writer::{ActiveFile, Failure, checkpoint_of};
use crate::planted::{self, Bug};
use crate::position::Checkpoint;
use crate::sync::{MutexGuard, Signal};

/// A group of so many bytes is closed and written while the group in front of it is being synced. Smaller
/// ones wait, and grow: for them a write costs little, and every further member saves a sync.
pub(super) const OVERLAP_BYTES: u64 = 64 * 1024;

/// What is going on in front of the sync.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    Free,
    /// A group is being closed and written, or the segment is being changed.
    Writing,
    /// A written group waits for the sync in front of it.
    Written,
}

/// A group whose batches were written.
struct Written {
    group: Arc<Group>,
    slots: Vec<Slot>,
    /// All of its batches, as they were written.
    bytes: Vec<u8>,
    file: ActiveFile,
    end: Checkpoint,
}

impl Outcome {
    pub(super) fn answer(&self, receipt: Receipt) -> Result<Appended, AppendError> {
        match self {
            Self::Durable => Ok(Appended::New(receipt)),
            Self::Unknown(poison) => Err(AppendError::Unknown(poison.clone())),
            Self::NotWritten(poison) => Err(AppendError::Poisoned(poison.clone())),
        }
    }
}

impl State {
    /// Whether somebody can close the open group now. Once the writer has failed, nobody can: whoever found
    /// that answers the open group, and its members wait for that.
    fn may_lead(&self) -> bool {
        !self.open.is_empty()
            && self.stage == Stage::Free
            && self.poison().is_none()
            && (!self.syncing || self.open.bytes >= OVERLAP_BYTES)
    }

    fn close_group(&mut self) -> (Arc<Group>, Vec<Slot>) {
        let OpenGroup { group, mut slots, began, .. } =
            std::mem::replace(&mut self.open, OpenGroup::new());
        self.align_group(&mut slots);
        let end = self.next.position;
        self.closed.push_back(ClosedGroup { group: Arc::clone(&group), end, began });
        (group, slots)
    }

    /// The group in front has its outcome.
    fn forget(&mut self, group: &Arc<Group>) {
        self.closed.retain(|closed| !Arc::ptr_eq(&closed.group, group));
    }

    /// A group has become durable: what was pending in it is now in the journal's index.
    fn settle(&mut self, written: &Written) {
        self.durable_offset = written.end.offset;
        self.forget(&written.group);
        for run in written.slots.iter().filter_map(|slot| slot.batch.as_ref()).flat_map(|b| &b.runs)
        {
            if self.heads.get(&run.stream).is_some_and(|(_, end)| *end <= written.end.position) {
                self.heads.remove(&run.stream);
            }
        }
    }
}

impl Shared {
    /// Sees a group through to its outcome: leads it if the way is free, waits otherwise.
    pub(super) fn see_through(&self, group: &Arc<Group>) -> Outcome {
        loop {
            if let Some(outcome) = group.outcome() {
                return outcome.clone();
            }
            let state = self.state.lock();
            if Arc::ptr_eq(&state.open.group, group) && state.may_lead() {
                self.lead(state);
                continue;
            }
            drop(state);
            match group.wait() {
                // Either it has its outcome, or somebody is to lead it; if it is led already, wait on.
                Signal::Open | Signal::Call => {}
            }
        }
    }

    /// Leads the groups in which nobody blocks.
    pub(super) fn run_committer(&self) {
        let mut state = self.state.lock();
        while state.committer != CommitterState::Stopping {
            if state.may_lead() {
                self.lead(state);
                state = self.state.lock();
            } else {
                self.work.wait(&mut state);
            }
        }
    }

    /// Sees to it that somebody leads the open group, if the way is free.
    pub(super) fn call_leader(&self, state: &State) {
        if !state.may_lead() {
            return;
        }
        if state.committer == CommitterState::Running {
            self.work.notify_one();
        } else {
            state.open.group.call();
        }
    }

    /// Commits the open group: closes it, writes it, syncs, publishes, answers.
    fn lead(&self, mut state: MutexGuard<'_, State>) {
        state.stage = Stage::Writing;
        while state.open.unready > 0 {
            self.ready.wait(&mut state);
        }
        if state.poison().is_some() {
            // Whoever failed answers the open group; but it may be done by now, and had found this stage.
            state.stage = Stage::Free;
            self.room.notify_all();
            return;
        }
        let (group, slots) = state.close_group();
        self.room.notify_all(); // in the group that is open now
        let written = MutexGuard::unlocked(&mut state, || self.write_group(&group, slots));
        let mut written = match written {
            Ok(written) => written,
            Err(error) => {
                state.stage = Stage::Free;
                return self.fail(state, &group, error);
            }
        };
        state.stage = Stage::Written;
        while state.syncing {
            self.turn.wait(&mut state);
        }
        state.stage = Stage::Free;
        if let Some(poison) = state.poison().cloned() {
            return self.give_up(state, &group, poison);
        }
        state.syncing = true;
        self.call_leader(&state); // one of a large group
        let synced = MutexGuard::unlocked(&mut state, || self.sync_group(&mut written));
        state.syncing = false;
        if !planted::is(Bug::TurnWithoutNotice) {
            self.turn.notify_one();
        }
        match synced {
            Ok(()) => self.succeed(state, &written),
            Err(error) => self.fail(state, &group, error),
        }
    }

    /// Chains and writes a group.
    fn write_group(&self, group: &Arc<Group>, mut slots: Vec<Slot>) -> Result<Written, IoError> {
        let mut writer = self.writer.lock();
        let Some(writer) = &mut *writer else { return Err(fatal(closed())) };
        let durable_offset = self.journal.end().offset;
        let start = writer.written().offset;
        let (mut end, salt, first) = (*writer.written(), writer.salt(), writer.digest_at(start));
        for slot in &mut slots {
            let Some(batch) = &mut slot.batch else { continue };
            slot.header.durable_offset = durable_offset;
            let segment = first.filter(|_| slot.header.offset == start);
            let header = slot.header.seal(end.chain, segment.as_ref(), &batch.digest, salt);
            batch.complete(&header, slot.header.padded_len as usize);
            end = checkpoint_of(&slot.header, end.journal);
        }
        let bytes = match slots.as_mut_slice() {
            [Slot { batch: Some(batch), .. }] => std::mem::take(&mut batch.bytes),
            slots => {
                let batches = || slots.iter().filter_map(|slot| slot.batch.as_ref());
                let mut bytes = Vec::with_capacity(batches().map(|batch| batch.bytes.len()).sum());
                batches().for_each(|batch| bytes.extend_from_slice(&batch.bytes));
                bytes
            }
        };
        writer.write(&bytes, end).map_err(fatal)?;
        let Some(file) = writer.active_file() else { return Err(fatal(closed())) };
        Ok(Written { group: Arc::clone(group), slots, bytes, file, end })
    }

    fn sync_group(&self, written: &mut Written) -> Result<(), IoError> {
        if planted::is(Bug::ShipUnsynced) {
            self.publish_group(written);
            return written.file.sync();
        }
        if !planted::is(Bug::AcknowledgeBeforeSync) {
            written.file.sync()?;
        }
        if planted::is(Bug::AnswerBeforePublish) {
            written.group.resolve(Outcome::Durable);
        }
        self.publish_group(written);
        Ok(())
    }

    fn publish_group(&self, written: &mut Written) {
        let bytes = std::mem::take(&mut written.bytes);
        self.journal.publish(written.end, bytes, |index, _| {
            for Slot { header, batch } in &written.slots {
                if let Some(batch) = batch {
                    batch.add_to(header, index);
                }
            }
        });
    }

    fn succeed(&self, mut state: MutexGuard<'_, State>, written: &Written) {
        state.settle(written);
        if state.poison().is_some() {
            self.journal.close_watch(); // put off, because this sync was under way
        }
        self.call_leader(&state);
        drop(state);
        written.group.resolve(Outcome::Durable);
        if !planted::is(Bug::RoomWithoutNotice) {
            self.room.notify_all();
        }
        self.keeper.mark(written.end, None);
    }

    /// A write or sync has failed.
    fn fail(&self, mut state: MutexGuard<'_, State>, group: &Arc<Group>, error: IoError) {
        let poison = self.poison(&mut state, error);
        self.give_up(state, group, poison);
    }

    /// Nobody knows what became of this group.
    fn give_up(&self, mut state: MutexGuard<'_, State>, group: &Arc<Group>, poison: Poison) {
        state.forget(group);
        if !state.syncing {
            self.journal.close_watch();
        }
        drop(state);
        group.resolve(Outcome::Unknown(poison));
        self.room.notify_all();
    }

    /// Ends the writer for ever, and answers the open group, of which nothing was written.
    pub(super) fn poison(&self, state: &mut MutexGuard<'_, State>, error: IoError) -> Poison {
        if let Some(poison) = state.poison() {
            return poison.clone();
        }
        let durable = self.journal.end().position;
        let lost = (state.buffered > durable).then(|| durable..state.buffered);
        let poison = Poison::new(error, lost);
        state.end = Some(Ended::Poisoned(poison.clone()));
        if !state.syncing {
            self.journal.close_watch();
        }
        // Those of its members that still compute their checksums find the group that they know resolved,
        // and this one empty.
        while state.open.unready > 0 {
            self.ready.wait(state);
        }
        let OpenGroup { group, .. } = std::mem::replace(&mut state.open, OpenGroup::new());
        group.resolve(Outcome::NotWritten(poison.clone()));
        self.turn.notify_all();
        self.room.notify_all();
        poison
    }
}

pub(super) fn fatal(failure: Failure) -> IoError {
    match failure {
        Failure::DiskFull(error) | Failure::Fatal(error) => error,
    }
}
