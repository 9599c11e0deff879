//! Background duties of the agent: the last good Snapshot on disk, the CNI configuration in place.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use weft_model::Snapshot;
use weft_netstack::cni::conflist::{self, ConflistError, Others};
use weft_netstack::kernel::memory::give_memory_back;
use weft_netstack::reconcile::chain;
use weft_netstack::store::LastGood;

use super::readiness::{Kind, Obstacle, Sources};

type Snapshots = watch::Receiver<Option<Arc<Snapshot>>>;

/// Keeps the last good Snapshot in the durable Store.
#[derive(Clone)]
pub(super) struct Saver {
    pub(super) store: Arc<LastGood>,
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
            let saver = self.clone();
            tokio::task::spawn_blocking(move || saver.save_now()).await.map_err(|error| chain(&error))?;
            reserve -= 1;
        }
        Ok(())
    }

    /// Writes the latest Snapshot if it came from the API server.
    pub(super) fn save_now(&self) {
        let latest = self.snapshots.borrow().clone();
        let Some(snapshot) = latest.filter(|snapshot| !snapshot.from_store) else { return };
        if let Err(error) = self.store.save(&snapshot) {
            tracing::warn!(error = chain(&error), "the last good snapshot could not be saved");
        }
        give_memory_back();
    }
}

/// How often the configuration's presence is looked at, once it is in place.
const CONFLIST_CHECK: Duration = Duration::from_secs(2);
/// How often it is asked whether it may be put in place: a node that can work is to be used at once, and soon where that
/// waits for a person.
const CONFLIST_WAIT: Duration = Duration::from_millis(20);
const CONFLIST_WAIT_FOR_PEOPLE: Duration = Duration::from_millis(100);

/// Puts the CNI configuration in place when ADD can succeed, back when it was removed, and away when pods could not work.
pub(super) struct Conflist {
    pub(super) folder: PathBuf,
    pub(super) socket: PathBuf,
    pub(super) sources: Sources,
    pub(super) found: watch::Sender<Configurations>,
}

/// The folder as it was found last.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Configurations {
    /// Why ours is not to be there or cannot be, one line with the remedy.
    pub(super) objection: Option<String>,
    /// What else is there, one line.
    pub(super) note: Option<String>,
}

/// What is to become of our configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Written,
    /// Whatever is there stays: what is in the way passes by itself.
    AsItIs,
    Removed,
}

impl Place {
    fn decide(obstacles: &[Obstacle], others: &Others) -> Self {
        match obstacles.iter().map(|obstacle| obstacle.kind).max() {
            _ if !others.before.is_empty() => Self::Removed,
            None => Self::Written,
            Some(Kind::Passing) => Self::AsItIs,
            Some(Kind::Lasting | Kind::ApiServer) => Self::Removed,
        }
    }
}

impl Conflist {
    pub(super) async fn run(self) -> Result<(), String> {
        let text = conflist::render(&self.socket);
        loop {
            let (place, now) = self.pass(&text);
            self.found.send_if_modified(|before| std::mem::replace(before, now.clone()) != now);
            let pause = match place {
                Place::Written => CONFLIST_CHECK,
                Place::AsItIs => CONFLIST_WAIT,
                Place::Removed => CONFLIST_WAIT_FOR_PEOPLE,
            };
            tokio::time::sleep(pause).await;
        }
    }

    fn pass(&self, text: &str) -> (Place, Configurations) {
        let others = match conflist::others(&self.folder) {
            Ok(others) => others,
            Err(error) => return (Place::AsItIs, Configurations::trouble(&error)),
        };
        let place = Place::decide(&self.sources.obstacles(), &others);
        let overlap = self.sources.overlaps().into_iter().next();
        if let (Place::Written, Some(overlap), false) = (place, overlap, conflist::present(&self.folder)) {
            return (Place::Removed, Configurations { objection: Some(overlap), note: None });
        }
        let done = match place {
            Place::Written => conflist::ensure(&self.folder, text).map(|_| ()),
            Place::AsItIs => Ok(()),
            Place::Removed => conflist::remove(&self.folder).map(|_| ()),
        };
        let now = match done {
            Ok(()) => Configurations::of(&self.folder, &others, place),
            Err(error) => Configurations::trouble(&error),
        };
        (place, now)
    }
}

impl Configurations {
    fn trouble(error: &ConflistError) -> Self {
        let objection = format!("CNI configuration: {}; give a writable --cni-conf-dir", chain(error));
        Self { objection: Some(objection), note: None }
    }

    fn of(folder: &Path, others: &Others, place: Place) -> Self {
        let ours = conflist::FILE_NAME;
        let objection = others.before.first().map(|first| {
            format!(
                "CNI configuration {} comes before {ours} and runtimes would take it; remove it so that pods get Weft's network",
                folder.join(first).display()
            )
        });
        let names = others.after.join(", ");
        let note = (!names.is_empty()).then(|| match place {
            Place::Written => format!("{names} is there too, harmless after {ours}"),
            _ => format!("{names} is there, and taken by runtimes as long as {ours} is not; remove it"),
        });
        Self { objection, note }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn obstacle(kind: Kind) -> Obstacle {
        Obstacle { sentence: String::new(), kind }
    }

    #[test]
    fn ours_is_there_only_where_it_can_work_and_stays_through_what_passes() {
        let place = |kinds: &[Kind], before: &[&str]| {
            let before = before.iter().map(ToString::to_string).collect();
            let obstacles: Vec<Obstacle> = kinds.iter().copied().map(obstacle).collect();
            Place::decide(&obstacles, &Others { before, after: vec!["99-x.conf".to_owned()] })
        };
        assert_eq!(place(&[], &[]), Place::Written);
        assert_eq!(place(&[Kind::Passing], &[]), Place::AsItIs);
        assert_eq!(place(&[Kind::Passing, Kind::Lasting], &[]), Place::Removed);
        assert_eq!(place(&[Kind::ApiServer], &[]), Place::Removed);
        assert_eq!(place(&[], &["00-x.conf"]), Place::Removed);
    }
}
