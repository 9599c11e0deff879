//! What this node tells the others: its WireGuard identity, which subnets its links hold and which addresses of load balancers it
//! answers for, as annotations of its own Node (decision 15). A planner and an applier like any other, so the generic Loop retries it; it writes only while the Node says
//! something else.

use std::future::Future;
use std::sync::Arc;

use kube::api::{Api, Patch, PatchParams};
use serde_json::json;
use tokio::sync::watch;
use weft_model::balancer::AnswersFor;
use weft_model::constants::{
    ANNOTATION_ANSWERS_FOR, ANNOTATION_LINKS, ANNOTATION_NEXT_PUBLIC_KEY, ANNOTATION_PUBLIC_KEY,
    ANNOTATION_WIREGUARD_PORT,
};
use weft_model::node_facts::LinkSubnets;
use weft_model::objects::Node;
use weft_model::{NodeName, Planned, Snapshot, WgPublicKey};

use super::client::Access;
use super::document::{Document, Kind};
use crate::reconcile::{Applied, Applier, Planner, Trust};

/// What peers must know of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub public_key: WgPublicKey,
    /// What replaces it as soon as they know it.
    pub next_public_key: Option<WgPublicKey>,
    pub wireguard_port: u16,
}

/// The write that is due, if any.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Publication {
    pub node: NodeName,
    pub identity: Identity,
    pub links: LinkSubnets,
    pub answers_for: AnswersFor,
}

impl Identity {
    /// `node` says something else.
    pub fn differs(&self, node: &Node) -> bool {
        node.public_key != Some(self.public_key)
            || node.next_public_key != self.next_public_key
            || node.wireguard_port != Some(self.wireguard_port)
    }
}

/// What there is to say, as it is at any time.
#[derive(Debug)]
pub struct Publishing {
    pub identity: watch::Receiver<Identity>,
    /// `None` until it is known: what was said before stands.
    pub answers_for: watch::Receiver<Option<AnswersFor>>,
}

impl Planner for Publishing {
    type Plan = Option<Publication>;
    const FOLLOWS_ATTACHED_PODS: bool = false;

    /// Nothing while the own Node is unknown or known from the Store only: then the API server has not been seen.
    fn plan(&mut self, snapshot: &Snapshot) -> Planned<Self::Plan> {
        let identity = self.identity.borrow().clone();
        let links = snapshot.facts.link_subnets();
        let Some(node) = snapshot.own_node().filter(|_| !snapshot.from_store) else {
            return Planned::new(None, Vec::new());
        };
        let answers_for = self.answers_for.borrow().clone().unwrap_or_else(|| node.answers_for.clone());
        let due =
            identity.differs(node) || node.links.as_ref() != Some(&links) || node.answers_for != answers_for;
        let publication = || Publication { node: node.name.clone(), identity, links, answers_for };
        Planned::new(due.then(publication), Vec::new())
    }
}

/// Owner of the annotations of the own Node.
pub struct Publisher {
    access: Arc<Access>,
}

impl Publisher {
    pub fn new(access: Arc<Access>) -> Self {
        Self { access }
    }
}

impl Applier for Publisher {
    type Plan = Option<Publication>;

    fn apply(&mut self, plan: &Self::Plan, _trust: Trust) -> impl Future<Output = Applied> + Send {
        let (access, due) = (self.access.clone(), plan.clone());
        async move {
            let Some(due) = due else {
                return Applied::default();
            };
            match access.ask(async |client| publish(&client, &due).await).await {
                Ok(()) => Applied {
                    changed: vec![format!("annotations of Node {}", due.node)],
                    ..Applied::default()
                },
                Err(why) => {
                    let failure =
                        format!("annotations of Node {}: {}", due.node, why.sentence(&access.address()));
                    Applied { failed: vec![failure], ..Applied::default() }
                }
            }
        }
    }
}

/// Merge-patches the annotations and nothing else.
pub async fn publish(client: &kube::Client, publication: &Publication) -> Result<(), kube::Error> {
    let api: Api<Document> = Api::all_with(client.clone(), &Kind::Node);
    let Identity { public_key, next_public_key, wireguard_port } = &publication.identity;
    let answers_for = &publication.answers_for;
    let annotations = json!({
        ANNOTATION_PUBLIC_KEY: public_key.to_string(),
        // `null` takes away what stood there (RFC 7386).
        ANNOTATION_NEXT_PUBLIC_KEY: next_public_key.map(|key| key.to_string()),
        ANNOTATION_WIREGUARD_PORT: wireguard_port.to_string(),
        ANNOTATION_LINKS: publication.links.to_string(),
        ANNOTATION_ANSWERS_FOR: (!answers_for.is_empty()).then(|| answers_for.to_string()),
    });
    let patch = json!({ "metadata": { "annotations": annotations } });
    api.patch(&publication.node.0, &PatchParams::default(), &Patch::Merge(patch)).await.map(|_| ())
}
