//! The aggregates that were used last, in memory.
//!
//! Whatever is in here was folded from durable events of the journal that this store has open, which only
//! grows: so it needs no proof, and is gone with the store.

use std::any::{Any, TypeId};
use std::fmt;
use std::sync::Arc;

use crate::event::StreamId;

/// The type of the aggregate, and its stream.
pub(super) type Key = (TypeId, StreamId);

/// Bounded by the number of aggregates.
#[derive(Default)]
pub(crate) struct Cache(Option<quick_cache::sync::Cache<Key, Arc<dyn Any + Send + Sync>>>);

impl fmt::Debug for Cache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Cache").field(&self.0.as_ref().map(quick_cache::sync::Cache::len)).finish()
    }
}

impl Cache {
    /// Keeps up to `max` aggregates; none if that is 0.
    pub(crate) fn new(max: usize) -> Self {
        Self((max > 0).then(|| quick_cache::sync::Cache::new(max)))
    }

    /// Takes it out, so that whoever goes on with it needs no copy.
    pub(super) fn take<T: Send + Sync + 'static>(&self, key: &Key) -> Option<Arc<T>> {
        let (_, known) = self.0.as_ref()?.remove(key)?;
        known.downcast().ok()
    }

    pub(super) fn put<T: Send + Sync + 'static>(&self, key: Key, value: Arc<T>) {
        if let Some(cache) = &self.0 {
            cache.insert(key, value);
        }
    }
}
