//! This machine: its name, and what the process has of it.

/// The host name without its domain; `localhost` where the system has none.
pub(crate) fn name() -> String {
    let name = hostname::get().unwrap_or_default().to_string_lossy().into_owned();
    match name.split('.').next() {
        Some(first) if !first.is_empty() => first.to_owned(),
        _ => "localhost".to_owned(),
    }
}

/// How much memory of the process is resident; `None` where the system does not tell in `/proc`.
#[cfg(feature = "cli")]
pub(crate) fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

#[cfg(all(test, feature = "cli", target_os = "linux"))]
mod tests {
    #[test]
    fn a_process_has_some_memory() {
        assert!(super::resident_bytes().is_some_and(|bytes| bytes > 1024 * 1024));
    }
}
