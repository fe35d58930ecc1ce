use crate::ocs::Event;

/// Forms records: JSON arrays of events, up to a size.
#[derive(Debug)]
pub(super) struct Batcher {
    limit_bytes: usize,
    json: Vec<u8>,
    events: u64,
}

/// A record's data.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Packed {
    pub data: Vec<u8>,
    pub events: u64,
}

impl Batcher {
    /// For records whose data is at most `limit_bytes`.
    pub(super) fn new(limit_bytes: usize) -> Self {
        Self { limit_bytes, json: Vec::new(), events: 0 }
    }

    /// Adds an event, or gives it back if the record would become too large: then it opens the next
    /// one. A record takes its first event whatever its size, so that none is stuck.
    pub(super) fn push(&mut self, event: Event) -> Result<(), Event> {
        let separator_and_end = 2;
        let size_bytes = self.json.len() + event.json.len() + separator_and_end;
        if self.events > 0 && size_bytes > self.limit_bytes {
            return Err(event);
        }
        self.json.push(if self.events == 0 { b'[' } else { b',' });
        self.json.extend_from_slice(&event.json);
        self.events += 1;
        Ok(())
    }

    /// The record, and an empty batcher; `None` if no event was added.
    pub(super) fn take(&mut self) -> Option<Packed> {
        if self.events == 0 {
            return None;
        }
        let mut data = std::mem::take(&mut self.json);
        data.push(b']');
        Some(Packed { data, events: std::mem::take(&mut self.events) })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn event(json: &str) -> Event {
        Event { id: String::new(), json: json.into() }
    }

    #[test]
    fn one_event_is_an_array_too() {
        let mut batcher = Batcher::new(100);
        assert_eq!(batcher.take(), None);
        assert_eq!(batcher.push(event("{}")), Ok(()));
        assert_eq!(batcher.take(), Some(Packed { data: b"[{}]".to_vec(), events: 1 }));
        assert_eq!(batcher.take(), None);
    }

    proptest! {
        #[test]
        fn p7_records_stay_under_the_limit_and_hold_every_event_in_order(
            sizes in prop::collection::vec(0usize..60, 1..40),
            limit in 70usize..200,
        ) {
            let mut batcher = Batcher::new(limit);
            let mut records = Vec::new();
            for (n, size) in sizes.iter().enumerate() {
                let json = format!("\"{n}{}\"", "x".repeat(*size));
                if let Err(event) = batcher.push(event(&json)) {
                    records.extend(batcher.take());
                    prop_assert_eq!(batcher.push(event), Ok(()));
                }
            }
            records.extend(batcher.take());

            let mut seen = Vec::new();
            for record in &records {
                prop_assert!(record.data.len() <= limit);
                let texts: Vec<String> = serde_json::from_slice(&record.data).expect("JSON");
                prop_assert_eq!(texts.len() as u64, record.events);
                seen.extend(texts.iter().map(|text| text.trim_end_matches('x').to_owned()));
            }
            let sent: Vec<String> = (0..sizes.len()).map(|n| n.to_string()).collect();
            prop_assert_eq!(seen, sent);
        }
    }
}
