//! Signals: the first one stops cleanly, the second one at once.

use tokio_util::sync::CancellationToken;

/// A token that is cancelled by the first SIGINT or SIGTERM. A second one ends the process with exit
/// code 130 or 143.
pub(super) fn stop_token() -> CancellationToken {
    let stop = CancellationToken::new();
    tokio::spawn(watch(stop.clone()));
    stop
}

#[cfg(unix)]
async fn watch(stop: CancellationToken) {
    use tokio::signal::unix::{SignalKind, signal};

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
            tracing::warn!("{name} again: ending at once; what was not checkpointed comes again");
            std::process::exit(code);
        }
        tracing::info!("{name}: stopping cleanly; send it again to end at once");
        stop.cancel();
    }
}

#[cfg(not(unix))]
async fn watch(stop: CancellationToken) {
    while tokio::signal::ctrl_c().await.is_ok() {
        if stop.is_cancelled() {
            std::process::exit(130);
        }
        stop.cancel();
    }
}
