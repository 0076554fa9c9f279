//! What both programs need: `./run bench` (in `paths/`) and `./run bench --peers` (in `peers/`).

pub(crate) mod device;
pub(crate) mod held;
pub(crate) mod machine;
pub(crate) mod page;
pub(crate) mod spread;

pub(crate) type Error = Box<dyn std::error::Error + Send + Sync>;
