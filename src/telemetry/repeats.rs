//! Leaves repeats out of the log, and counts them.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use tracing::{
    Event, Level, Metadata,
    callsite::Identifier,
    field::{Field, Visit},
};
use tracing_subscriber::layer::{Context, Filter};

/// How many lines of one place in the code are written ...
const MOST: u32 = 50;
/// ... in this time.
const WINDOW: Duration = Duration::from_secs(60);
/// A text is cut here.
const LONGEST: usize = 200;

/// What was written, and left out, of each place that logs. There are as many as the code has.
#[derive(Debug, Default)]
struct Repeats(HashMap<Identifier, Site>);

#[derive(Debug)]
struct Site {
    /// When the window began.
    began: Instant,
    written: u32,
    left_out: u64,
    /// The first line that was left out.
    text: String,
}

/// Lines of one place that were left out.
#[derive(Debug, PartialEq, Eq)]
struct LeftOut {
    lines: u64,
    text: String,
}

impl Repeats {
    /// Whether a line is written. `text` is asked for the first one that is not.
    fn admit(&mut self, site: Identifier, now: Instant, text: impl FnOnce() -> String) -> bool {
        let new = Site { began: now, written: 0, left_out: 0, text: String::new() };
        let site = self.0.entry(site).or_insert(new);
        // What was left out is told before its place begins anew.
        if site.left_out == 0 && now.duration_since(site.began) >= WINDOW {
            (site.began, site.written) = (now, 0);
        }
        if site.written < MOST {
            site.written += 1;
            return true;
        }
        if site.left_out == 0 {
            site.text = text();
        }
        site.left_out += 1;
        false
    }

    /// What was left out in windows that are over.
    fn ended(&mut self, now: Instant) -> Vec<LeftOut> {
        let over = self
            .0
            .values_mut()
            .filter(|site| site.left_out > 0 && now.duration_since(site.began) >= WINDOW);
        over.map(|site| {
            (site.began, site.written) = (now, 0);
            let text = std::mem::take(&mut site.text);
            LeftOut { lines: std::mem::take(&mut site.left_out), text }
        })
        .collect()
    }
}

/// Lets through the first lines of each place in a minute, and all of those at debug level; cloning it
/// gives the same.
#[derive(Debug, Clone, Default)]
pub(crate) struct RepeatFilter(Arc<Mutex<Repeats>>);

impl RepeatFilter {
    /// Logs what was left out.
    pub(crate) fn tell(&self) {
        let ended = self.lock().ended(Instant::now());
        for LeftOut { lines, text } in ended {
            tracing::warn!(lines, "log lines like this one were left out: {text}");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Repeats> {
        self.0.lock().unwrap_or_else(|poison| poison.into_inner())
    }
}

impl<S> Filter<S> for RepeatFilter {
    fn enabled(&self, _: &Metadata<'_>, _: &Context<'_, S>) -> bool {
        true
    }

    fn event_enabled(&self, event: &Event<'_>, _: &Context<'_, S>) -> bool {
        let metadata = event.metadata();
        // Who asks for details wants all of them.
        *metadata.level() > Level::INFO
            || self.lock().admit(metadata.callsite(), Instant::now(), || message(event))
    }
}

fn message(event: &Event<'_>) -> String {
    let mut text = Text(String::new());
    event.record(&mut text);
    let Text(mut text) = text;
    if let Some((cut, _)) = text.char_indices().nth(LONGEST) {
        text.truncate(cut);
        text.push('…');
    }
    text
}

struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.0 = format!("{value:?}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use tracing_subscriber::{Layer as _, fmt::MakeWriter, layer::SubscriberExt as _};

    use super::*;
    use crate::telemetry::{Recent, RecentLayer};

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Written {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().expect("a lock").write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl MakeWriter<'_> for Written {
        type Writer = Self;

        fn make_writer(&self) -> Self {
            self.clone()
        }
    }

    impl Written {
        fn lines(&self) -> Vec<String> {
            let bytes = self.0.lock().expect("a lock").clone();
            String::from_utf8(bytes).expect("text").lines().map(str::to_owned).collect()
        }
    }

    /// Two places in the code.
    fn sites() -> [Identifier; 2] {
        struct Sites(Mutex<Vec<Identifier>>);
        impl tracing::Subscriber for Sites {
            fn enabled(&self, _: &Metadata<'_>) -> bool {
                true
            }
            fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
                tracing::span::Id::from_u64(1)
            }
            fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
            fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
            fn event(&self, event: &Event<'_>) {
                self.0.lock().expect("a lock").push(event.metadata().callsite());
            }
            fn enter(&self, _: &tracing::span::Id) {}
            fn exit(&self, _: &tracing::span::Id) {}
        }
        let sites = Arc::new(Sites(Mutex::default()));
        tracing::subscriber::with_default(sites.clone(), || {
            tracing::warn!("one");
            tracing::warn!("other");
        });
        let seen = sites.0.lock().expect("a lock").clone();
        seen.try_into().expect("two places")
    }

    #[test]
    fn repeats_within_a_minute_are_left_out_counted_and_told_once() {
        let [one, other] = sites();
        let start = Instant::now();
        let mut repeats = Repeats::default();
        let admit = |site: &Identifier, after: u64, repeats: &mut Repeats| {
            let now = start + Duration::from_secs(after);
            repeats.admit(site.clone(), now, || format!("after {after} s"))
        };
        let written = (0..59).filter(|n| admit(&one, *n, &mut repeats)).count();
        assert_eq!(written, 50);
        // What floods the log keeps nothing else out of it.
        assert!(admit(&other, 59, &mut repeats));
        assert_eq!(repeats.ended(start + Duration::from_secs(59)), []);
        let told = repeats.ended(start + Duration::from_secs(60));
        assert_eq!(told, [LeftOut { lines: 9, text: "after 50 s".into() }]);
        assert_eq!(repeats.ended(start + Duration::from_secs(60)), []);
        assert!(admit(&one, 61, &mut repeats));
    }

    #[test]
    fn lines_that_come_slowly_are_all_written() {
        let [one, _] = sites();
        let start = Instant::now();
        let mut repeats = Repeats::default();
        for n in 0..200 {
            let now = start + Duration::from_secs(4 * n);
            assert!(repeats.admit(one.clone(), now, String::new), "{n}");
        }
        assert_eq!(repeats.ended(start + Duration::from_secs(10_000)), []);
    }

    #[test]
    fn a_failing_dependency_does_not_flood_the_log_and_the_status_page_sees_all_of_it() {
        let (written, recent) = (Written::default(), Recent::default());
        let repeats = RepeatFilter::default();
        let fmt = tracing_subscriber::fmt::layer().with_writer(written.clone()).with_ansi(false);
        let subscriber = tracing_subscriber::registry()
            .with(RecentLayer(recent.clone()))
            .with(fmt.with_filter(repeats.clone()));
        tracing::subscriber::with_default(subscriber, || {
            for _ in 0..1000 {
                tracing::warn!("AWS is away");
                tracing::debug!("and so on");
            }
            tracing::warn!("something else");
        });
        let lines = written.lines();
        let of = |text: &str| lines.iter().filter(|line| line.contains(text)).count();
        assert_eq!((of("AWS is away"), of("and so on"), of("something else")), (50, 1000, 1));
        let noted: Vec<u64> = recent.entries().iter().map(|entry| entry.count).collect();
        assert_eq!(noted, [1, 1000]);
    }
}
