//! Background duties of the agent: the last good Snapshot on disk, the CNI configuration in place.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use weft_model::Snapshot;
use weft_netstack::cni::{Readiness, conflist};
use weft_netstack::reconcile::chain;
use weft_netstack::store::Store;

type Snapshots = watch::Receiver<Option<Arc<Snapshot>>>;

/// Keeps the last good Snapshot in the durable Store.
#[derive(Clone)]
pub(super) struct Saver {
    pub(super) store: Arc<Store>,
    pub(super) snapshots: Snapshots,
}

/// Writes are for SD cards: one a minute in the long run, with a reserve of this many, so that what is set up in the first
/// minutes survives a power cut in them.
const RESERVE: u32 = 10;
const REFILL: Duration = Duration::from_secs(60);
/// A write waits this long for what belongs together.
const SETTLE: Duration = Duration::from_secs(1);

impl Saver {
    pub(super) async fn run(mut self) -> Result<(), String> {
        let mut reserve = RESERVE;
        let mut refilled_at = Instant::now();
        while self.snapshots.changed().await.is_ok() {
            tokio::time::sleep(SETTLE).await;
            while refilled_at.elapsed() >= REFILL {
                refilled_at += REFILL;
                reserve = (reserve + 1).min(RESERVE);
            }
            if reserve == 0 {
                tokio::time::sleep_until(refilled_at + REFILL).await;
                refilled_at += REFILL;
                reserve = 1;
            }
            self.snapshots.borrow_and_update();
            self.save_now();
            reserve -= 1;
        }
        Ok(())
    }

    /// Writes the latest Snapshot if it came from the API server.
    pub(super) fn save_now(&self) {
        let latest = self.snapshots.borrow().clone();
        let Some(snapshot) = latest.filter(|snapshot| !snapshot.from_store) else { return };
        if let Err(error) = self.store.save_snapshot(&snapshot) {
            tracing::warn!(error = chain(&error), "the last good snapshot could not be saved");
        }
    }
}

/// How often the configuration's presence is looked at.
const CONFLIST_CHECK: Duration = Duration::from_secs(2);

/// Puts the CNI configuration in place when ADD can succeed, and back when it was removed.
pub(super) struct Conflist {
    pub(super) folder: PathBuf,
    pub(super) socket: PathBuf,
    pub(super) snapshots: Snapshots,
    pub(super) ready: Readiness,
}

impl Conflist {
    pub(super) async fn run(self) -> Result<(), String> {
        let text = conflist::render(&self.socket);
        let mut said = String::new();
        loop {
            let able =
                self.snapshots.borrow().as_ref().is_some_and(|snapshot| (self.ready)(snapshot).is_ok());
            if able {
                let outcome = self.ensure(&text);
                if outcome != said {
                    if !outcome.is_empty() {
                        tracing::info!("{outcome}");
                    }
                    said = outcome;
                }
            }
            tokio::time::sleep(if able { CONFLIST_CHECK } else { Duration::from_millis(20) }).await;
        }
    }

    fn ensure(&self, text: &str) -> String {
        match conflist::ensure(&self.folder, text) {
            Ok(ensured) => match ensured.shadowed_by {
                Some(other) => format!(
                    "{} comes before our CNI configuration and wins; remove it so that pods get Weft's network",
                    other
                ),
                None => String::new(),
            },
            Err(error) => format!("CNI configuration: {}", chain(&error)),
        }
    }
}
