use tokio::signal::unix::{SignalKind, signal};

/// Completes on SIGINT (Ctrl-C) or SIGTERM: the usual argument of [`Worker::run`](crate::Worker::run).
pub async fn shutdown_signal() {
    match signal(SignalKind::terminate()) {
        Ok(mut terminate) => tokio::select! {
            _ = tokio::signal::ctrl_c() => {}
            _ = terminate.recv() => {}
        },
        Err(error) => {
            tracing::error!("SIGTERM cannot be caught ({error}); only SIGINT stops cleanly");
            let _ = tokio::signal::ctrl_c().await;
        }
    }
}
