//! The name of this machine.

/// The host name without its domain; `localhost` where the system has none.
pub(crate) fn name() -> String {
    let name = hostname::get().unwrap_or_default().to_string_lossy().into_owned();
    match name.split('.').next() {
        Some(first) if !first.is_empty() => first.to_owned(),
        _ => "localhost".to_owned(),
    }
}
