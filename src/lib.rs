//! Headwater
pub mod codec;
#[cfg(feature = "test-kit")]
#[doc(hidden)]
pub mod env;
#[cfg(not(feature = "test-kit"))]
mod env;
pub mod error;
pub mod event;
pub mod format;
pub mod fs;
pub mod journal;
pub mod options;
pub mod planted;
pub mod position;
#[cfg(feature = "shipping")]
pub mod shipping;
pub mod store;
pub use error::*;
pub use event::*;
pub use journal::*;
pub use options::*;
pub use position::*;
pub use store::*;
