//! How far this host's clock is from that of AWS, by the `Date` of its answers.

use std::sync::{Arc, Mutex, MutexGuard};

use aws_sdk_kinesis::{
    config::{
        ConfigBag, Intercept, RuntimeComponents,
        interceptors::BeforeDeserializationInterceptorContextRef,
    },
    error::BoxError,
};
use jiff::{SignedDuration, Timestamp, fmt::rfc2822::DateTimeParser};

/// From here on a clock counts as wrong. AWS tells whole seconds, and its answer was on its way.
const TOLERANCE: SignedDuration = SignedDuration::from_secs(30);

/// Takes note of what AWS says the time is; cloning it gives the same.
#[derive(Debug, Clone, Default)]
pub(super) struct Clock(Arc<Mutex<Option<SignedDuration>>>);

impl Clock {
    /// How far this host's clock is ahead of that of the last answer.
    pub(super) fn skew(&self) -> Option<SignedDuration> {
        *self.lock()
    }

    fn lock(&self) -> MutexGuard<'_, Option<SignedDuration>> {
        self.0.lock().unwrap_or_else(|poison| poison.into_inner())
    }
}

impl Intercept for Clock {
    fn name(&self) -> &'static str {
        "Clock"
    }

    fn read_before_deserialization(
        &self,
        context: &BeforeDeserializationInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        if let Some(date) = context.response().headers().get("date")
            && let Some(skew) = skew(date, Timestamp::now())
        {
            *self.lock() = Some(skew);
        }
        Ok(())
    }
}

/// How far `now` is ahead of the date of an answer.
fn skew(date: &str, now: Timestamp) -> Option<SignedDuration> {
    let theirs = DateTimeParser::new().parse_timestamp(date).ok()?;
    Some(now.duration_since(theirs))
}

pub(super) fn is_wrong(skew: SignedDuration) -> bool {
    skew.abs() > TOLERANCE
}

/// In words.
pub(super) fn told(skew: SignedDuration) -> String {
    match skew.as_secs() {
        -1..=1 => "as that of AWS, to a second".to_owned(),
        ahead @ 2.. => format!("{ahead} s ahead of that of AWS"),
        behind => format!("{} s behind that of AWS", behind.unsigned_abs()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_date_of_an_answer_tells_how_far_the_clock_is_off() {
        let date = "Wed, 02 Jul 2025 15:00:00 GMT";
        let at = |text: &str| text.parse().expect("a time");
        let ahead = skew(date, at("2025-07-02T15:10:00Z")).expect("a date");
        assert_eq!(told(ahead), "600 s ahead of that of AWS");
        assert!(is_wrong(ahead) && is_wrong(-ahead));
        assert_eq!(told(-ahead), "600 s behind that of AWS");
        let right = skew(date, at("2025-07-02T15:00:00.9Z")).expect("a date");
        assert!(!is_wrong(right));
        assert_eq!(told(right), "as that of AWS, to a second");
        assert_eq!(skew("yesterday", Timestamp::UNIX_EPOCH), None);
    }
}
