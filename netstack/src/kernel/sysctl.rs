//! Files under /proc/sys of the calling thread's network namespace.

use std::io;

/// Writes `value` to `/proc/sys/NAME` (with `/`, not `.`) when it differs; returns the old value when it changed.
pub fn ensure(name: &str, value: &str) -> io::Result<Option<String>> {
    let path = format!("/proc/sys/{name}");
    let old = std::fs::read_to_string(&path)?.trim().to_owned();
    if old == value {
        return Ok(None);
    }
    std::fs::write(&path, value)?;
    Ok(Some(old))
}
