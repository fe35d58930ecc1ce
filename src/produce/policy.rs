use std::{collections::BTreeMap, time::Duration};

/// When messages go: how long they may wait for others to share a record with.
///
/// It says when a record is due, not how large it becomes: while a record of the lane is on its way, what
/// arrives forms the next one, up to the record limit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchPolicy {
    /// How long a message of a type that `delays` does not name may wait. Default: 1 s.
    pub delay: Duration,
    /// How long a message of a type may wait, such as `TMOV`: not at all by default, because signs show
    /// where trains are.
    pub delays: BTreeMap<String, Duration>,
    /// So many messages do not wait any longer. Default: 500.
    pub messages: u64,
    /// A record of so many bytes does not wait any longer. Default: 256 KiB.
    pub bytes: u64,
}

impl Default for BatchPolicy {
    fn default() -> Self {
        Self {
            delay: Duration::from_secs(1),
            delays: BTreeMap::from([("TMOV".to_owned(), Duration::ZERO)]),
            messages: 500,
            bytes: 256 * 1024,
        }
    }
}

impl BatchPolicy {
    /// How long this message may wait. Its type is the second field of the OCS line.
    pub(super) fn delay_of(&self, raw: &[u8]) -> Duration {
        let kind = raw.split(|&byte| byte == b',').nth(1);
        let kind = kind.and_then(|kind| std::str::from_utf8(kind).ok()).map(str::trim);
        kind.and_then(|kind| self.delays.get(kind)).copied().unwrap_or(self.delay)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn movements_do_not_wait_and_others_as_long_as_their_type_may() {
        let mut policy = BatchPolicy::default();
        policy.delays.insert("RGPS".to_owned(), Duration::from_millis(200));
        for (raw, millis) in [
            ("1,TMOV,12:00:00,R", 0),
            ("1, TMOV ,12:00:00,R", 0),
            ("1,RGPS,12:00:00,G", 200),
            ("1,TSCH,12:00:00,R", 1000),
            ("TMOV", 1000),
            ("", 1000),
        ] {
            assert_eq!(policy.delay_of(raw.as_bytes()), Duration::from_millis(millis), "{raw}");
        }
        assert_eq!(policy.delay_of(b"1,\xff,x"), policy.delay);
    }
}
