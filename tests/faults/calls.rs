use crate::{Plan, Reached};
pub(crate) fn run(plan: &Plan) -> Reached { todo!() }
pub(crate) fn catches_a_lie(plan: &Plan) -> Reached { todo!() }
