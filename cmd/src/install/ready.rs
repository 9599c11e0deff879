//! Waits until pods can be attached: the agent says ready, and its CNI configuration is in place.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::bail;
use weft_netstack::cni::conflist;

use super::plan::RUN_DIR;
use crate::status;

/// How often the agent is asked.
const PAUSE: Duration = Duration::from_millis(100);

/// `60s`, `2m`; `0` is no time at all.
pub(super) fn limit(text: &str) -> Result<Duration, String> {
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    let parsed = text.parse::<jiff::SignedDuration>().ok();
    parsed
        .and_then(|duration| Duration::try_from(duration).ok())
        .ok_or_else(|| "give a time such as 60s or 2m, or 0".to_owned())
}

/// Says so when the node is ready; after `limit` says what the agent says of itself, and fails.
pub(super) fn wait(limit: Duration, cni_conf_dir: &Path) -> anyhow::Result<()> {
    let conflist = cni_conf_dir.join(conflist::FILE_NAME);
    let started_at = Instant::now();
    loop {
        let answer = status::read(Path::new(RUN_DIR));
        let is_ready = answer.as_ref().is_ok_and(|status| status.ready);
        if is_ready && conflist.exists() {
            let seconds = started_at.elapsed().as_secs_f64();
            super::say(
                "ready",
                format_args!("pods can come: {} is in place ({seconds:.1} s)", conflist.display()),
            );
            return Ok(());
        }
        if started_at.elapsed() >= limit {
            match answer {
                Ok(status) => crate::print(&status::text(&status))?,
                Err(error) => say!("{error:#}"),
            }
            bail!(
                "this node's network is installed and not ready after {} s; what is missing stands above, and 'weft status' shows it again",
                limit.as_secs()
            );
        }
        std::thread::sleep(PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_a_time_or_nothing() {
        assert_eq!(limit("60s"), Ok(Duration::from_secs(60)));
        assert_eq!(limit("2m"), Ok(Duration::from_secs(120)));
        assert_eq!(limit("0"), Ok(Duration::ZERO));
        for wrong in ["", "60", "-1s", "soon"] {
            assert!(limit(wrong).is_err(), "{wrong}");
        }
    }
}
