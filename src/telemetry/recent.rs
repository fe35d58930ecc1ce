//! The latest warnings and errors, as they were logged.

use std::{
    collections::VecDeque,
    fmt::{self, Write as _},
    sync::{Arc, Mutex, MutexGuard},
};

use jiff::Timestamp;
use serde::Serialize;
use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
    span::{Attributes, Id},
};
use tracing_subscriber::{Layer, layer::Context, registry::LookupSpan};

/// How many are kept.
const KEPT: usize = 20;
/// A text is cut here.
const LONGEST: usize = 600;

/// One that was logged.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Entry {
    /// When, the last time.
    pub at: Timestamp,
    /// `warn` or `error`.
    pub level: &'static str,
    /// The message, with what it is about.
    pub text: String,
    /// How often it was logged, since it first was among those that are kept.
    pub count: u64,
}

/// The latest warnings and errors; cloning it gives the same.
#[derive(Debug, Clone, Default)]
pub(crate) struct Recent(Arc<Mutex<VecDeque<Entry>>>);

impl Recent {
    /// The newest first.
    pub(crate) fn entries(&self) -> Vec<Entry> {
        self.lock().iter().rev().cloned().collect()
    }

    fn note(&self, at: Timestamp, level: &'static str, mut text: String) {
        if let Some((cut, _)) = text.char_indices().nth(LONGEST) {
            text.truncate(cut);
            text.push('…');
        }
        let mut entries = self.lock();
        let known = entries.iter().position(|entry| entry.text == text);
        let count = known.and_then(|known| entries.remove(known)).map_or(0, |entry| entry.count);
        if entries.len() == KEPT {
            entries.pop_front();
        }
        entries.push_back(Entry { at, level, text, count: count + 1 });
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Entry>> {
        self.0.lock().unwrap_or_else(|poison| poison.into_inner())
    }
}

/// Takes note of what is logged.
pub(crate) struct RecentLayer(pub Recent);

/// What a span says of itself.
struct SpanText(String);

impl<S> Layer<S> for RecentLayer
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        let mut fields = Text::default();
        attributes.record(&mut fields);
        span.extensions_mut().insert(SpanText(fields.rest));
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let level = match *event.metadata().level() {
            Level::ERROR => "error",
            Level::WARN => "warn",
            _ => return,
        };
        let mut text = Text::default();
        event.record(&mut text);
        for span in context.event_scope(event).into_iter().flatten() {
            if let Some(SpanText(fields)) = span.extensions().get::<SpanText>() {
                text.rest.push_str(fields);
            }
        }
        let Text { message, rest } = text;
        let about = rest.trim_start();
        let text = if about.is_empty() { message } else { format!("{message} ({about})") };
        self.0.note(Timestamp::now(), level, text);
    }
}

/// The message, and the other fields.
#[derive(Default)]
struct Text {
    message: String,
    rest: String,
}

impl Visit for Text {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a string does not fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.rest, " {name}={value:?}"),
        };
    }
}

#[cfg(test)]
mod tests {
    use tracing_subscriber::layer::SubscriberExt as _;

    use super::*;

    #[test]
    fn the_latest_warnings_are_kept_with_what_they_are_about_and_repeats_are_counted() {
        let recent = Recent::default();
        let subscriber = tracing_subscriber::registry().with(RecentLayer(recent.clone()));
        tracing::subscriber::with_default(subscriber, || {
            let span = tracing::info_span!("shard", shard = "shard-1", counter = 7);
            let _entered = span.enter();
            tracing::info!("all is well");
            for _ in 0..3 {
                tracing::warn!(attempts = 2, "a read failed");
            }
            tracing::error!("the shard stops");
        });
        let entries = recent.entries();
        let told: Vec<_> =
            entries.iter().map(|entry| (entry.level, entry.text.as_str(), entry.count)).collect();
        assert_eq!(
            told,
            [
                ("error", "the shard stops (shard=shard-1 counter=7)", 1),
                ("warn", "a read failed (attempts=2 shard=shard-1 counter=7)", 3),
            ]
        );
    }

    #[test]
    fn many_and_long_ones_are_bounded() {
        let recent = Recent::default();
        for n in 0..1000 {
            recent.note(Timestamp::UNIX_EPOCH, "warn", format!("{n} {}", "é".repeat(10_000)));
        }
        let entries = recent.entries();
        assert_eq!(entries.len(), KEPT);
        assert!(entries.iter().all(|entry| entry.text.chars().count() == LONGEST + 1));
        assert!(entries[0].text.starts_with("999 "));
    }
}
