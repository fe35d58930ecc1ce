//! Signals: the first one stops cleanly, the second one at once; SIGHUP reads settings again.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// A token that is cancelled by the first SIGINT or SIGTERM. A second one ends the process with exit
/// code 130 or 143.
pub(super) fn stop_token() -> CancellationToken {
    let stop = CancellationToken::new();
    tokio::spawn(watch(stop.clone()));
    stop
}

async fn watch(stop: CancellationToken) {
    let (interrupt, terminate) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()));
    let (Ok(mut interrupt), Ok(mut terminate)) = (interrupt, terminate) else {
        tracing::error!("signals cannot be caught: a stop will not be clean");
        return;
    };
    loop {
        let (name, code) = tokio::select! {
            _ = interrupt.recv() => ("SIGINT", 130),
            _ = terminate.recv() => ("SIGTERM", 143),
        };
        if stop.is_cancelled() {
            // Nothing may hold this up, a full log pipe neither.
            std::process::exit(code);
        }
        stop.cancel();
        tracing::info!("{name}: stopping cleanly; send it again to end at once");
    }
}

/// Calls `again` for each SIGHUP, which ends the process no more.
pub(super) fn on_hangup(again: impl Fn() + Send + 'static) {
    let Ok(mut hangup) = signal(SignalKind::hangup()) else {
        tracing::error!("SIGHUP cannot be caught: it ends the process");
        return;
    };
    tokio::spawn(async move {
        while hangup.recv().await.is_some() {
            again();
        }
    });
}
