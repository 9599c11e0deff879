//! Secrets and ConfigMaps that Ingresses refer to, read by name and never listed: what may be read is what is named.
//!
//! ```text
//!  names --watch--> Reader --GET, one by one--> API server
//!                     +--watch--> answers --> Snapshot
//! ```
//!
//! Kubernetes has no right to watch only what is named, so names are asked for again and again: a new one at once, all of
//! them in turn within [`ROUND`] while they are few.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use kube::core::Request;
use serde_json::Value;
use tokio::sync::watch;
use weft_model::ingress::{Answer, Reference, Referred};

use super::client::Access;
use super::lower;

/// In which every name is asked for once.
const ROUND: Duration = Duration::from_secs(5);
/// Between two questions of a round at least, so that a thousand names load no API server; a round is longer then.
const APART: Duration = Duration::from_millis(100);
/// New names that are asked for at a time.
const TOGETHER: usize = 8;
/// Until new names are tried again when the server did not answer.
const AFTER_SILENCE: Duration = Duration::from_secs(1);

/// The task that reads.
pub(super) struct Reader {
    access: Arc<Access>,
    /// `None` until Ingresses and their classes have listed: what the Store knew is kept until then.
    wanted: watch::Receiver<Option<BTreeSet<Reference>>>,
    answers: watch::Sender<Referred>,
    /// Asked for last in the round.
    last: Option<Reference>,
}

impl Reader {
    /// `answers` holds what is known already; it stays until the server says something else.
    pub(super) fn new(
        access: Arc<Access>,
        wanted: watch::Receiver<Option<BTreeSet<Reference>>>,
        answers: watch::Sender<Referred>,
    ) -> Self {
        Self { access, wanted, answers, last: None }
    }

    /// Runs as long as the agent.
    ///
    /// # Errors
    /// One sentence when the other end is gone.
    pub(super) async fn run(mut self) -> Result<(), String> {
        loop {
            let Some(wanted) = self.wanted.borrow_and_update().clone() else {
                self.wanted.changed().await.map_err(|_| GONE.to_owned())?;
                continue;
            };
            self.forget_all_but(&wanted);
            let wait = self.read_new(&wanted).await;
            tokio::select! {
                changed = self.wanted.changed() => changed.map_err(|_| GONE.to_owned())?,
                () = tokio::time::sleep(wait) => self.read_next(&wanted).await,
            }
        }
    }

    fn forget_all_but(&self, wanted: &BTreeSet<Reference>) {
        self.answers.send_if_modified(|answers| {
            let superfluous = answers.keys().any(|reference| !wanted.contains(reference));
            if superfluous {
                Arc::make_mut(answers).retain(|reference, _| wanted.contains(reference));
            }
            superfluous
        });
    }

    /// Asks for all that was never answered; returns how long the next question may wait.
    async fn read_new(&self, wanted: &BTreeSet<Reference>) -> Duration {
        let new = self.unanswered(wanted);
        let mut silent = false;
        for together in new.chunks(TOGETHER) {
            let mut asked = Vec::new();
            for reference in together {
                asked.push(ask(self.access.clone(), reference.clone()));
            }
            for (reference, answer) in together.iter().zip(futures::future::join_all(asked).await) {
                silent |= answer.is_none();
                self.learn(reference, answer);
            }
        }
        if silent { AFTER_SILENCE } else { (ROUND / (wanted.len().max(1) as u32)).max(APART) }
    }

    fn unanswered(&self, wanted: &BTreeSet<Reference>) -> Vec<Reference> {
        let known = self.answers.borrow();
        wanted.iter().filter(|one| !known.contains_key(one)).cloned().collect()
    }

    /// Asks for the next name of the round.
    async fn read_next(&mut self, wanted: &BTreeSet<Reference>) {
        self.last = next(wanted, self.last.as_ref());
        if let Some(reference) = self.last.clone() {
            let answer = ask(self.access.clone(), reference.clone()).await;
            self.learn(&reference, answer);
        }
    }

    /// A silent server changes nothing.
    fn learn(&self, reference: &Reference, answer: Option<Answer>) {
        let Some(answer) = answer else { return };
        self.answers.send_if_modified(|answers| {
            let differs = answers.get(reference).is_none_or(|known| **known != answer);
            if differs {
                Arc::make_mut(answers).insert(reference.clone(), Arc::new(answer));
            }
            differs
        });
    }
}

/// The one after `last`, and the first after the last one.
fn next(wanted: &BTreeSet<Reference>, last: Option<&Reference>) -> Option<Reference> {
    let after = last.and_then(|last| wanted.range(last.clone()..).find(|one| *one != last));
    after.or_else(|| wanted.first()).cloned()
}

/// `None` when the server did not answer.
async fn ask(access: Arc<Access>, reference: Reference) -> Option<Answer> {
    let read = access.ask(async |client| match read(&client, &reference).await {
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(None),
        outcome => outcome.map(Some),
    });
    match read.await {
        Ok(Some(document)) => lower::referred(&document).map(|(_, data)| Answer::Found(data)),
        Ok(None) => Some(Answer::Absent),
        Err(failure) if failure.is_silence() => None,
        Err(failure) => Some(Answer::Refused(failure.sentence(&access.address()))),
    }
}

const GONE: &str = "nobody says any more what is to be read";

async fn read(client: &kube::Client, reference: &Reference) -> Result<Value, kube::Error> {
    let plural = match reference {
        Reference::Secret(_) => "secrets",
        Reference::ConfigMap(_) => "configmaps",
    };
    let key = reference.key();
    let objects = Request::new(format!("/api/v1/namespaces/{}/{plural}", key.namespace));
    let request = objects.get(&key.name, &Default::default()).map_err(kube::Error::BuildRequest)?;
    let mut document: Value = client.request(request).await?;
    // An object of a list has no kind; one that was asked for alone has.
    document["kind"] = reference.kind().into();
    Ok(document)
}

#[cfg(test)]
mod tests {
    use weft_model::NamespacedName;

    use super::*;

    #[test]
    fn a_round_asks_for_every_name_in_turn() {
        let secret = |name: &str| Reference::Secret(NamespacedName::new("d", name));
        let wanted = BTreeSet::from([secret("a"), secret("b"), secret("d")]);
        assert_eq!(next(&wanted, None), Some(secret("a")));
        assert_eq!(next(&wanted, Some(&secret("a"))), Some(secret("b")));
        assert_eq!(next(&wanted, Some(&secret("c"))), Some(secret("d")), "one that is wanted no more");
        assert_eq!(next(&wanted, Some(&secret("d"))), Some(secret("a")));
        assert_eq!(next(&BTreeSet::new(), Some(&secret("d"))), None);
    }
}
