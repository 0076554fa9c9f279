//! Folding a stream.

use super::{Aggregate, ExecuteError};
use crate::event::{ExpectedRevision, Revision, StreamId};
use crate::journal::Journal;
use crate::upcast::Decoded;

/// The fold of the first `count` events of a stream.
#[derive(Clone, Debug, Default)]
pub(super) struct Loaded<A> {
    pub(super) state: A,
    pub(super) count: u64,
    /// How many events are in the snapshot that is on disk.
    pub(super) saved: u64,
}

impl<A: Aggregate> Loaded<A> {
    /// What must be there for a decision made from this.
    pub(super) fn expected(&self) -> ExpectedRevision {
        let last = self.count.checked_sub(1);
        last.map_or(ExpectedRevision::NoStream, |last| ExpectedRevision::Exact(Revision::new(last)))
    }

    /// Applies the durable events that aren't in it. After an error it is what the events in front make of it.
    pub(super) fn advance(
        &mut self,
        journal: &Journal,
        stream: &StreamId,
    ) -> Result<(), ExecuteError<A::Error>> {
        let head = journal.stream_head(stream)?;
        if head.is_none_or(|head| head < Revision::new(self.count)) {
            return Ok(());
        }
        for event in journal.read_stream(stream, Revision::new(self.count))? {
            let event = event?;
            match event.decode::<A::Event>() {
                Ok(Decoded::Foreign) if !A::PASSES_UNKNOWN_EVENTS => {
                    return Err(ExecuteError::UnknownEvent {
                        stream: stream.clone(),
                        position: event.position(),
                        event_type: event.event_type().clone(),
                    });
                }
                Ok(decoded) => decoded.into_iter().for_each(|event| self.state.apply(&event)),
                Err(source) => {
                    return Err(ExecuteError::Undecodable {
                        stream: stream.clone(),
                        position: event.position(),
                        event_type: event.event_type().clone(),
                        source,
                    });
                }
            }
            self.count += 1;
        }
        Ok(())
    }
}
