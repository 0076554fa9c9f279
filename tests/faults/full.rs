use crate::{Plan, Reached};
pub(crate) fn tmpfs(plan: &Plan) -> Reached { todo!() }
pub(crate) fn ext4(plan: &Plan) -> Reached { todo!() }
