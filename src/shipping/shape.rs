//! The shape in which a service publishes its events, if that isn't the one in which it stores them.
//!
//! ```text
//!   stored event ── shape: none, one or several public ones ── filter ──▶ filtered feed
//!                └───────────────────── as it is, byte for byte ────────▶ mirror
//! ```
//! Invariants:
//! - What a shape can't publish ends the feed in front of it, with its position: nothing is left out silently.
//! - The same stored event gives the same public ones under the same ids, whenever it is asked.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use super::message::ShapeId;
use crate::event::{EventId, NewEvent, Recorded, Revision, StreamId};
use crate::format::batch::BATCH_BYTES_LIMIT;
use crate::format::record::{self, RecordRef};

/// Why a shape can't publish an event.
pub type PublishError = Box<dyn std::error::Error + Send + Sync>;

/// Publishes events in another shape than they are stored in, in the filtered feeds of a
/// [server](super::ServeOptions::shape). Mirrors, which are copies, aren't concerned.
///
/// ```
/// use headwater::shipping::{PublicShape, Public, PublishError, Shape};
/// use headwater::{NewEvent, Recorded};
///
/// struct Orders;
///
/// impl PublicShape for Orders {
///     const NAME: &'static str = "orders";
///     const VERSION: u32 = 2;
///
///     fn publish(&self, event: &Recorded, public: &mut Public<'_>) -> Result<(), PublishError> {
///         match event.event_type().as_str() {
///             "order.placed" => public.as_stored(),
///             "order.line_changed" => {
///                 let changed = NewEvent::raw("order.changed", event.data().as_slice())?;
///                 public.event(event.stream(), changed);
///             }
///             _ => {} // internal
///         }
///         Ok(())
///     }
/// }
///
/// let options = headwater::shipping::ServeOptions { shape: Some(Shape::new(Orders)), ..Default::default() };
/// ```
pub trait PublicShape: Send + Sync + 'static {
    /// Its name, 1 to 64 bytes. Subscribers see it.
    const NAME: &'static str;
    /// To be raised whenever it publishes something else for the same event: feeds that were begun with another
    /// version are refused then, and begin anew.
    const VERSION: u32;

    /// Publishes what `event` is to others, or nothing.
    ///
    /// It must give the same for the same event every time: it is asked again after every lost connection, and
    /// whatever else it looks at may have changed by then. It is called from several threads at once.
    ///
    /// # Errors
    /// Whatever it fails with ends the feeds in front of this event, as does a panic; they try again later.
    fn publish(&self, event: &Recorded, public: &mut Public<'_>) -> Result<(), PublishError>;
}

/// What an event is to others; see [`PublicShape::publish`].
#[derive(Debug)]
pub struct Public<'a> {
    stored: &'a RecordRef<'a>,
    bytes: &'a [u8],
    published: Vec<Vec<u8>>,
    failed: Option<PublishError>,
}

impl Public<'_> {
    /// The event itself, as it is stored.
    pub fn as_stored(&mut self) {
        self.published.push(self.bytes.to_vec());
    }

    /// An event of this stream. The first one has the id of the stored event, further ones have ids that are made from
    /// that; those that they bring along are not used. Its revision is that in the subscriber's journal.
    pub fn event<P: AsRef<[u8]>>(&mut self, stream: &StreamId, event: NewEvent<P>) {
        let event = NewEvent { id: self.next_id(), ..event };
        if let Err(invalid) = event.check() {
            self.failed.get_or_insert(invalid.into());
        } else if record::encoded_len(&event, stream) > BATCH_BYTES_LIMIT as usize / 2 {
            self.failed.get_or_insert("a public event of more than 8 MiB".into());
        } else {
            let mut bytes = Vec::new();
            record::encode(&mut bytes, &event, stream, Revision::FIRST);
            self.published.push(bytes);
        }
    }

    fn next_id(&self) -> EventId {
        let count = self.published.len() as u64;
        if count == 0 {
            return self.stored.id;
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"headwater public event v1\0").update(self.stored.id.as_bytes());
        hasher.update(&count.to_le_bytes());
        let mut id = [0; 16];
        hasher.finalize_xof().fill(&mut id);
        id[6] = id[6] & 0x0F | 0x80; // a UUID of version 8
        id[8] = id[8] & 0x3F | 0x80;
        EventId::from_bytes(id)
    }
}

type Publish = dyn Fn(&Recorded, &mut Public<'_>) -> Result<(), PublishError> + Send + Sync;

/// A [`PublicShape`], to be served with.
#[derive(Clone)]
pub struct Shape {
    id: ShapeId,
    publish: Arc<Publish>,
}

impl std::fmt::Debug for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Shape({})", self.id)
    }
}

impl Shape {
    /// Publishes in this shape.
    #[must_use]
    pub fn new<S: PublicShape>(shape: S) -> Self {
        let id = ShapeId { name: S::NAME.to_owned(), version: S::VERSION };
        Self { id, publish: Arc::new(move |event, public| shape.publish(event, public)) }
    }

    /// Its name and version.
    #[must_use]
    pub const fn id(&self) -> &ShapeId {
        &self.id
    }

    /// The records of what is published for a stored event, or why that can't be.
    pub(crate) fn publish(
        &self,
        event: &Recorded,
        stored: &RecordRef<'_>,
        bytes: &[u8],
    ) -> Result<Vec<Vec<u8>>, String> {
        let mut public = Public { stored, bytes, published: Vec::new(), failed: None };
        let published = catch_unwind(AssertUnwindSafe(|| (self.publish)(event, &mut public)));
        match (published, public.failed) {
            (Ok(Ok(())), None) => Ok(public.published),
            (Ok(Err(error)), _) | (Ok(Ok(())), Some(error)) => Err(error.to_string()),
            (Err(panic), _) => {
                let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
                let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
                Err(format!("panicked: {}", text.unwrap_or_default()))
            }
        }
    }
}
