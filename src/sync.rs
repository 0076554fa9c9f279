//! What threads wait with, in one place, so that the commit path can also be run under a scheduler that
//! tries their interleavings (`--cfg shuttle`, see `tests/shuttle.rs`).
//!
//! [`Gate`] is the one thing that isn't a plain lock: many wait, and one system call wakes them all. A
//! condition variable would send every one of them through its mutex.

#[cfg(not(shuttle))]
pub(crate) use parking_lot::{Condvar, Mutex, MutexGuard};

#[cfg(shuttle)]
pub(crate) use explored::{Condvar, Mutex, MutexGuard};

/// What a waiter at a [`Gate`] is woken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Signal {
    /// The gate is open, for ever.
    Open,
    /// Exactly one of the waiters gets this: there is something to do before the gate can open.
    Call,
}

#[cfg(not(shuttle))]
mod gate {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::Signal;

    const CLOSED: u32 = 0;
    const CALLED: u32 = 1;
    const OPEN: u32 = 2;

    /// Opens once; until then it can call one of those who wait.
    #[derive(Debug, Default)]
    pub(crate) struct Gate(AtomicU32);

    impl Gate {
        /// Opens the gate and wakes everybody.
        pub(crate) fn open(&self) {
            self.0.store(OPEN, Ordering::Release);
            atomic_wait::wake_all(&self.0);
        }

        /// Wakes one waiter, now or when the next one comes.
        pub(crate) fn call(&self) {
            let called =
                self.0.compare_exchange(CLOSED, CALLED, Ordering::Release, Ordering::Relaxed);
            if called.is_ok() {
                atomic_wait::wake_one(&self.0);
            }
        }

        pub(crate) fn wait(&self) -> Signal {
            loop {
                match self.0.load(Ordering::Acquire) {
                    OPEN => return Signal::Open,
                    CALLED => {
                        let taken = self.0.compare_exchange(
                            CALLED,
                            CLOSED,
                            Ordering::Acquire,
                            Ordering::Relaxed,
                        );
                        if taken.is_ok() {
                            return Signal::Call;
                        }
                    }
                    _ => atomic_wait::wait(&self.0, CLOSED),
                }
            }
        }
    }
}

#[cfg(not(shuttle))]
pub(crate) use gate::Gate;

#[cfg(shuttle)]
mod explored {
    //! The same faces over shuttle's primitives.

    use std::ops::{Deref, DerefMut};
    use std::time::Instant;

    use super::Signal;

    #[derive(Debug, Default)]
    pub(crate) struct Mutex<T>(shuttle::sync::Mutex<T>);

    #[derive(Debug)]
    pub(crate) struct MutexGuard<'a, T> {
        mutex: &'a Mutex<T>,
        guard: Option<shuttle::sync::MutexGuard<'a, T>>,
    }

    impl<T> Mutex<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(shuttle::sync::Mutex::new(value))
        }

        pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
            MutexGuard { mutex: self, guard: Some(self.0.lock().unwrap()) }
        }
    }

    impl<T> MutexGuard<'_, T> {
        pub(crate) fn unlocked<R>(this: &mut Self, action: impl FnOnce() -> R) -> R {
            drop(this.guard.take());
            let result = action();
            this.guard = Some(this.mutex.0.lock().unwrap());
            result
        }
    }

    impl<T> Deref for MutexGuard<'_, T> {
        type Target = T;
        fn deref(&self) -> &T {
            self.guard.as_ref().unwrap()
        }
    }

    impl<T> DerefMut for MutexGuard<'_, T> {
        fn deref_mut(&mut self) -> &mut T {
            self.guard.as_mut().unwrap()
        }
    }

    #[derive(Debug, Default)]
    pub(crate) struct Condvar(shuttle::sync::Condvar);

    pub(crate) struct TimedOut;

    impl TimedOut {
        pub(crate) fn timed_out(&self) -> bool {
            false
        }
    }

    impl Condvar {
        pub(crate) fn new() -> Self {
            Self::default()
        }

        pub(crate) fn wait<T>(&self, guard: &mut MutexGuard<'_, T>) {
            let inner = guard.guard.take().unwrap();
            guard.guard = Some(self.0.wait(inner).unwrap());
        }

        /// Time stands still under the scheduler: only a notification ends the wait.
        pub(crate) fn wait_until<T>(&self, guard: &mut MutexGuard<'_, T>, _: Instant) -> TimedOut {
            self.wait(guard);
            TimedOut
        }

        pub(crate) fn notify_one(&self) {
            self.0.notify_one();
        }

        pub(crate) fn notify_all(&self) {
            self.0.notify_all();
        }
    }

    #[derive(Clone, Copy, Debug, Default, PartialEq)]
    enum State {
        #[default]
        Closed,
        Called,
        Open,
    }

    #[derive(Debug, Default)]
    pub(crate) struct Gate {
        state: Mutex<State>,
        changed: Condvar,
    }

    impl Gate {
        pub(crate) fn open(&self) {
            *self.state.lock() = State::Open;
            self.changed.notify_all();
        }

        pub(crate) fn call(&self) {
            let mut state = self.state.lock();
            if *state == State::Closed {
                *state = State::Called;
                self.changed.notify_one();
            }
        }

        pub(crate) fn wait(&self) -> Signal {
            let mut state = self.state.lock();
            loop {
                match *state {
                    State::Open => return Signal::Open,
                    State::Called => {
                        *state = State::Closed;
                        return Signal::Call;
                    }
                    State::Closed => self.changed.wait(&mut state),
                }
            }
        }
    }
}

#[cfg(shuttle)]
pub(crate) use explored::Gate;
