//! How a mirror begins with a backup: before it follows, for everybody to see, and again from where it was if it is
//! interrupted.

use std::sync::Arc;

use super::{BACK_OFF_MAX, MirrorState, Shared, ShippingError, back_off};
use crate::journal::{self, Watched};

impl Shared {
    /// Copies what the mirror is to begin with, if it isn't there yet: until it is, or nobody wants it any more.
    pub(super) fn begin(&self) {
        let Some(backup) = &self.options.begin_with else { return };
        let mut pauses = back_off();
        while !journal::is_begun(&*self.fs, &self.dir) {
            let Some(copying) = self.begins() else { return };
            let meant = (&**backup, self.options.journal_id);
            let begun = journal::begin_mirror(&self.fs, meant, &self.dir, &copying);
            self.state.lock().copying = None;
            match begun {
                Ok(()) => break,
                Err(error) if error.is_disk_full() => {
                    self.note(ShippingError::Begin(Arc::new(error)));
                    self.pause(pauses.next().unwrap_or(BACK_OFF_MAX));
                }
                // It was told to end.
                Err(_) if self.state.lock().stopping => return,
                Err(error) => {
                    self.halt(ShippingError::Begin(Arc::new(error)));
                    pauses = back_off();
                }
            }
        }
        self.state.lock().phase = MirrorState::Connecting;
        self.changed.notify_all();
    }

    /// `None` if nobody wants it any more.
    fn begins(&self) -> Option<Arc<Watched>> {
        let mut state = self.state.lock();
        let copying = (!state.stopping).then(Arc::<Watched>::default)?;
        state.phase = MirrorState::Bootstrapping { bytes: 0, bytes_total: 0 };
        state.copying = Some(Arc::clone(&copying));
        self.changed.notify_all();
        Some(copying)
    }
}
