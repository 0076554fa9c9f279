//! Times as text.

use std::fmt;

use crate::calendar::civil;

const DAY_SECONDS: i64 = 86_400;

/// A moment in UTC. As text it is of RFC 3339, with so many digits behind the second as it has: none, 3, 6 or 9.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Moment {
    /// Since 1970.
    pub(super) seconds: i64,
    pub(super) nanos: u32,
}

impl Moment {
    /// From a date, or a date and a time of the day that ends with `Z`.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (date, time) = match text.split_once('T') {
            Some((date, time)) => (date, time.strip_suffix('Z')?),
            None => (text, "00:00:00"),
        };
        let (sign, date) = date.strip_prefix('-').map_or((1, date), |date| (-1, date));
        let [year, month, day] = numbers(date, '-')?;
        let (time, fraction) = time.split_once('.').unwrap_or((time, "0"));
        let [hour, minute, second] = numbers(time, ':')?;
        let is_date = (1..=12).contains(&month) && (1..=31).contains(&day);
        let is_time = hour < 24 && minute < 60 && second < 60 && fraction.len() <= 9;
        if !is_date || !is_time || !are_digits(fraction) {
            return None;
        }
        let date = (sign * year, month, day);
        let day = day_of(date).filter(|day| civil(*day) == date)?;
        let in_day = hour * 3600 + minute * 60 + second;
        let seconds = day.checked_mul(DAY_SECONDS)?.checked_add(in_day)?;
        Some(Self { seconds, nanos: format!("{fraction:0<9}").parse().ok()? })
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (days, in_day) =
            (self.seconds.div_euclid(DAY_SECONDS), self.seconds.rem_euclid(DAY_SECONDS));
        let (year, month, day) = civil(days);
        let (hour, minute, second) = (in_day / 3600, in_day / 60 % 60, in_day % 60);
        let sign = if year < 0 { "-" } else { "" };
        let year = year.unsigned_abs();
        write!(f, "{sign}{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}")?;
        match self.nanos {
            0 => write!(f, "Z"),
            nanos if nanos % 1_000_000 == 0 => write!(f, ".{:03}Z", nanos / 1_000_000),
            nanos if nanos % 1_000 == 0 => write!(f, ".{:06}Z", nanos / 1_000),
            nanos => write!(f, ".{nanos:09}Z"),
        }
    }
}

fn are_digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

fn numbers(text: &str, between: char) -> Option<[i64; 3]> {
    let number = |text: &str| are_digits(text).then(|| text.parse().ok()).flatten();
    let numbers = text.split(between).map(number).collect::<Option<Vec<i64>>>()?;
    numbers.try_into().ok()
}

/// The day with this date; of one that doesn't exist, some other. `None` if it is too far away.
fn day_of((year, month, day): (i64, i64, i64)) -> Option<i64> {
    let is_early = month <= 2;
    let year = year.checked_sub(i64::from(is_early))?;
    let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let month_from_march = if is_early { month + 9 } else { month.checked_sub(3)? };
    let day_of_year = month_from_march.checked_mul(153)?.checked_add(2)? / 5 + day;
    let in_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 1;
    era.checked_mul(146_097)?.checked_add(in_era)?.checked_sub(719_468)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn dates_and_times_are_read_and_what_is_none_is_not() {
        let parsed = |text: &str| Moment::parse(text).map(|it| (it.seconds, it.nanos));
        assert_eq!(parsed("1970-01-01T00:00:00Z"), Some((0, 0)));
        assert_eq!(parsed("1969-12-31T23:59:59.5Z"), Some((-1, 500_000_000)));
        assert_eq!(parsed("2000-02-29"), Some((951_782_400, 0)));
        for wrong in [
            "2001-02-29",
            "2000-13-01",
            "2000-00-01",
            "2000-01-00",
            "2000-01-32",
            "2000-01",
            "x",
            "2000-01-01T00:00:00",
            "2000-01-01T24:00:00Z",
            "2000-01-01T00:60:00Z",
            "+2000-01-01",
            "2000-01-01T00:00:00.Z",
            "2000-01-01T00:00:00.0000000001Z",
            "9223372036854775807-01-01",
            "2000-9223372036854775807-01",
            "2000-01-9223372036854775807",
            "",
        ] {
            assert_eq!(parsed(wrong), None, "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            seconds in -9_000_000_000_000_000_i64..9_000_000_000_000_000, nanos in 0_u32..1_000_000_000,
        ) {
            for nanos in [nanos, nanos / 1_000 * 1_000, nanos / 1_000_000 * 1_000_000, 0] {
                let moment = Moment { seconds, nanos };
                prop_assert_eq!(Moment::parse(&moment.to_string()), Some(moment), "{}", moment);
            }
        }
    }
}
