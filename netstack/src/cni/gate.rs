//! First packets: who bears which address is told before the address is used, and ADD goes on only when the kernel judges it.
//!
//! ```text
//!  lease -> attachments (watch channel) -> Snapshot #g -> loop `policy` -> its report says #g -> ADD goes on
//! ```
//!
//! Bounded, and closed: an ADD whose verdicts do not come in time fails, and the runtime tries again.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use weft_model::snapshot::{AttachedPod, Attachments};
use weft_model::{Generation, Report, Snapshot};
use weft_plugin::wire::{CniError, Code};

use super::{Cni, ipam};
use crate::store::LeaseRecords;

/// A pass takes milliseconds; a node that needs longer has trouble that the next try may not have.
const PATIENCE: Duration = Duration::from_secs(10);

/// Who bears which address, by the leases. An attachment that was made by hand, for no pod, is nobody's business.
pub fn attachments(leases: &LeaseRecords) -> Attachments {
    let live = leases.iter().filter(|(_, lease)| lease.released.is_none());
    // A lease that was rebuilt from the kernel knows no container either.
    let of_pods = live.filter(|(_, lease)| lease.pod.is_some() || lease.container_id.is_empty());
    let attached = of_pods.map(|(address, lease)| {
        (*address, Arc::new(AttachedPod { pod: lease.pod.clone(), uid: lease.pod_uid.clone() }))
    });
    Arc::new(attached.collect())
}

impl Cni {
    /// Tells the leases of now. Under the allocation's lock, so that a later state is never followed by an earlier one.
    pub(super) fn tell_attachments(&self, _one_at_a_time: &ipam::Cursors) {
        let now = attachments(&self.leases.records());
        self.attachments.send_if_modified(|known| {
            let changed = *known != now;
            *known = now;
            changed
        });
    }

    /// Returns when the kernel judges what these addresses send and are sent.
    pub(super) async fn verdicts_are_in_place(&self, addresses: &[IpAddr]) -> Result<(), CniError> {
        let Some(reports) = &self.verdicts else { return Ok(()) };
        let told = self.attachments.borrow().clone();
        let wait = in_kernel(self.snapshots.clone(), reports.clone(), &told, addresses);
        match tokio::time::timeout(PATIENCE, wait).await {
            Ok(true) => Ok(()),
            Ok(false) => Err(CniError::new(Code::TryAgainLater, "the agent ends")),
            Err(_) => Err(CniError::new(Code::TryAgainLater, refusal(&reports.borrow()))),
        }
    }
}

/// False when there will be no more Snapshots or reports.
async fn in_kernel(
    mut snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
    mut reports: watch::Receiver<Report>,
    told: &Attachments,
    addresses: &[IpAddr],
) -> bool {
    let knows = |snapshot: &Snapshot| {
        addresses.iter().all(|address| snapshot.attachments.get(address) == told.get(address))
    };
    let known = snapshots.wait_for(|snapshot| snapshot.as_deref().is_some_and(knows)).await;
    let Some(generation) = known.ok().and_then(|known| known.as_ref().map(|known| known.generation)) else {
        return false;
    };
    reports.wait_for(|report| is_applied(report, generation)).await.is_ok()
}

fn is_applied(report: &Report, generation: Generation) -> bool {
    report.generation >= generation && report.failures.is_empty()
}

fn refusal(report: &Report) -> String {
    let seconds = PATIENCE.as_secs();
    match report.failures.first() {
        Some(failure) => format!("the pod's network policies cannot be put into the kernel: {failure}"),
        None => format!(
            "the pod's network policies were not in the kernel within {seconds} s; the node is too busy"
        ),
    }
}

#[cfg(test)]
mod tests {
    use weft_model::PodKey;

    use super::*;
    use crate::cni::tests::rig::snapshot;

    fn pod(name: &str) -> Arc<AttachedPod> {
        Arc::new(AttachedPod { pod: Some(PodKey::new("default", name)), uid: String::new() })
    }

    fn with(generation: u64, attachments: &Attachments) -> Option<Arc<Snapshot>> {
        let attachments = attachments.clone();
        Some(Arc::new(Snapshot { generation: Generation(generation), attachments, ..snapshot(&[]) }))
    }

    fn applied(generation: u64, failures: &[&str]) -> Report {
        let failures = failures.iter().map(|text| (*text).to_owned()).collect();
        Report { generation: Generation(generation), failures, ..Report::default() }
    }

    #[tokio::test(start_paused = true)]
    async fn add_goes_on_when_the_generation_that_knows_the_pod_is_in_the_kernel_and_not_before() {
        let address: IpAddr = "10.42.1.5".parse().unwrap();
        let before: Attachments = Arc::new([(address, pod("former"))].into());
        let told: Attachments = Arc::new([(address, pod("now"))].into());
        let (snapshots_tx, snapshots) = watch::channel(with(1, &before));
        let (reports_tx, reports) = watch::channel(applied(1, &[]));
        let waiting = tokio::spawn(async move { in_kernel(snapshots, reports, &told, &[address]).await });
        let told: Attachments = Arc::new([(address, pod("now"))].into());
        let settle = || tokio::time::sleep(Duration::from_millis(1));
        settle().await;
        assert!(!waiting.is_finished(), "the address was another pod's");
        snapshots_tx.send_replace(with(2, &told));
        settle().await;
        assert!(!waiting.is_finished(), "planned is not programmed");
        reports_tx.send_replace(applied(2, &["table weft-policy: refused"]));
        settle().await;
        assert!(!waiting.is_finished(), "half programmed is not programmed");
        reports_tx.send_replace(applied(2, &[]));
        settle().await;
        assert!(waiting.is_finished() && waiting.await.unwrap());
    }

    #[test]
    fn a_refusal_says_what_the_kernel_said() {
        assert!(
            refusal(&applied(1, &["table weft-policy: no memory"]))
                .ends_with("into the kernel: table weft-policy: no memory")
        );
        assert!(refusal(&applied(1, &[])).contains("within 10 s"));
    }
}
