//! The railway's day.

use jiff::{
    Timestamp,
    civil::{Date, Time},
    tz::TimeZone,
};

/// When a service day starts: 02:00 in America/New_York by default, so that the hours after midnight
/// still belong to the day before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceDay {
    starts_at: Time,
    zone: TimeZone,
}

impl ServiceDay {
    /// A service day that starts at `starts_at` by the wall clock of `zone`.
    pub fn new(starts_at: Time, zone: TimeZone) -> Self {
        Self { starts_at, zone }
    }

    /// The service day that `at` belongs to, by the date on which it started.
    pub fn date(&self, at: Timestamp) -> Date {
        let today = at.to_zoned(self.zone.clone()).date();
        if at < self.start_of(today) { today.yesterday().unwrap_or(today) } else { today }
    }

    /// The moment at which the service day that `at` belongs to started.
    pub fn start(&self, at: Timestamp) -> Timestamp {
        self.start_of(self.date(at))
    }

    /// Where the clock skips the start (02:00 on the spring change), the day starts after the gap.
    fn start_of(&self, date: Date) -> Timestamp {
        let start = date.to_datetime(self.starts_at);
        match self.zone.to_ambiguous_timestamp(start).compatible() {
            Ok(start) => start,
            // Only at the ends of the calendar, the years -9999 and 9999.
            Err(_) => Timestamp::MIN,
        }
    }
}

impl Default for ServiceDay {
    fn default() -> Self {
        let zone = TimeZone::get("America/New_York")
            .expect("the time zone database is compiled in and has America/New_York");
        Self::new(Time::constant(2, 0, 0, 0), zone)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().expect("a time")
    }

    #[test]
    fn the_hours_after_midnight_belong_to_the_day_before() {
        let day = ServiceDay::default();
        // From the archive's own table of service days.
        for (time, date) in [
            ("2022-03-01T04:59:59Z", "2022-02-28"),
            ("2022-03-01T05:00:02Z", "2022-02-28"),
            ("2022-03-01T06:59:59Z", "2022-02-28"),
            ("2022-03-01T07:00:00Z", "2022-03-01"),
            ("2022-11-06T05:30:00Z", "2022-11-05"),
            ("2022-11-06T06:30:00Z", "2022-11-05"),
        ] {
            assert_eq!(day.date(at(time)).to_string(), date, "{time}");
        }
    }

    #[test]
    fn the_day_starts_at_two_on_both_clock_changes_too() {
        let day = ServiceDay::default();
        for (time, start) in [
            ("2025-07-02T15:00:00Z", "2025-07-02T06:00:00Z"),
            // In spring 02:00 does not exist: the day starts when the clock has jumped to 03:00.
            ("2025-03-09T06:59:59Z", "2025-03-08T07:00:00Z"),
            ("2025-03-09T07:00:00Z", "2025-03-09T07:00:00Z"),
            ("2025-03-09T15:00:00Z", "2025-03-09T07:00:00Z"),
            // In autumn the hour from 01:00 comes twice, and both belong to the day before.
            ("2024-11-03T05:59:59Z", "2024-11-02T06:00:00Z"),
            ("2024-11-03T06:59:59Z", "2024-11-02T06:00:00Z"),
            ("2024-11-03T07:00:00Z", "2024-11-03T07:00:00Z"),
        ] {
            assert_eq!(day.start(at(time)), at(start), "{time}");
        }
    }
}
