//! The log on stderr.

use std::{io::IsTerminal as _, time::Duration};

use tokio::time::MissedTickBehavior;
use tokio_util::task::AbortOnDropHandle;
use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::{
    Layer as _, Registry,
    filter::{LevelFilter, Targets},
    layer::SubscriberExt as _,
    reload,
    util::SubscriberInitExt as _,
};

use super::{Global, LogFormat};
use crate::telemetry::{Recent, RecentLayer, RepeatFilter};

/// How often it is told what was left out.
const TELL_INTERVAL: Duration = Duration::from_secs(10);
/// So many lines wait for a reader of stderr. The room for them is taken at the start.
const BUFFERED_LINES: usize = 4096;

/// The log; cloning it gives the same.
#[derive(Clone)]
pub(super) struct Log {
    filter: reload::Handle<Targets, Registry>,
    repeats: RepeatFilter,
}

impl Log {
    /// Starts to log to stderr, by a thread of its own: a reader of stderr that does not read costs log
    /// lines, and nothing else. The guard writes what is left when it is dropped.
    pub(super) fn start(global: &Global, recent: Recent) -> (Self, WorkerGuard) {
        let (filter, handle) = reload::Layer::new(filter(global));
        let (writer, guard) = NonBlockingBuilder::default()
            .buffered_lines_limit(BUFFERED_LINES)
            .finish(std::io::stderr());
        let repeats = RepeatFilter::default();
        let registry = tracing_subscriber::registry().with(filter).with(RecentLayer(recent));
        match global.log_format {
            LogFormat::Text => {
                let terminal = std::io::stderr().is_terminal();
                let layer = tracing_subscriber::fmt::layer()
                    .with_writer(writer)
                    .with_ansi(terminal)
                    .with_target(false);
                registry.with(layer.with_filter(repeats.clone())).init();
            }
            LogFormat::Json => {
                let layer = tracing_subscriber::fmt::layer()
                    .with_writer(writer)
                    .json()
                    .flatten_event(true)
                    .with_target(false);
                registry.with(layer.with_filter(repeats.clone())).init();
            }
        }
        (Self { filter: handle, repeats }, guard)
    }

    /// Logs from now on as much as these settings say.
    pub(super) fn set_level(&self, global: &Global) {
        // It fails only when nothing logs any more.
        let _ = self.filter.reload(filter(global));
    }

    /// Tells now and then which repeats were left out, until the handle is dropped.
    pub(super) fn tell_repeats(&self) -> AbortOnDropHandle<()> {
        let repeats = self.repeats.clone();
        AbortOnDropHandle::new(tokio::spawn(async move {
            let mut ticks = tokio::time::interval(TELL_INTERVAL);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                ticks.tick().await;
                repeats.tell();
            }
        }))
    }
}

fn filter(global: &Global) -> Targets {
    let level = match i16::from(global.verbose) - i16::from(global.quiet) {
        ..=-2 => LevelFilter::ERROR,
        -1 => LevelFilter::WARN,
        0 => LevelFilter::INFO,
        1.. => LevelFilter::DEBUG,
    };
    // What goes wrong below us comes back as an error, which is told once and better.
    let others = if global.verbose >= 2 { LevelFilter::DEBUG } else { LevelFilter::ERROR };
    Targets::new().with_default(others).with_target("tramline", level)
}
