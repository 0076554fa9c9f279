//! Headwater
pub mod codec;
pub mod event;
pub mod format;
pub mod fs;
pub mod position;
pub use event::*;
pub use position::*;
