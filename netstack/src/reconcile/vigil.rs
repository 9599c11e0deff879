//! Looks often, and cheaply, whether anybody else changed what the loops own, instead of waiting for their drift check.

use std::time::Duration;

use super::{LoopHandle, chain};

/// How often [`vigil`] looks.
#[derive(Clone, Copy, Debug)]
pub struct Watchfulness {
    pub min_gap: Duration,
    /// While somebody changes something at [`Self::restless`] looks in a row, the gap doubles up to this.
    pub max_gap: Duration,
    pub restless: u32,
}

impl Default for Watchfulness {
    /// A foreign change is mended within a second; beside a program that never rests, a look every 10 s.
    fn default() -> Self {
        Self { min_gap: Duration::from_millis(500), max_gap: Duration::from_secs(10), restless: 10 }
    }
}

/// Wakes the loops when `changed` says so. It may block for a moment; its failure is logged and it is asked again.
pub async fn vigil<E: std::error::Error + Send + 'static>(
    watchfulness: Watchfulness,
    mut changed: impl FnMut() -> Result<bool, E> + Send + 'static,
    loops: Vec<LoopHandle>,
) -> Result<(), String> {
    let mut gap = watchfulness.min_gap;
    let mut in_a_row = 0;
    loop {
        tokio::time::sleep(gap).await;
        let asked = tokio::task::spawn_blocking(move || {
            let answer = changed();
            (answer, changed)
        });
        let (answer, again) = asked.await.map_err(|error| chain(&error))?;
        changed = again;
        gap = match answer {
            Ok(false) => {
                in_a_row = 0;
                watchfulness.min_gap
            }
            Ok(true) => {
                loops.iter().for_each(LoopHandle::nudge);
                in_a_row += 1;
                if in_a_row < watchfulness.restless { gap } else { (gap * 2).min(watchfulness.max_gap) }
            }
            Err(error) => {
                tracing::warn!(error = %chain(&error), "look for changes of others");
                watchfulness.max_gap
            }
        };
    }
}
