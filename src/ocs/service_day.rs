//! The railway's day.

use jiff::{
    SignedDuration, Timestamp,
    civil::{Date, Time},
    tz::TimeZone,
};

use super::clock::EASTERN;

/// When a service day starts: 02:00 in America/New_York by default, so that the hours after midnight
/// still belong to the day before.
///
/// ```
/// use tramline::ocs::ServiceDay;
///
/// let after_midnight = "2025-07-03T00:30:00-04:00".parse()?;
/// assert_eq!(ServiceDay::default().date(after_midnight).to_string(), "2025-07-02");
/// # Ok::<(), jiff::Error>(())
/// ```
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

    /// When a trip is scheduled that `date`'s schedule has at `time`, such as the
    /// [`scheduled_departure`](super::NewTrip::scheduled_departure) of a NEW message.
    ///
    /// A time before the start of the day is in the night after it. As in GTFS it counts from noon minus
    /// twelve hours, so that it is right on the days on which the clock changes.
    ///
    /// ```
    /// use jiff::{Timestamp, civil::time};
    /// use tramline::ocs::ServiceDay;
    ///
    /// let day = ServiceDay::default();
    /// let received_at: Timestamp = "2025-07-02T06:00:08Z".parse()?; // 02:00:08 in Boston
    /// let departure = day.scheduled_at(day.date(received_at), time(0, 5, 0, 0));
    /// assert_eq!(departure, "2025-07-03T04:05:00Z".parse()?); // 00:05 of the night after
    /// # Ok::<_, jiff::Error>(())
    /// ```
    pub fn scheduled_at(&self, date: Date, time: Time) -> Timestamp {
        let noon = self.zone.to_ambiguous_timestamp(date.at(12, 0, 0, 0)).compatible();
        let mut after_noon = time.duration_since(Time::constant(12, 0, 0, 0));
        if time < self.starts_at {
            after_noon += SignedDuration::from_hours(24);
        }
        // It fails only at the ends of the calendar.
        noon.and_then(|noon| noon.checked_add(after_noon)).unwrap_or(Timestamp::MIN)
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
        Self::new(Time::constant(2, 0, 0, 0), EASTERN.clone())
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

    #[test]
    fn schedule_times_count_from_noon() {
        let day = ServiceDay::default();
        for (date, time, instant) in [
            ("2017-03-17", "05:12", "2017-03-17T09:12:00Z"),
            ("2025-07-02", "00:05", "2025-07-03T04:05:00Z"),
            ("2025-07-02", "01:59", "2025-07-03T05:59:00Z"),
            ("2025-07-02", "02:00", "2025-07-02T06:00:00Z"),
            ("2025-03-08", "01:30", "2025-03-09T06:30:00Z"),
            ("2025-03-09", "02:00", "2025-03-09T06:00:00Z"),
            ("2025-03-09", "03:00", "2025-03-09T07:00:00Z"),
            ("2025-03-09", "05:12", "2025-03-09T09:12:00Z"),
            ("2024-11-02", "01:30", "2024-11-03T05:30:00Z"),
            ("2024-11-03", "02:00", "2024-11-03T07:00:00Z"),
            ("2024-11-03", "05:12", "2024-11-03T10:12:00Z"),
        ] {
            let scheduled = day
                .scheduled_at(date.parse().expect("a date"), time.parse().expect("a time of day"));
            assert_eq!(scheduled, at(instant), "{date} {time}");
        }
    }

    #[test]
    fn schedule_times_follow_the_start_of_the_day() {
        let three = ServiceDay::new(Time::constant(3, 0, 0, 0), EASTERN.clone());
        let date = "2025-07-02".parse().expect("a date");
        let scheduled = three.scheduled_at(date, Time::constant(2, 30, 0, 0));
        assert_eq!(scheduled, at("2025-07-03T06:30:00Z"));
    }

    #[test]
    fn the_ends_of_the_calendar_do_not_panic() {
        let day = ServiceDay::default();
        for date in [Date::MIN, Date::MAX] {
            for time in [Time::MIN, Time::MAX] {
                day.scheduled_at(date, time);
            }
        }
    }
}
