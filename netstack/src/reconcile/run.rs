//! The loop itself: wake, take the Snapshot, plan, apply, report.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use weft_model::{Report, Snapshot};

use super::{Applied, Applier, Planner, Tally, Trust};

/// How often a loop may and must run.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Least time between the starts of two passes: a burst of changes becomes one pass.
    pub min_gap: Duration,
    /// A pass that observes the outside anew happens at least this often.
    pub drift_check: Duration,
    /// First retry after a failure; doubles up to `max_backoff`.
    pub min_backoff: Duration,
    pub max_backoff: Duration,
}

impl Default for Pace {
    /// 5 ms coalesces the events of one API write without being felt; a foreign change is mended within a minute;
    /// retries from 100 ms to 30 s.
    fn default() -> Self {
        Self {
            min_gap: Duration::from_millis(5),
            drift_check: Duration::from_secs(60),
            min_backoff: Duration::from_millis(100),
            max_backoff: Duration::from_secs(30),
        }
    }
}

/// What others hold of a loop: its latest Report and a way to wake it.
#[derive(Clone)]
pub struct LoopHandle {
    report_rx: watch::Receiver<Report>,
    nudge: Arc<Notify>,
    tally: Arc<Tally>,
}

impl LoopHandle {
    pub fn report(&self) -> Report {
        self.report_rx.borrow().clone()
    }

    pub fn reports(&self) -> watch::Receiver<Report> {
        self.report_rx.clone()
    }

    pub fn tally(&self) -> Arc<Tally> {
        self.tally.clone()
    }

    /// Asks for a pass that observes the outside anew.
    pub fn nudge(&self) {
        self.nudge.notify_one();
    }
}

/// One domain's planner and applier, driven by Snapshots.
pub struct Loop<P, A> {
    planner: P,
    applier: A,
    pace: Pace,
    snapshot_rx: watch::Receiver<Option<Arc<Snapshot>>>,
    report_tx: watch::Sender<Report>,
    nudge: Arc<Notify>,
    tally: Arc<Tally>,
}

impl<P, A> Loop<P, A>
where
    P: Planner,
    A: Applier<Plan = P::Plan>,
{
    pub fn new(
        name: &'static str,
        planner: P,
        applier: A,
        pace: Pace,
        snapshot_rx: watch::Receiver<Option<Arc<Snapshot>>>,
    ) -> (Self, LoopHandle) {
        let (report_tx, report_rx) = watch::channel(Report { name: name.to_owned(), ..Report::default() });
        let nudge = Arc::new(Notify::new());
        let tally = Arc::new(Tally::default());
        let handle = LoopHandle { report_rx, nudge: nudge.clone(), tally: tally.clone() };
        (Self { planner, applier, pace, snapshot_rx, report_tx, nudge, tally }, handle)
    }

    /// Runs until the Snapshot's sender is gone.
    pub async fn run(mut self) -> Result<(), String> {
        let mut trust = Trust::Nothing;
        let mut backoff = self.pace.min_backoff;
        let mut checked_at = Instant::now();
        let mut seen: Option<Arc<Snapshot>> = None;
        while let Some(snapshot) = self.next_snapshot().await {
            let before = seen.replace(snapshot.clone());
            let started_at = Instant::now();
            if trust == Trust::Nothing {
                checked_at = started_at;
            }
            let clean = if trust == Trust::Shadow
                && before.is_some_and(|before| is_spared::<P>(&before, &snapshot))
            {
                self.report_tx.send_modify(|report| report.generation = snapshot.generation);
                true
            } else {
                self.tally.asked();
                self.pass(&snapshot, trust, backoff).await
            };
            let wake_at = if clean {
                backoff = self.pace.min_backoff;
                checked_at + self.pace.drift_check
            } else {
                let retry_at = Instant::now() + backoff;
                backoff = (backoff * 2).min(self.pace.max_backoff);
                retry_at
            };
            tokio::time::sleep_until(started_at + self.pace.min_gap).await;
            trust = match self.wait(wake_at).await {
                Wake::Change if clean => Trust::Shadow,
                Wake::Change | Wake::Check => Trust::Nothing,
                Wake::Closed => return Ok(()),
            };
        }
        Ok(())
    }

    /// The latest Snapshot, waiting for the first; `None` when there will be no more.
    async fn next_snapshot(&mut self) -> Option<Arc<Snapshot>> {
        loop {
            if let Some(snapshot) = self.snapshot_rx.borrow_and_update().clone() {
                return Some(snapshot);
            }
            self.snapshot_rx.changed().await.ok()?;
        }
    }

    /// Plans, applies and reports once; true when nothing failed.
    async fn pass(&mut self, snapshot: &Snapshot, trust: Trust, backoff: Duration) -> bool {
        let started_at = Instant::now();
        let planned = self.planner.plan(snapshot);
        let Applied { changed, failed, details } = self.applier.apply(&planned.plan, trust).await;
        let clean = failed.is_empty();
        self.tally.passed(started_at.elapsed(), trust, clean);
        self.report_tx.send_modify(|report| {
            for failure in failed.iter().filter(|failure| !report.failures.contains(failure)) {
                tracing::warn!(loop_name = report.name, failure, "pass failed");
            }
            for problem in planned.problems.iter().filter(|problem| !report.problems.contains(problem)) {
                tracing::warn!(loop_name = report.name, %problem, "object not honoured");
            }
            if !changed.is_empty() {
                tracing::debug!(
                    loop_name = report.name,
                    generation = snapshot.generation.0,
                    ?changed,
                    "applied"
                );
                report.last_change = Some(summary(&changed));
            }
            if clean {
                report.generation = snapshot.generation;
            }
            report.passes += 1;
            report.problems = planned.problems;
            report.failures = failed;
            report.details = details;
            report.last_pass_micros = u64::try_from(started_at.elapsed().as_micros()).unwrap_or(u64::MAX);
            report.retry_in_millis = (!clean).then(|| u64::try_from(backoff.as_millis()).unwrap_or(u64::MAX));
        });
        clean
    }

    /// Cancel-safety: `changed` and `notified` both keep their signal when the other wins.
    async fn wait(&mut self, wake_at: Instant) -> Wake {
        tokio::select! {
            changed = self.snapshot_rx.changed() => if changed.is_ok() { Wake::Change } else { Wake::Closed },
            () = self.nudge.notified() => Wake::Check,
            () = tokio::time::sleep_until(wake_at) => Wake::Check,
        }
    }
}

/// What holds for `before` holds for `now`.
fn is_spared<P: Planner>(before: &Snapshot, now: &Snapshot) -> bool {
    !P::FOLLOWS_ATTACHED_PODS && now.differs_only_in_attached_pods(before)
}

enum Wake {
    Change,
    Check,
    Closed,
}

fn summary(changed: &[String]) -> String {
    match changed {
        [] => String::new(),
        [one] => one.clone(),
        [first, rest @ ..] => format!("{first} and {} more", rest.len()),
    }
}

#[cfg(test)]
mod tests;
