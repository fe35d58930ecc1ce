//! How far this host's clock is from that of AWS, by the `Date` of its answers.

use std::sync::{Arc, Mutex, MutexGuard};

use aws_sdk_kinesis::{
    config::{
        ConfigBag, Intercept, RuntimeComponents,
        interceptors::BeforeDeserializationInterceptorContextRef,
    },
    error::BoxError,
};
use jiff::{SignedDuration, Timestamp};

use crate::aws;

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
        if let Some(skew) = aws::clock_skew(context.response(), Timestamp::now()) {
            *self.lock() = Some(skew);
        }
        Ok(())
    }
}

pub(super) fn is_wrong(skew: SignedDuration) -> bool {
    skew.abs() > TOLERANCE
}
