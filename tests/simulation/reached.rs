//! Which of the hard situations a run has met, so that the simulation can't become easy unnoticed.

macro_rules! rows {
    ($($row:ident: $what:literal, one in $seldom:literal;)+) => {
        /// A hard situation.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Row { $($row),+ }

        impl Row {
            /// All of them: what they are, and in how many runs there must be one.
            pub(crate) const ALL: &[(Self, &str, u64)] = &[$((Self::$row, $what, $seldom)),+];
        }
    };
}

rows! {
    Roll: "rolls", one in 1;
    Unknown: "failed writes and syncs", one in 2;
    DiskFull: "disk full while reserving", one in 50;
    Poisoned: "followers of a writer that failed", one in 50;
    TornTail: "torn tails", one in 10;
    Quarantined: "segments set aside", one in 100;
    Rewritten: "unproven batches written again", one in 2;
    Remade: "header pages remade", one in 500;
    Interrupted: "recoveries that failed", one in 10;
    InterruptedAgain: "recoveries that failed behind one that failed", one in 50;
    Overlapping: "overlapping groups", one in 4;
    CleanClose: "clean closes", one in 10;
    Repeated: "appends repeated after a crash", one in 4;
    MirrorCatchUp: "mirrors that were behind by a segment", one in 20;
    MirrorCrash: "crashes of mirrors", one in 4;
    MirrorLowered: "lowered marks of mirrors", one in 100;
    MirrorWitness: "mirrors with a witness", one in 100;
}

/// How often each was met.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Reached([u64; Row::ALL.len()]);

impl Reached {
    pub(crate) const NOTHING: Self = Self([0; Row::ALL.len()]);

    pub(crate) fn note(&mut self, row: Row) {
        self.note_if(row, true);
    }

    pub(crate) fn note_if(&mut self, row: Row, so: bool) {
        self.0[row as usize] += u64::from(so);
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.0.iter_mut().zip(other.0).for_each(|(all, more)| *all += more);
    }

    /// One line each, and those that were met too seldom in so many runs.
    pub(crate) fn judge(&self, runs: u64) -> (String, Vec<&'static str>) {
        let mut text = String::new();
        let mut seldom = Vec::new();
        for ((_, what, one_in), count) in Row::ALL.iter().zip(self.0) {
            text += &format!("  {count:>9} {what}\n");
            if count < runs / one_in {
                seldom.push(*what);
            }
        }
        (text, seldom)
    }
}
