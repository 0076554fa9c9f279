//! What threads wait with, in one place, so that the commit path can also be run under a scheduler that
//! tries their interleavings (`--cfg shuttle`, see `tests/shuttle`).
//!
//! ```text
//!             Mutex, RwLock, Condvar      Word (a number to wait for)     spawn
//!  usually    parking_lot                 atomic + futex                  std::thread
//!  explored   shuttle                     mutex + condition variable      shuttle::thread
//!                                            └─ Gate: the same code over both
//! ```
//! [`Gate`] is the one thing that isn't a plain lock: many wait, and one system call wakes them all. A
//! condition variable would send every one of them through its mutex.

use crate::planted::{self, Bug};

#[cfg(not(shuttle))]
pub(crate) use real::{Condvar, Mutex, MutexGuard, RwLock, Thread, Word, spawn};

#[cfg(shuttle)]
pub(crate) use explored::{Condvar, Mutex, MutexGuard, RwLock, Thread, Word, spawn};

/// What a waiter at a [`Gate`] is woken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Signal {
    /// The gate is open, for ever.
    Open,
    /// Exactly one of the waiters gets this: there is something to do before the gate can open.
    Call,
}

const CLOSED: u32 = 0;
const CALLED: u32 = 1;
const OPEN: u32 = 2;

/// Opens once; until then it can call one of those who wait.
#[derive(Debug, Default)]
pub(crate) struct Gate(Word);

impl Gate {
    /// Opens the gate and wakes everybody.
    pub(crate) fn open(&self) {
        if planted::is(Bug::LostWakeUp) {
            self.0.wake_all();
            return self.0.store(OPEN);
        }
        self.0.store(OPEN);
        self.0.wake_all();
    }

    /// Wakes one waiter, now or when the next one comes.
    pub(crate) fn call(&self) {
        if self.0.exchange(CLOSED, CALLED) {
            self.0.wake_one();
        }
    }

    pub(crate) fn wait(&self) -> Signal {
        loop {
            match self.0.load() {
                OPEN => return Signal::Open,
                CALLED if self.0.exchange(CALLED, CLOSED) => return Signal::Call,
                CALLED => {}
                _ => self.0.wait_while(CLOSED),
            }
        }
    }
}

#[cfg(not(shuttle))]
mod real {
    use std::sync::atomic::{AtomicU32, Ordering};

    pub(crate) use parking_lot::{Condvar, Mutex, MutexGuard, RwLock};

    /// A number to wait for. Storing releases what was done before, loading acquires it.
    #[derive(Debug, Default)]
    pub(crate) struct Word(AtomicU32);

    impl Word {
        pub(crate) fn load(&self) -> u32 {
            self.0.load(Ordering::Acquire)
        }

        pub(crate) fn store(&self, value: u32) {
            self.0.store(value, Ordering::Release);
        }

        /// Whether it was `from`, and is `to` now.
        pub(crate) fn exchange(&self, from: u32, to: u32) -> bool {
            self.0.compare_exchange(from, to, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        }

        /// Sleeps unless it is something else; until woken, or for no reason.
        pub(crate) fn wait_while(&self, value: u32) {
            atomic_wait::wait(&self.0, value);
        }

        pub(crate) fn wake_one(&self) {
            atomic_wait::wake_one(&self.0);
        }

        pub(crate) fn wake_all(&self) {
            atomic_wait::wake_all(&self.0);
        }
    }

    pub(crate) type Thread = std::thread::JoinHandle<()>;

    /// Begins a thread, if there can be one.
    pub(crate) fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> Option<Thread> {
        std::thread::Builder::new().name(name.into()).spawn(run).ok()
    }
}

#[cfg(shuttle)]
mod explored {
    //! The same faces over shuttle's primitives.
    #![allow(clippy::unwrap_used, reason = "only in the explorer: a panic is a failed schedule")]

    use std::ops::{Deref, DerefMut};
    use std::time::Instant;

    use shuttle::sync::atomic::{AtomicU32, Ordering};

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
    pub(crate) struct RwLock<T>(shuttle::sync::RwLock<T>);

    impl<T> RwLock<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(shuttle::sync::RwLock::new(value))
        }

        pub(crate) fn read(&self) -> shuttle::sync::RwLockReadGuard<'_, T> {
            self.0.read().unwrap()
        }

        pub(crate) fn write(&self) -> shuttle::sync::RwLockWriteGuard<'_, T> {
            self.0.write().unwrap()
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

    /// As the kernel does it: whether to sleep is decided under a lock that whoever wakes takes too.
    #[derive(Debug, Default)]
    pub(crate) struct Word {
        value: AtomicU32,
        queue: Mutex<()>,
        woken: Condvar,
    }

    impl Word {
        pub(crate) fn load(&self) -> u32 {
            self.value.load(Ordering::Acquire)
        }

        pub(crate) fn store(&self, value: u32) {
            self.value.store(value, Ordering::Release);
        }

        pub(crate) fn exchange(&self, from: u32, to: u32) -> bool {
            self.value.compare_exchange(from, to, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        }

        pub(crate) fn wait_while(&self, value: u32) {
            let mut queue = self.queue.lock();
            if self.load() == value {
                self.woken.wait(&mut queue);
            }
        }

        pub(crate) fn wake_one(&self) {
            let _queue = self.queue.lock();
            self.woken.notify_one();
        }

        pub(crate) fn wake_all(&self) {
            let _queue = self.queue.lock();
            self.woken.notify_all();
        }
    }

    pub(crate) type Thread = shuttle::thread::JoinHandle<()>;

    pub(crate) fn spawn(_: &str, run: impl FnOnce() + Send + 'static) -> Option<Thread> {
        Some(shuttle::thread::spawn(run))
    }
}
