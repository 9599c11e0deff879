//! What this node tells the others: its WireGuard identity and which subnets its links hold, as annotations of its own Node
//! (decision 15). A planner and an applier like any other, so the generic Loop retries it; it writes only while the Node says
//! something else.

use std::future::Future;
use std::sync::Arc;

use kube::api::{Api, Patch, PatchParams};
use serde_json::json;
use tokio::sync::watch;
use weft_model::constants::{
    ANNOTATION_LINKS, ANNOTATION_NEXT_PUBLIC_KEY, ANNOTATION_PUBLIC_KEY, ANNOTATION_WIREGUARD_PORT,
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
}

impl Identity {
    /// `node` says something else.
    pub fn differs(&self, node: &Node) -> bool {
        node.public_key != Some(self.public_key)
            || node.next_public_key != self.next_public_key
            || node.wireguard_port != Some(self.wireguard_port)
    }
}

/// The identity as it is at any time.
#[derive(Debug)]
pub struct Publishing {
    pub identity: watch::Receiver<Identity>,
}

impl Planner for Publishing {
    type Plan = Option<Publication>;

    /// Nothing while the own Node is unknown or known from the Store only: then the API server has not been seen.
    fn plan(&mut self, snapshot: &Snapshot) -> Planned<Self::Plan> {
        let identity = self.identity.borrow().clone();
        let links = snapshot.facts.link_subnets();
        let due = snapshot.own_node().filter(|node| {
            (identity.differs(node) || node.links.as_ref() != Some(&links)) && !snapshot.from_store
        });
        let plan = due.map(|node| Publication { node: node.name.clone(), identity, links });
        Planned::new(plan, Vec::new())
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
    let annotations = json!({
        ANNOTATION_PUBLIC_KEY: public_key.to_string(),
        // `null` takes away what a rotation left there (RFC 7386).
        ANNOTATION_NEXT_PUBLIC_KEY: next_public_key.map(|key| key.to_string()),
        ANNOTATION_WIREGUARD_PORT: wireguard_port.to_string(),
        ANNOTATION_LINKS: publication.links.to_string(),
    });
    let patch = json!({ "metadata": { "annotations": annotations } });
    api.patch(&publication.node.0, &PatchParams::default(), &Patch::Merge(patch)).await.map(|_| ())
}
