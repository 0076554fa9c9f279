//! The answer to come of an append that nobody waits for yet.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use crate::error::AppendError;
use crate::journal::appender::append::{Appended, Receipt};
use crate::journal::appender::group::Group;
use crate::sync::Signal;

/// An append under way: wait for it, or await it. Dropping it cancels nothing.
///
/// It needs no runtime: any executor can poll it, and [`wait`](Self::wait) blocks without one.
///
/// ```
/// use headwater::{Append, ExpectedRevision, NewEvent, Store, StreamId};
/// # let dir = tempfile::tempdir()?;
/// let store = Store::create(dir.path().join("readings"))?;
/// let stream = StreamId::new("sensor-4")?;
/// let mut tickets = Vec::new();
/// for value in 0..1000_u32 {
///     let reading = NewEvent::raw("sensor.read", value.to_le_bytes())?;
///     tickets.push(store.submit(&Append::to(&stream, ExpectedRevision::Any, [reading]))?);
/// }
/// for ticket in tickets {
///     ticket.wait()?; // durable
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
#[must_use = "without asking it, nobody knows whether the append worked"]
pub struct Ticket(State);

#[derive(Debug)]
enum State {
    Answered(Appended),
    Pending {
        group: Arc<Group>,
        receipt: Receipt,
        waker: Option<usize>,
    },
    /// Its answer was taken.
    Taken,
}

impl Ticket {
    pub(super) const fn answered(appended: Appended) -> Self {
        Self(State::Answered(appended))
    }

    pub(super) const fn pending(group: Arc<Group>, receipt: Receipt) -> Self {
        Self(State::Pending { group, receipt, waker: None })
    }

    /// Blocks until the answer is there.
    ///
    /// # Errors
    /// [`AppendError::Unknown`] or [`AppendError::Poisoned`] if a write or sync failed.
    pub fn wait(self) -> Result<Appended, AppendError> {
        match self.0 {
            State::Answered(appended) => Ok(appended),
            State::Taken => Err(AppendError::Closed),
            State::Pending { group, receipt, .. } => loop {
                if let Some(outcome) = group.outcome() {
                    return outcome.answer(receipt);
                }
                match group.wait() {
                    // Calls are for the committer, which leads this group: it is there whenever a ticket is.
                    Signal::Open | Signal::Call => {}
                }
            },
        }
    }

    /// Whether the answer is there.
    #[must_use]
    pub fn is_answered(&self) -> bool {
        match &self.0 {
            State::Answered(_) | State::Taken => true,
            State::Pending { group, .. } => group.outcome().is_some(),
        }
    }
}

impl Future for Ticket {
    type Output = Result<Appended, AppendError>;

    /// # Panics
    /// If it is polled after it gave its answer.
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match std::mem::replace(&mut self.0, State::Taken) {
            State::Answered(appended) => Poll::Ready(Ok(appended)),
            State::Pending { group, receipt, mut waker } => {
                if let Poll::Ready(outcome) = group.poll(context, &mut waker) {
                    return Poll::Ready(outcome.answer(receipt));
                }
                self.0 = State::Pending { group, receipt, waker };
                Poll::Pending
            }
            State::Taken => panic!("a ticket was polled after it gave its answer"),
        }
    }
}
