//! A log in an ordered map: the keys of events, and of the index by stream.

use crate::Outcome;

pub(super) const USED: &str = "the key is the event's number, from a counter in memory; an index by stream (stream, number) is written only for the corpus that is read; other options are the defaults";

pub(super) fn event(number: u64) -> [u8; 8] {
    number.to_be_bytes()
}

pub(super) fn of_stream(stream: u32, number: u64) -> [u8; 12] {
    let mut key = [0; 12];
    key[..4].copy_from_slice(&stream.to_be_bytes());
    key[4..].copy_from_slice(&number.to_be_bytes());
    key
}

/// The key of the event that a key of the index points at.
pub(super) fn event_of(of_stream: &[u8]) -> Outcome<[u8; 8]> {
    Ok(of_stream.get(4..).ok_or("a key that is too short")?.try_into()?)
}
