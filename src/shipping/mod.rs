//! Shipping
pub mod message;
pub mod session;
