//! When a message of a log is due. Pure.

use std::{str::FromStr, time::Duration};

use jiff::{SignedDuration, Timestamp, civil::Time};

use super::entry::At;
use crate::ocs::ArchiveLine;

/// A log is not quite in the order of its times: senders' clocks differ. A time that is further back
/// than this begins something new: another day, or the hour that autumn has twice.
const DISORDER: SignedDuration = SignedDuration::from_mins(30);
const DAY: SignedDuration = SignedDuration::from_hours(24);

/// How fast a log is replayed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Speed {
    /// As fast as the receiver takes it.
    Max,
    /// So many times as fast as it was.
    Times(f64),
}

impl FromStr for Speed {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.parse() {
            _ if text == "max" => Ok(Self::Max),
            Ok(0.0) => Ok(Self::Max),
            Ok(times) if (0.001..=1e6).contains(&times) => Ok(Self::Times(times)),
            _ => Err("write how many times as fast, from 0.001 to 1000000, or max"),
        }
    }
}

impl Speed {
    /// How long something takes that took `original`.
    pub(super) fn scaled(self, original: Duration) -> Duration {
        match self {
            Self::Max => Duration::ZERO,
            Self::Times(times) => {
                let scaled = Duration::try_from_secs_f64(original.as_secs_f64() / times);
                scaled.unwrap_or(Duration::MAX)
            }
        }
    }
}

/// Gives each line of a log the time at which it is due.
pub(super) struct Pace {
    speed: Speed,
    /// How long after the first line the latest one was, at the original pace.
    elapsed: Duration,
    /// The latest time of those with a date.
    instant: Option<Timestamp>,
    /// The latest of those without.
    time_of_day: Option<Time>,
}

impl Pace {
    pub(super) fn new(speed: Speed) -> Self {
        Self { speed, elapsed: Duration::ZERO, instant: None, time_of_day: None }
    }

    /// How long after the first line this one is due.
    pub(super) fn due(&mut self, at: At) -> Duration {
        let instant = match at {
            At::Instant(instant) => Some(instant),
            At::Local(received_at) => ArchiveLine { received_at, raw: &[] }.instant(self.instant),
            At::TimeOfDay(time) => {
                let ahead = self.time_of_day.map(|latest| time_of_day_ahead(latest, time));
                if self.go(ahead) {
                    self.time_of_day = Some(time);
                }
                return self.speed.scaled(self.elapsed);
            }
        };
        if let Some(instant) = instant {
            let ahead = self.instant.map(|latest| instant.duration_since(latest));
            if self.go(ahead) {
                self.instant = Some(instant);
            }
        }
        self.speed.scaled(self.elapsed)
    }

    /// Counts how far a time is ahead of the latest one, and says whether it is the latest now.
    fn go(&mut self, ahead: Option<SignedDuration>) -> bool {
        let Some(ahead) = ahead else { return true };
        // What is behind is due at once.
        self.elapsed += Duration::try_from(ahead).unwrap_or(Duration::ZERO);
        ahead.is_positive() || ahead < -DISORDER
    }
}

/// Without a date, the nearest is meant: half a day ahead or behind at most.
fn time_of_day_ahead(latest: Time, time: Time) -> SignedDuration {
    let ahead = time.duration_since(latest);
    let half = DAY / 2;
    if ahead > half {
        ahead - DAY
    } else if ahead <= -half {
        ahead + DAY
    } else {
        ahead
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn due(speed: Speed, times: &[At]) -> Vec<f64> {
        let mut pace = Pace::new(speed);
        times.iter().map(|at| pace.due(*at).as_secs_f64()).collect()
    }

    fn instants(times: &[&str]) -> Vec<At> {
        times.iter().map(|time| At::Instant(time.parse().expect("a time"))).collect()
    }

    fn times_of_day(times: &[&str]) -> Vec<At> {
        times.iter().map(|time| At::TimeOfDay(time.parse().expect("a time"))).collect()
    }

    #[test]
    fn gaps_are_the_original_ones_divided_by_the_speed() {
        let times =
            instants(&["2025-07-02T06:00:00Z", "2025-07-02T06:00:00.5Z", "2025-07-02T06:01:00Z"]);
        assert_eq!(due(Speed::Times(1.0), &times), [0.0, 0.5, 60.0]);
        assert_eq!(due(Speed::Times(100.0), &times), [0.0, 0.005, 0.6]);
        assert_eq!(due(Speed::Times(0.5), &times), [0.0, 1.0, 120.0]);
        assert_eq!(due(Speed::Max, &times), [0.0, 0.0, 0.0]);
    }

    #[test]
    fn a_line_that_is_a_little_behind_is_due_at_once_and_costs_no_time() {
        let times = times_of_day(&["10:00:05", "10:00:04", "10:00:05", "10:00:04", "10:00:06"]);
        assert_eq!(due(Speed::Times(1.0), &times), [0.0, 0.0, 0.0, 0.0, 1.0]);
    }

    #[test]
    fn midnight_and_a_new_stretch_are_gone_over() {
        let times = times_of_day(&["23:59:59", "00:00:01", "23:59:59", "00:00:02"]);
        assert_eq!(due(Speed::Times(1.0), &times), [0.0, 2.0, 2.0, 3.0]);
        // The clock was set back, and nothing shows it but the line.
        let times = times_of_day(&["01:59:59", "01:00:00", "01:00:01"]);
        assert_eq!(due(Speed::Times(1.0), &times), [0.0, 0.0, 1.0]);
        let times =
            instants(&["2025-07-02T06:00:00Z", "2025-07-01T06:00:00Z", "2025-07-01T06:00:03Z"]);
        assert_eq!(due(Speed::Times(1.0), &times), [0.0, 0.0, 3.0]);
    }

    #[test]
    fn an_archive_keeps_its_gaps_when_the_clock_changes() {
        let local = |time: &str| At::Local(time.parse().expect("a time"));
        let autumn = ["2022-11-06T01:59:59", "2022-11-06T01:00:00", "2022-11-06T02:00:00"];
        assert_eq!(due(Speed::Times(1.0), &autumn.map(local)), [0.0, 1.0, 3601.0]);
        let spring = ["2025-03-09T01:59:59", "2025-03-09T03:00:00"];
        assert_eq!(due(Speed::Times(1.0), &spring.map(local)), [0.0, 1.0]);
    }

    #[test]
    fn speeds_are_numbers_or_max() {
        assert_eq!("max".parse(), Ok(Speed::Max));
        assert_eq!("0".parse(), Ok(Speed::Max));
        assert_eq!("2.5".parse(), Ok(Speed::Times(2.5)));
        for wrong in ["", "-1", "NaN", "inf", "1e9", "fast", "1x"] {
            assert!(wrong.parse::<Speed>().is_err(), "{wrong}");
        }
    }
}
