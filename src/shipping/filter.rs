//! Which events a filtered feed holds.
//!
//! ```text
//!   filter = part OR part OR …     part = (any of these categories) AND (any of these types) AND (all of these tags)
//!
//!   wanted by the subscriber ∩ allowed by the access list = the feed
//! ```
//! Invariants:
//! - The intersection of two filters is a filter, and lets through exactly what both do.
//! - Limits bound what comparing filters costs, whoever asks. One that a peer has asked for takes a few KiB, with as many
//!   names as there may be.

use serde::{Deserialize, Serialize};

use crate::event::Recorded;
use crate::format::record::RecordRef;
use crate::format::{Decoder, FormatError};

mod names;

use names::Names;

/// A filter has at most so many parts.
pub const FILTER_PARTS_MAX: usize = 16;
/// A part names at most so many categories, types and tags, all together.
pub const FILTER_NAMES_MAX: usize = 64;
/// A filter takes at most so many bytes in a frame.
pub const FILTER_BYTES_MAX: usize = 2048;
const NAME_BYTES_MAX: usize = 255;
/// Of more intersections of parts it isn't looked which of them the others hold.
const PAIRS_MAX: usize = FILTER_PARTS_MAX * FILTER_PARTS_MAX;
/// No name can be this: it stands for all those that nobody names.
const OTHER: &str = "\u{0}";

/// Which events a feed holds, by the category of their streams, their types and their tags: those that one of its
/// parts means.
///
/// ```
/// use headwater::shipping::{FeedFilter, FeedPart};
/// let filter = FeedFilter::any_of([
///     FeedPart::categories(["order"]).and_types(["order.placed", "order.shipped"]),
///     FeedPart::types(["customer.renamed"]),
/// ]);
/// assert_eq!(filter.parts().len(), 2);
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct FeedFilter {
    parts: Vec<FeedPart>,
}

/// A part of a [`FeedFilter`]: means events of streams of any of its categories that have any of its types and all of
/// its tags. Where it names none, any will do; naming nothing at all means every event.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FeedPart {
    #[serde(default, skip_serializing_if = "Names::is_empty")]
    categories: Names,
    #[serde(default, skip_serializing_if = "Names::is_empty")]
    types: Names,
    #[serde(default, skip_serializing_if = "Names::is_empty")]
    tags: Names,
}

/// What is wrong with a filter.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidFilter {
    /// It has no part: nothing would pass.
    #[error("a filter without a part lets nothing through")]
    Empty,
    /// A name is empty, too long, or has a control character.
    #[error("{name:?} can't be a category, type or tag: 1 to 255 bytes without control characters")]
    Name {
        /// The name.
        name: String,
    },
    /// There is more of it than a subscription can carry.
    #[error(
        "a filter has at most {FILTER_PARTS_MAX} parts of {FILTER_NAMES_MAX} names, in {FILTER_BYTES_MAX} bytes"
    )]
    TooLarge,
}

impl FeedPart {
    /// Events of streams of any of these [categories](crate::StreamId::category).
    #[must_use]
    pub fn categories<T: Into<String>>(categories: impl IntoIterator<Item = T>) -> Self {
        Self::default().and_categories(categories)
    }

    /// Events of any of these types.
    #[must_use]
    pub fn types<T: Into<String>>(types: impl IntoIterator<Item = T>) -> Self {
        Self::default().and_types(types)
    }

    /// Events with all of these tags.
    #[must_use]
    pub fn tags<T: Into<String>>(tags: impl IntoIterator<Item = T>) -> Self {
        Self::default().and_tags(tags)
    }

    /// Adds categories.
    #[must_use]
    pub fn and_categories<T: Into<String>>(
        mut self,
        categories: impl IntoIterator<Item = T>,
    ) -> Self {
        self.categories.add(categories);
        self
    }

    /// Adds types.
    #[must_use]
    pub fn and_types<T: Into<String>>(mut self, types: impl IntoIterator<Item = T>) -> Self {
        self.types.add(types);
        self
    }

    /// Adds tags.
    #[must_use]
    pub fn and_tags<T: Into<String>>(mut self, tags: impl IntoIterator<Item = T>) -> Self {
        self.tags.add(tags);
        self
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        self.categories.iter().chain(self.types.iter()).chain(self.tags.iter())
    }

    fn means(&self, category: &str, event_type: &str, has_tag: impl Fn(&str) -> bool) -> bool {
        is_any(&self.categories, category)
            && is_any(&self.types, event_type)
            && self.tags.iter().all(has_tag)
    }

    /// Whether there can be an event that both mean.
    fn meets(&self, other: &Self) -> bool {
        meet(&self.categories, &other.categories) && meet(&self.types, &other.types)
    }

    /// Whether the other one means all that this one does. Of both, names are in order.
    fn is_within(&self, other: &Self) -> bool {
        let is_within = |a: &Names, b: &Names| b.is_empty() || (!a.is_empty() && a.is_subset(b));
        is_within(&self.categories, &other.categories)
            && is_within(&self.types, &other.types)
            && other.tags.is_subset(&self.tags)
    }

    /// What both mean; `None` if that can't be any event.
    fn and(&self, other: &Self) -> Option<Self> {
        let categories = common(&self.categories, &other.categories)?;
        let types = common(&self.types, &other.types)?;
        let part = Self { categories, types, tags: self.tags.clone() };
        Some(part.and_tags(other.tags.iter()))
    }

    /// Sorted and without repetitions, as the others keep them.
    fn in_order(self) -> Self {
        let Self { categories, types, tags } = self;
        Self { categories: categories.in_order(), types: types.in_order(), tags: tags.in_order() }
    }
}

fn is_any(names: &Names, name: &str) -> bool {
    names.is_empty() || names.contains(name)
}

/// Whether there is a name that is in both; no names are all.
fn meet(a: &Names, b: &Names) -> bool {
    a.is_empty() || b.is_empty() || a.iter().any(|name| b.contains(name))
}

/// The names that are in both; no names are all. `None` if none are in both.
fn common(a: &Names, b: &Names) -> Option<Names> {
    match (a.is_empty(), b.is_empty()) {
        (true, _) => Some(b.clone()),
        (_, true) => Some(a.clone()),
        _ => {
            let both: Names = a.iter().filter(|name| b.contains(name)).collect();
            (!both.is_empty()).then_some(both)
        }
    }
}

impl From<FeedPart> for FeedFilter {
    fn from(part: FeedPart) -> Self {
        Self::any_of([part])
    }
}

impl FeedFilter {
    /// What any of the parts means.
    #[must_use]
    pub fn any_of(parts: impl IntoIterator<Item = FeedPart>) -> Self {
        let mut parts: Vec<_> = parts.into_iter().map(FeedPart::in_order).collect();
        parts.sort_unstable();
        parts.dedup();
        parts.shrink_to_fit();
        Self { parts }
    }

    /// All events.
    #[must_use]
    pub fn everything() -> Self {
        FeedPart::default().into()
    }

    /// Its parts.
    #[must_use]
    pub fn parts(&self) -> &[FeedPart] {
        &self.parts
    }

    /// Verifies the limits.
    ///
    /// # Errors
    /// [`InvalidFilter`].
    pub fn check(&self) -> Result<(), InvalidFilter> {
        if self.parts.is_empty() {
            return Err(InvalidFilter::Empty);
        }
        for part in &self.parts {
            let invalid = |name: &&str| {
                name.is_empty() || name.len() > NAME_BYTES_MAX || name.chars().any(char::is_control)
            };
            if let Some(name) = part.names().find(invalid) {
                return Err(InvalidFilter::Name { name: name.to_owned() });
            }
        }
        let many = |part: &FeedPart| part.names().count() > FILTER_NAMES_MAX;
        if self.parts.len() > FILTER_PARTS_MAX
            || self.parts.iter().any(many)
            || self.to_bytes().len() > FILTER_BYTES_MAX
        {
            return Err(InvalidFilter::TooLarge);
        }
        Ok(())
    }

    /// Whether the feed holds this event.
    #[must_use]
    pub fn matches<E>(&self, event: &Recorded<E>) -> bool {
        let has_tag = |tag: &str| event.tags().iter().any(|it| it == tag);
        self.means(event.stream().category(), event.event_type().as_str(), has_tag)
    }

    pub(crate) fn matches_record(&self, record: &RecordRef<'_>) -> bool {
        let category = record.stream.split('-').next().unwrap_or(record.stream);
        let has_tag = |tag: &str| record.tags().any(|it| it == tag);
        self.means(category, record.event_type, has_tag)
    }

    fn means(
        &self,
        category: &str,
        event_type: &str,
        has_tag: impl Fn(&str) -> bool + Copy,
    ) -> bool {
        self.parts.iter().any(|part| part.means(category, event_type, has_tag))
    }

    /// Whether it lets nothing through that `other` doesn't.
    pub(crate) fn is_within(&self, other: &Self) -> bool {
        self.parts.iter().all(|part| other.holds(part))
    }

    /// Whether it lets everything through that `part` means. What differs in names that neither knows is alike, and
    /// further tags take nothing away: so looking at each of the names, and at one other, is enough.
    fn holds(&self, part: &FeedPart) -> bool {
        let known = |names: fn(&FeedPart) -> &Names| {
            let mine = names(part);
            match mine.is_empty() {
                false => mine.iter().collect::<Vec<_>>(),
                true => self.parts.iter().flat_map(|it| names(it).iter()).chain([OTHER]).collect(),
            }
        };
        let (categories, types) = (known(|part| &part.categories), known(|part| &part.types));
        let has_tag = |tag: &str| part.tags.contains(tag);
        let mut events =
            categories.iter().flat_map(|category| types.iter().map(move |t| (category, t)));
        events.all(|(category, event_type)| self.means(category, event_type, has_tag))
    }

    /// Whether there can be an event that both let through.
    pub(crate) fn meets(&self, other: &Self) -> bool {
        self.parts.iter().any(|a| other.parts.iter().any(|b| a.meets(b)))
    }

    /// What both let through; it may have no part, or too many.
    pub(crate) fn and(&self, other: &Self) -> Self {
        let (own, others) = (self.reduced(), other.reduced());
        let pairs = own.parts.iter().flat_map(|a| others.parts.iter().filter_map(|b| a.and(b)));
        let all = Self::any_of(pairs);
        if all.parts.len() > PAIRS_MAX {
            return all;
        }
        all.reduced()
    }

    /// The same without the parts that lie in others.
    fn reduced(&self) -> Self {
        let is_in_another = |part: &FeedPart| {
            let mut others = self.parts.iter().filter(|other| *other != part);
            others.any(|other| part.is_within(other))
        };
        Self { parts: self.parts.iter().filter(|part| !is_in_another(part)).cloned().collect() }
    }

    /// As in frames.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        put_len(&mut out, self.parts.len());
        for part in &self.parts {
            for names in [&part.categories, &part.types, &part.tags] {
                put_len(&mut out, names.len());
                for name in names.iter() {
                    put_len(&mut out, name.len());
                    out.extend_from_slice(name.as_bytes());
                }
            }
        }
        out
    }

    /// Nothing is allocated for what is only claimed.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Self, FormatError> {
        let invalid = FormatError::Invalid("filter");
        let mut input = Decoder::new(bytes);
        let mut parts = Vec::new();
        for _ in 0..input.u16()? {
            let mut part = FeedPart::default();
            for names in [&mut part.categories, &mut part.types, &mut part.tags] {
                for _ in 0..input.u16()? {
                    names.push(input.text16("filter")?);
                }
            }
            parts.push(part);
        }
        let filter = Self { parts };
        let in_order = Self::any_of(filter.parts.iter().cloned());
        if !input.rest().is_empty() || filter.check().is_err() || in_order != filter {
            return Err(invalid);
        }
        Ok(in_order)
    }
}

fn put_len(out: &mut Vec<u8>, len: usize) {
    out.extend_from_slice(&u16::try_from(len).unwrap_or(u16::MAX).to_le_bytes());
}

impl std::fmt::Display for FeedFilter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (n, part) in self.parts.iter().enumerate() {
            f.write_str(if n == 0 { "" } else { ", or " })?;
            let lists =
                [("categories", &part.categories), ("types", &part.types), ("tags", &part.tags)];
            let named = lists.iter().filter(|(_, names)| !names.is_empty());
            let named: Vec<_> = named
                .map(|(what, names)| {
                    format!("{what} {}", names.iter().collect::<Vec<_>>().join(" "))
                })
                .collect();
            f.write_str(if named.is_empty() { "everything" } else { "" })?;
            f.write_str(&named.join(" and "))?;
        }
        Ok(())
    }
}

/// In JSON: a part, or a list of them.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum InJson {
    One(FeedPart),
    Any(Vec<FeedPart>),
}

impl Serialize for FeedFilter {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.parts.as_slice() {
            [part] => part.serialize(serializer),
            parts => parts.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for FeedFilter {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let filter = match InJson::deserialize(deserializer) {
            Ok(InJson::One(part)) => Self::from(part),
            Ok(InJson::Any(parts)) => Self::any_of(parts),
            Err(_) => {
                return Err(serde::de::Error::custom(
                    "a filter is {\"categories\": […], \"types\": […], \"tags\": […]}, or a list of these",
                ));
            }
        };
        filter.check().map_err(serde::de::Error::custom)?;
        Ok(filter)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NAMES: [&str; 4] = ["a", "b", "c", "d"];

    fn names() -> impl Strategy<Value = Vec<String>> {
        proptest::collection::vec((0..3_usize).prop_map(|n| NAMES[n].to_owned()), 0..3)
    }

    fn filter() -> impl Strategy<Value = FeedFilter> {
        let part = (names(), names(), names())
            .prop_map(|(c, t, g)| FeedPart::categories(c).and_types(t).and_tags(g));
        proptest::collection::vec(part, 1..4).prop_map(FeedFilter::any_of)
    }

    /// All kinds of events: of each name and of one that no filter names, with each set of tags.
    fn events() -> impl Iterator<Item = (&'static str, &'static str, u8)> {
        NAMES.into_iter().flat_map(|c| {
            NAMES.into_iter().flat_map(move |t| (0..16).map(move |tags| (c, t, tags)))
        })
    }

    fn lets(filter: &FeedFilter, (category, event_type, tags): (&str, &str, u8)) -> bool {
        let has_tag =
            |tag: &str| NAMES.iter().zip(0..).any(|(n, bit)| *n == tag && tags >> bit & 1 == 1);
        filter.means(category, event_type, has_tag)
    }

    proptest! {
        #[test]
        fn an_intersection_lets_through_what_both_do_and_containment_is_exact(a in filter(), b in filter()) {
            let both = a.and(&b);
            for event in events() {
                prop_assert_eq!(lets(&both, event), lets(&a, event) && lets(&b, event), "{:?}", event);
            }
            prop_assert!(both.is_within(&a) && both.is_within(&b));
            let within = events().all(|event| !lets(&a, event) || lets(&b, event));
            prop_assert_eq!(a.is_within(&b), within);
            prop_assert_eq!(a.meets(&b), !both.parts().is_empty());
            for part in a.parts() {
                let holds = b.parts().iter().map(|of| FeedFilter::from(of.clone()).holds(part));
                let is_within = b.parts().iter().map(|of| part.is_within(of));
                prop_assert!(holds.eq(is_within), "{:?}", part);
            }
            // Whoever asks again for what it was granted is granted the same.
            prop_assert_eq!(both.and(&b), both);
        }

        #[test]
        fn a_filter_survives_frames_and_json(a in filter()) {
            prop_assert_eq!(FeedFilter::from_bytes(&a.to_bytes()), Ok(a.clone()));
            let json = serde_json::to_string(&a).unwrap();
            prop_assert_eq!(serde_json::from_str::<FeedFilter>(&json).unwrap(), a);
        }
    }

    /// Parts that are alike but for their last category, so that each is compared with each to the end: one intersection took
    /// half a minute of a test's build, and three orders of magnitude less now.
    #[test]
    fn the_intersection_of_the_longest_filters_is_found_soon() {
        let name = |n: u32| char::from_u32(0x21 + n).unwrap().to_string();
        let of = |n: u32| {
            let categories = (0..31).chain([40 + n]).map(name);
            FeedPart::categories(categories).and_types((0..32).map(name))
        };
        let wanted = FeedFilter::any_of((0..10).map(of));
        assert_eq!(wanted.check(), Ok(()));
        let allowed = FeedFilter::any_of((0..25).map(|n| FeedPart::tags([name(n)])));
        let began = std::time::Instant::now();
        assert!(wanted.meets(&allowed));
        assert_eq!(wanted.and(&allowed).parts.len(), 250);
        assert!(began.elapsed() < std::time::Duration::from_secs(5), "{:?}", began.elapsed());
        // More isn't looked at, and is too large anyway.
        let allowed = FeedFilter::any_of((0..30).map(|n| FeedPart::tags([name(n)])));
        assert_eq!(wanted.and(&allowed).check(), Err(InvalidFilter::TooLarge));
    }

    /// Rights that lie in others were multiplied with all that was wanted before they were left out, and there were more
    /// pairs than are looked at: a feed that needs no more than 16 parts was refused.
    #[test]
    fn rights_that_lie_in_others_count_for_nothing() {
        let more = (0..16).map(|n| FeedPart::tags(["vip".to_owned(), format!("t{n}")]));
        let allowed = FeedFilter::any_of(more.chain([FeedPart::tags(["vip"])]));
        let wanted = FeedFilter::any_of((0..16).map(|n| FeedPart::tags([format!("w{n}")])));
        let both = wanted.and(&allowed);
        assert_eq!((both.parts.len(), both.check()), (16, Ok(())));
    }

    /// As they are kept for each subscriber: 64 KiB are promised, and a frame takes 40 of them.
    #[test]
    fn the_largest_filter_takes_a_few_kib() {
        let name = |n: u32| char::from_u32(0x21 + n).unwrap().to_string();
        let of = |n: u32| FeedPart::types((n..n + 39).map(name)).and_tags([name(n)]);
        let filter = FeedFilter::any_of((0..FILTER_PARTS_MAX as u32).map(of));
        assert_eq!(filter.check(), Ok(()));
        let filter = FeedFilter::from_bytes(&filter.to_bytes()).unwrap();
        let names = |part: &FeedPart| {
            let all = [&part.categories, &part.types, &part.tags];
            all.into_iter().map(Names::held_bytes).sum::<usize>() + size_of::<FeedPart>()
        };
        let held: usize = filter.parts.iter().map(names).sum();
        assert!(filter.parts.capacity() == filter.parts.len() && held < 8 << 10, "{held} bytes");
    }

    #[test]
    fn filters_that_are_too_large_or_mean_nothing_are_refused() {
        assert_eq!(FeedFilter::default().check(), Err(InvalidFilter::Empty));
        let many = FeedPart::types((0..=FILTER_NAMES_MAX).map(|n| n.to_string()));
        assert_eq!(FeedFilter::from(many.clone()).check(), Err(InvalidFilter::TooLarge));
        assert!(FeedFilter::from_bytes(&FeedFilter::from(many).to_bytes()).is_err());
        let long = FeedPart::tags((0..10).map(|n| n.to_string().repeat(250)));
        assert_eq!(FeedFilter::from(long).check(), Err(InvalidFilter::TooLarge));
        for name in ["", "a\nb"] {
            let invalid = FeedFilter::from(FeedPart::categories([name])).check();
            assert_eq!(invalid, Err(InvalidFilter::Name { name: name.to_owned() }));
        }
        let error = serde_json::from_str::<FeedFilter>(r#"{"catgories": ["a"]}"#).unwrap_err();
        assert!(error.to_string().contains("categories"), "{error}");
        assert!(FeedFilter::from_bytes(&[1, 0, 0]).is_err());
    }
}
