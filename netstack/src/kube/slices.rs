//! Owner of EndpointSlices that Weft writes for Services of its own: creates, replaces and deletes them while this node holds the
//! Lease.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;

use kube::api::{DeleteParams, PostParams};
use kube::core::Request;
use serde_json::Value;
use weft_model::NamespacedName;

use super::client::Access;
use super::lease::Lead;
use crate::reconcile::{Applied, Applier, Trust};

/// The slices that are not yet as they are to be, whole; `None` is one that is to go.
pub type Slices = BTreeMap<NamespacedName, Option<Value>>;

pub struct SlicesWriter {
    access: Arc<Access>,
    lead: Lead,
}

impl SlicesWriter {
    pub fn new(access: Arc<Access>, lead: Lead) -> Self {
        Self { access, lead }
    }
}

impl Applier for SlicesWriter {
    type Plan = Slices;

    fn apply(&mut self, plan: &Slices, _trust: Trust) -> impl Future<Output = Applied> + Send {
        let due: Vec<(NamespacedName, Option<Value>)> = match self.lead.is_held() {
            true => plan.iter().map(|(key, slice)| (key.clone(), slice.clone())).collect(),
            false => Vec::new(),
        };
        let access = self.access.clone();
        async move {
            let mut applied = Applied::default();
            for (key, slice) in due {
                let what = if slice.is_some() { "" } else { "no " };
                match access.ask(async |client| write(&client, &key, slice).await).await {
                    Ok(()) => applied.changed.push(format!("{what}EndpointSlice {key}")),
                    Err(failure) => {
                        let sentence = failure.sentence(&access.address());
                        applied.failed.push(format!("EndpointSlice {key}: {sentence}"));
                    }
                }
            }
            applied
        }
    }
}

/// Replaces the slice, or creates it where there is none; one that is gone already needs no deletion.
async fn write(client: &kube::Client, key: &NamespacedName, slice: Option<Value>) -> Result<(), kube::Error> {
    let slices =
        Request::new(format!("/apis/discovery.k8s.io/v1/namespaces/{}/endpointslices", key.namespace));
    let build = kube::Error::BuildRequest;
    let Some(slice) = slice else {
        let request = slices.delete(&key.name, &DeleteParams::default()).map_err(build)?;
        return match client.request::<Value>(request).await {
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            outcome => outcome.map(drop),
        };
    };
    let body = slice.to_string().into_bytes();
    let replace = slices.replace(&key.name, &PostParams::default(), body.clone()).map_err(build)?;
    match client.request::<Value>(replace).await {
        Err(kube::Error::Api(status)) if status.code == 404 => {
            let create = slices.create(&PostParams::default(), body).map_err(build)?;
            client.request::<Value>(create).await.map(drop)
        }
        outcome => outcome.map(drop),
    }
}
