//! The names in a filter, one behind the other: strings of their own would take twenty times as much.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Names, in order and without repetitions unless they were [pushed](Self::push).
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub(super) struct Names {
    text: String,
    /// Where each of them ends.
    ends: Vec<u32>,
}

impl Names {
    pub(super) fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &str> + Clone {
        let starts = std::iter::once(&0).chain(&self.ends);
        let each = starts.zip(&self.ends);
        each.map(|(start, end)| self.text.get(*start as usize..*end as usize).unwrap_or_default())
    }

    pub(super) fn contains(&self, name: &str) -> bool {
        self.iter().any(|it| it == name)
    }

    /// Whether all of them are among the others; both are in order.
    pub(super) fn is_subset(&self, of: &Self) -> bool {
        let mut others = of.iter();
        self.iter().all(|name| others.any(|other| other == name))
    }

    pub(super) fn push(&mut self, name: &str) {
        self.text.push_str(name);
        self.ends.push(u32::try_from(self.text.len()).unwrap_or(u32::MAX));
    }

    /// Adds some in their places.
    pub(super) fn add<T: Into<String>>(&mut self, names: impl IntoIterator<Item = T>) {
        let more: Vec<String> = names.into_iter().map(Into::into).collect();
        *self = self.iter().chain(more.iter().map(String::as_str)).collect::<Self>();
    }

    pub(super) fn in_order(&self) -> Self {
        self.iter().collect()
    }

    #[cfg(test)]
    pub(super) fn held_bytes(&self) -> usize {
        self.text.capacity() + self.ends.capacity() * size_of::<u32>()
    }
}

/// In order, without repetitions, and without room for more.
impl<'a> FromIterator<&'a str> for Names {
    fn from_iter<I: IntoIterator<Item = &'a str>>(names: I) -> Self {
        let mut all: Vec<&str> = names.into_iter().collect();
        all.sort_unstable();
        all.dedup();
        let mut names = Self {
            text: String::with_capacity(all.iter().map(|name| name.len()).sum()),
            ends: Vec::with_capacity(all.len()),
        };
        all.into_iter().for_each(|name| names.push(name));
        names
    }
}

impl Ord for Names {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.iter().cmp(other.iter())
    }
}

impl PartialOrd for Names {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl std::fmt::Debug for Names {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

impl Serialize for Names {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.iter())
    }
}

impl<'de> Deserialize<'de> for Names {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let names = Vec::<String>::deserialize(deserializer)?;
        let mut all = Self::default();
        names.iter().for_each(|name| all.push(name));
        Ok(all)
    }
}
