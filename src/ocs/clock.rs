//! The wall clock of OCS, which shows neither date nor time zone.

use std::sync::LazyLock;

use jiff::{
    SignedDuration, Timestamp,
    civil::{Date, Time},
    tz::{AmbiguousOffset, TimeZone},
};

pub(super) static EASTERN: LazyLock<TimeZone> = LazyLock::new(|| {
    TimeZone::get("America/New_York")
        .expect("the time zone database is compiled in and has America/New_York")
});

/// A sender's clock may be this far ahead of ours. What is further ahead is of the day before.
const TOLERANCE: SignedDuration = SignedDuration::from_hours(1);

/// When a wall clock showed a time of day.
enum Shown {
    Once(Timestamp),
    /// The clock was set back.
    Twice(Timestamp, Timestamp),
    /// The clock was set forward past it, at this instant.
    Skipped(Timestamp),
}

/// The instant that `time_of_day` means in a message received at `received_at`.
///
/// The rule is that of Orbit, with which it agrees but for one case: shortly before midnight a time of
/// day shortly after it is tomorrow's, where Orbit takes it for one of almost a day ago.
pub(super) fn instant(time_of_day: Time, received_at: Timestamp) -> Timestamp {
    let today = received_at.to_zoned(EASTERN.clone()).date();
    let nearest_on = |date| match shown(date, time_of_day)? {
        Shown::Once(at) => Some(at),
        Shown::Twice(first, second) => {
            let distance = |at: Timestamp| at.duration_since(received_at).abs();
            Some(if distance(second) < distance(first) { second } else { first })
        }
        Shown::Skipped(_) => None,
    };
    let is_near = |at: &Timestamp| at.duration_since(received_at) < TOLERANCE;
    let tomorrow = today.tomorrow().ok().and_then(nearest_on).filter(is_near);
    tomorrow
        .or_else(|| nearest_on(today).filter(is_near))
        .or_else(|| {
            Some(match shown(today.yesterday().ok()?, time_of_day)? {
                Shown::Once(at) | Shown::Twice(_, at) | Shown::Skipped(at) => at,
            })
        })
        // Only at the ends of the calendar.
        .unwrap_or(received_at)
}

/// `None` at the ends of the calendar.
fn shown(date: Date, time_of_day: Time) -> Option<Shown> {
    let at = EASTERN.to_ambiguous_timestamp(date.to_datetime(time_of_day));
    let offset = at.offset();
    let (first, second) = (at.earlier().ok()?, at.later().ok()?);
    Some(match offset {
        AmbiguousOffset::Unambiguous { .. } => Shown::Once(first),
        AmbiguousOffset::Fold { .. } => Shown::Twice(first, second),
        // The one reads the clock as if it had been set forward already, the other as if it never was.
        AmbiguousOffset::Gap { .. } => Shown::Skipped(
            EASTERN.following(first).next().map_or(second, |change| change.timestamp()),
        ),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_time_of_day_gets_the_date_that_orbit_gives_it() {
        for (received_at, time_of_day, instant) in [
            ("2025-04-08T06:00:00-04:00", "05:00:00", "2025-04-08T09:00:00Z"),
            ("2025-04-08T22:00:00-04:00", "21:00:00", "2025-04-09T01:00:00Z"),
            ("2025-04-08T06:00:00-04:00", "06:59:59", "2025-04-08T10:59:59Z"),
            ("2025-04-08T06:00:00-04:00", "07:00:00", "2025-04-07T11:00:00Z"),
            ("2025-04-08T22:00:00-04:00", "23:00:00", "2025-04-08T03:00:00Z"),
            ("2025-03-09T01:59:59-05:00", "03:00:00", "2025-03-09T07:00:00Z"),
            ("2025-03-09T01:59:59-05:00", "03:59:59", "2025-03-08T08:59:59Z"),
            ("2025-03-09T01:59:59-05:00", "02:00:00", "2025-03-08T07:00:00Z"),
            ("2025-03-10T00:00:00-04:00", "02:30:00", "2025-03-09T07:00:00Z"),
            ("2024-11-03T01:29:59-04:00", "01:00:00", "2024-11-03T05:00:00Z"),
            ("2024-11-03T01:30:00-04:00", "01:00:00", "2024-11-03T05:00:00Z"),
            ("2024-11-03T01:30:01-04:00", "01:00:00", "2024-11-03T06:00:00Z"),
            ("2024-11-03T00:00:00-04:00", "01:00:00", "2024-11-02T05:00:00Z"),
            ("2024-11-04T00:00:00-05:00", "01:30:00", "2024-11-03T06:30:00Z"),
            ("2025-04-08T00:00:00-04:00", "23:59:59", "2025-04-08T03:59:59Z"),
        ] {
            assert_eq!(of(time_of_day, received_at), at(instant), "{time_of_day} {received_at}");
        }
    }

    #[test]
    fn a_clock_that_is_a_little_ahead_at_midnight_is_not_a_day_behind() {
        assert_eq!(of("00:00:01", "2025-04-07T23:59:59-04:00"), at("2025-04-08T04:00:01Z"));
        assert_eq!(of("00:30:00", "2025-04-07T23:30:00-04:00"), at("2025-04-07T04:30:00Z"));
    }

    fn of(time_of_day: &str, received_at: &str) -> Timestamp {
        instant(time_of_day.parse().expect("a time of day"), at(received_at))
    }

    fn at(text: &str) -> Timestamp {
        text.parse().expect("a time")
    }

    proptest! {
        #[test]
        fn the_clock_showed_it_within_the_day_before_or_the_hour_after_the_receipt(
            received_at in 0..4_102_444_800i64,
            second in 0..86_400i64,
        ) {
            let received_at = Timestamp::from_second(received_at).expect("in range");
            let time_of_day = Time::midnight() + SignedDuration::from_secs(second);
            let instant = instant(time_of_day, received_at);
            let ahead = instant.duration_since(received_at);
            prop_assert!(ahead < TOLERANCE && ahead > SignedDuration::from_hours(-25), "{ahead}");
            let showed = instant.to_zoned(EASTERN.clone()).time();
            let was_skipped = time_of_day.hour() == 2 && showed == Time::constant(3, 0, 0, 0);
            prop_assert!(showed == time_of_day || was_skipped, "{showed}");
        }

        #[test]
        fn no_time_makes_it_panic(received_at in any::<i64>(), second in 0..86_400i64) {
            let ends = [Timestamp::MIN.as_second(), Timestamp::MAX.as_second()];
            let received_at = received_at.clamp(ends[0], ends[1]);
            let received_at = Timestamp::from_second(received_at).expect("in range");
            instant(Time::midnight() + SignedDuration::from_secs(second), received_at);
        }
    }
}
