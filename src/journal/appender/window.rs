//! The event ids that were appended last, to recognise one that comes again.

use std::collections::HashMap;

use foldhash::fast::FixedState;

use crate::position::Position;

/// A power of two; the maps grow one at a time, so that no append waits for all of them.
const SHARDS: usize = 64;

type Map = HashMap<u64, Position, FixedState>;

/// Hashes of event ids, and the positions of their events: at least the last `max`, at most twice as many.
///
/// Two generations take turns. Forgetting is emptying the older one, so that remembering an id costs one
/// insertion and no removal.
#[derive(Debug)]
pub(super) struct IdWindow {
    young: Vec<Map>,
    old: Vec<Map>,
    young_count: usize,
    max: usize,
}

impl IdWindow {
    pub(super) fn new(max: usize) -> Self {
        let maps = || (0..SHARDS).map(|_| Map::default()).collect();
        Self { young: maps(), old: maps(), young_count: 0, max }
    }

    pub(super) fn insert(&mut self, hash: u64, position: Position) {
        if self.max == 0 {
            return;
        }
        if self.young_count >= self.max {
            std::mem::swap(&mut self.young, &mut self.old);
            self.young.iter_mut().for_each(HashMap::clear);
            self.young_count = 0;
        }
        if let Some(shard) = self.young.get_mut(shard(hash)) {
            shard.insert(hash, position);
        }
        self.young_count += 1;
    }

    pub(super) fn get(&self, hash: u64) -> Option<Position> {
        let shard = shard(hash);
        let known = |maps: &[Map]| maps.get(shard)?.get(&hash).copied();
        known(&self.young).or_else(|| known(&self.old))
    }
}

const fn shard(hash: u64) -> usize {
    (hash >> 58) as usize % SHARDS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_ids_are_known_and_those_of_two_windows_ago_are_not() {
        let mut window = IdWindow::new(100);
        for n in 0..1000_u64 {
            window.insert(n.wrapping_mul(0x9E37_79B9_7F4A_7C15), Position::new(n));
            for back in 0..100.min(n) {
                let hash = (n - back).wrapping_mul(0x9E37_79B9_7F4A_7C15);
                assert_eq!(window.get(hash), Some(Position::new(n - back)));
            }
        }
        assert_eq!(window.get(0), None);
        assert!(window.young.iter().chain(&window.old).map(HashMap::len).sum::<usize>() <= 200);
    }

    #[test]
    fn an_id_that_comes_again_is_known_by_its_last_position() {
        let mut window = IdWindow::new(2);
        window.insert(7, Position::new(0));
        window.insert(7, Position::new(5));
        assert_eq!(window.get(7), Some(Position::new(5)));
    }
}
