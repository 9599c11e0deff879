//! Who is asking, and may they. In: bearer tokens, from a file and of our own making. Out: an [`Identity`] and yes or no.
//!
//! There is no RBAC here. `system:masters` may do everything. A Weft agent (`system:serviceaccount:weft-system:weft-agent`
//! with the group `weft.network:node:NAME`) reads all but Secrets and writes only the annotations of its own Node, the
//! statuses of Services and of pools, Events and Leases. A kubelet (`system:node:NAME` with the group `system:nodes`) keeps its own Node and the Pods bound to it.
//! Everybody else with a valid token reads all but Secrets.

use std::collections::HashMap;

use axum::http::{HeaderMap, header};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::object;
use crate::resources::Resource;
use crate::status::ApiError;

const MASTERS: &str = "system:masters";
/// The user name of agents, as their ServiceAccount has it in a real cluster.
pub const AGENT_USER: &str = "system:serviceaccount:weft-system:weft-agent";
/// User name of kubelets; the node's name follows.
const KUBELET_PREFIX: &str = "system:node:";
const KUBELETS: &str = "system:nodes";
/// Group that binds an agent's token to its node; the node's name follows.
pub const NODE_GROUP_PREFIX: &str = "weft.network:node:";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verb {
    Get,
    List,
    Watch,
    Create,
    Update,
    Patch,
    Delete,
    DeleteCollection,
}

impl Verb {
    fn is_read(self) -> bool {
        matches!(self, Self::Get | Self::List | Self::Watch)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::List => "list",
            Self::Watch => "watch",
            Self::Create => "create",
            Self::Update => "update",
            Self::Patch => "patch",
            Self::Delete => "delete",
            Self::DeleteCollection => "deletecollection",
        }
    }
}

/// A user and the groups that count.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub user: String,
    pub groups: Vec<String>,
}

/// A line of a token file that cannot be read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("line {line}: expected token,user,groups (groups separated by | or in quotes by commas)")]
pub struct TokenFileError {
    pub line: usize,
}

/// Reads `token,user,groups` lines; `#` begins a comment. Groups may be left out, are separated by `|`, or stand in
/// double quotes separated by commas.
///
/// # Errors
/// The first line that does not fit.
pub fn parse_tokens(text: &str) -> Result<Vec<(String, Identity)>, TokenFileError> {
    let mut tokens = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let mut parts = line.splitn(3, ',').map(str::trim);
        let (Some(token), Some(user)) = (parts.next(), parts.next()) else {
            return Err(TokenFileError { line: index + 1 });
        };
        if token.is_empty() || user.is_empty() {
            return Err(TokenFileError { line: index + 1 });
        }
        let groups = parts.next().unwrap_or_default().trim_matches('"');
        let groups =
            groups.split(['|', ',']).map(str::trim).filter(|it| !it.is_empty()).map(str::to_owned).collect();
        tokens.push((token.to_owned(), Identity { user: user.to_owned(), groups }));
    }
    Ok(tokens)
}

/// Knows tokens by their SHA-256, so that looking one up takes no time that depends on a secret's prefix.
#[derive(Debug, Default)]
pub(crate) struct Verifier(HashMap<[u8; 32], Identity>);

impl Verifier {
    pub(crate) fn insert(&mut self, token: &str, identity: Identity) {
        self.0.insert(Sha256::digest(token).into(), identity);
    }

    /// # Errors
    /// 401 without a token that is known.
    pub(crate) fn identify(&self, headers: &HeaderMap) -> Result<Identity, ApiError> {
        let token = headers
            .get(header::AUTHORIZATION)
            .and_then(|it| it.to_str().ok())
            .and_then(|it| it.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
            .map(|(_, token)| token.trim());
        let digest: Option<[u8; 32]> = token.map(|it| Sha256::digest(it).into());
        digest
            .and_then(|it| self.0.get(&it).cloned())
            .ok_or_else(|| ApiError::new(401, "Unauthorized", "Unauthorized"))
    }
}

impl Identity {
    /// May do everything.
    #[must_use]
    pub fn admin(user: &str) -> Self {
        Self { user: user.to_owned(), groups: vec![MASTERS.to_owned()] }
    }

    /// An agent bound to a node.
    #[must_use]
    pub fn agent(node: &str) -> Self {
        Self { user: AGENT_USER.to_owned(), groups: vec![format!("{NODE_GROUP_PREFIX}{node}")] }
    }

    fn is_admin(&self) -> bool {
        self.groups.iter().any(|it| it == MASTERS)
    }

    /// The node an agent is bound to.
    fn node(&self) -> Option<&str> {
        let bound = self.groups.iter().find_map(|it| it.strip_prefix(NODE_GROUP_PREFIX));
        bound.filter(|_| self.user == AGENT_USER)
    }

    /// The node a kubelet keeps.
    fn kubelet_node(&self) -> Option<&str> {
        self.user.strip_prefix(KUBELET_PREFIX).filter(|_| self.groups.iter().any(|it| it == KUBELETS))
    }

    /// # Errors
    /// 403 for what this identity may not do.
    pub(crate) fn authorize(
        &self,
        verb: Verb,
        resource: &Resource,
        name: Option<&str>,
    ) -> Result<(), ApiError> {
        let may = self.is_admin()
            || (verb.is_read() && resource.plural != "secrets")
            || self.node().is_some_and(|node| agent_may(node, verb, resource, name))
            || self.kubelet_node().is_some_and(|node| kubelet_may(node, verb, resource, name));
        if may {
            return Ok(());
        }
        let why = format!(
            "User \"{}\" cannot {} resource \"{}\" in API group \"{}\" (this server has no RBAC: only {MASTERS} may)",
            self.user,
            verb.name(),
            resource.plural,
            resource.group
        );
        Err(ApiError::forbidden(resource, name.unwrap_or_default(), &why))
    }

    /// The part of authorization that needs both states: an agent changes nothing of its Node but annotations, a kubelet
    /// no Pod of another node.
    ///
    /// # Errors
    /// 403 for any other change.
    pub(crate) fn authorize_change(
        &self,
        resource: &Resource,
        old: &Value,
        new: &Value,
    ) -> Result<(), ApiError> {
        if self.is_admin() {
            return Ok(());
        }
        let refused = match (resource.plural, self.kubelet_node()) {
            ("pods", Some(node)) => (old["spec"]["nodeName"].as_str() != Some(node))
                .then_some("a kubelet may only change the Pods bound to its node"),
            ("services" | "ipaddresspools" | "ingresses", None) => (without(old, &["status"])
                != without(new, &["status"]))
            .then_some("an agent may only change the status of this object"),
            ("nodes", None) => (of_others(old) != of_others(new))
                .then_some("an agent may only change the annotations and one condition of its own Node"),
            _ => None,
        };
        refused.map_or(Ok(()), |why| Err(ApiError::forbidden(resource, object::name(old), why)))
    }
}

fn agent_may(node: &str, verb: Verb, resource: &Resource, name: Option<&str>) -> bool {
    match resource.plural {
        "nodes" => matches!(verb, Verb::Update | Verb::Patch) && name == Some(node),
        "events" => matches!(verb, Verb::Create | Verb::Update | Verb::Patch),
        "leases" => matches!(verb, Verb::Create | Verb::Update | Verb::Patch),
        "services" | "ipaddresspools" | "ingresses" => verb == Verb::Patch,
        "endpointslices" => matches!(verb, Verb::Create | Verb::Update | Verb::Delete),
        // What an Ingress refers to, by its name.
        "secrets" => verb == Verb::Get,
        _ => false,
    }
}

fn kubelet_may(node: &str, verb: Verb, resource: &Resource, name: Option<&str>) -> bool {
    match resource.plural {
        "nodes" => verb == Verb::Create || name == Some(node),
        "pods" => matches!(verb, Verb::Update | Verb::Patch | Verb::Delete),
        "events" | "leases" => matches!(verb, Verb::Create | Verb::Update | Verb::Patch),
        _ => false,
    }
}

const ANNOTATIONS: [&str; 2] = ["metadata", "annotations"];
/// The condition that an agent writes on its own Node.
const AGENT_CONDITION: &str = "weft.network/NetworkPolicyReady";

/// A Node without what its agent may write.
fn of_others(node: &Value) -> Value {
    let mut node = without(node, &ANNOTATIONS);
    let Some(status) = node.get_mut("status").and_then(Value::as_object_mut) else { return node };
    if let Some(conditions) = status.get_mut("conditions").and_then(Value::as_array_mut) {
        conditions.retain(|condition| condition["type"] != AGENT_CONDITION);
        if conditions.is_empty() {
            status.remove("conditions");
        }
    }
    if status.is_empty() {
        object::remove(&mut node, &["status"]);
    }
    node
}

fn without(object: &Value, path: &[&str]) -> Value {
    let mut object = object.clone();
    object::remove(&mut object, path);
    object
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resources::find;
    use serde_json::json;

    #[test]
    fn a_token_file_names_user_and_groups_and_its_bad_lines() {
        let tokens =
            parse_tokens("# comment\nt1,alice,system:masters|x\n\nt2,bob\nt3,eve,\"a,b\"\n").unwrap();
        assert_eq!(
            tokens[0],
            (
                "t1".to_owned(),
                Identity { user: "alice".into(), groups: vec!["system:masters".into(), "x".into()] }
            )
        );
        assert_eq!(tokens[1].1.groups, [""; 0]);
        assert_eq!(tokens[2].1.groups, ["a", "b"]);
        assert_eq!(parse_tokens("ok,u\nbroken"), Err(TokenFileError { line: 2 }));
    }

    #[test]
    fn only_known_bearer_tokens_pass() {
        let mut verifier = Verifier::default();
        verifier.insert("secret", Identity::admin("root"));
        let identify = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::AUTHORIZATION, value.parse().unwrap());
            verifier.identify(&headers).map(|it| it.user).map_err(|it| it.code)
        };
        assert_eq!(identify("Bearer secret"), Ok("root".to_owned()));
        assert_eq!(identify("Bearer wrong"), Err(401));
        assert_eq!(identify("Basic secret"), Err(401));
        assert_eq!(verifier.identify(&HeaderMap::new()).unwrap_err().code, 401);
    }

    #[test]
    fn a_kubelet_keeps_its_own_node_and_the_pods_bound_to_it() {
        let kubelet = Identity { user: "system:node:a".into(), groups: vec!["system:nodes".into()] };
        let nodes = find("", "v1", "nodes").unwrap();
        let pods = find("", "v1", "pods").unwrap();
        let services = find("", "v1", "services").unwrap();
        assert!(kubelet.authorize(Verb::Patch, nodes, Some("a")).is_ok());
        assert_eq!(kubelet.authorize(Verb::Patch, nodes, Some("b")).unwrap_err().code, 403);
        assert_eq!(kubelet.authorize(Verb::Create, services, None).unwrap_err().code, 403);
        let bound = |node: &str| json!({"metadata": {"name": "p"}, "spec": {"nodeName": node}});
        assert!(kubelet.authorize_change(pods, &bound("a"), &bound("a")).is_ok());
        assert_eq!(kubelet.authorize_change(pods, &bound("b"), &bound("b")).unwrap_err().code, 403);
        let impostor = Identity { user: "system:node:a".into(), groups: Vec::new() };
        assert!(impostor.authorize(Verb::Patch, nodes, Some("a")).is_err());
    }

    #[test]
    fn an_agent_writes_only_the_annotations_and_one_condition_of_its_own_node() {
        let agent = Identity::agent("a");
        let nodes = find("", "v1", "nodes").unwrap();
        let services = find("", "v1", "services").unwrap();
        let secrets = find("", "v1", "secrets").unwrap();
        assert!(agent.authorize(Verb::Patch, nodes, Some("a")).is_ok());
        assert_eq!(agent.authorize(Verb::Patch, nodes, Some("b")).unwrap_err().code, 403);
        assert!(agent.authorize(Verb::Watch, services, None).is_ok());
        assert!(agent.authorize(Verb::Update, services, Some("x")).is_err());
        let service = |port: u16, ip: &str| json!({"spec": {"port": port}, "status": {"ip": ip}});
        assert!(agent.authorize_change(services, &service(1, ""), &service(1, "192.0.2.1")).is_ok());
        assert_eq!(agent.authorize_change(services, &service(1, ""), &service(2, "")).unwrap_err().code, 403);
        assert!(agent.authorize(Verb::Get, secrets, Some("x")).is_ok(), "what an Ingress names");
        assert!(agent.authorize(Verb::List, secrets, None).is_err());
        let old = json!({"metadata": {"name": "a"}, "spec": {}});
        let annotated = json!({"metadata": {"name": "a", "annotations": {"k": "v"}}, "spec": {}});
        let tainted = json!({"metadata": {"name": "a"}, "spec": {"taints": []}});
        assert!(agent.authorize_change(nodes, &old, &annotated).is_ok());
        assert_eq!(agent.authorize_change(nodes, &old, &tainted).unwrap_err().code, 403);
        assert!(Identity::admin("root").authorize_change(nodes, &old, &tainted).is_ok());
        let with = |conditions: Value| json!({"metadata": {"name": "a"}, "spec": {}, "status": {"conditions": conditions}});
        let own = json!({"type": AGENT_CONDITION, "status": "True"});
        let kubelets = json!({"type": "Ready", "status": "True"});
        assert!(agent.authorize_change(nodes, &old, &with(json!([own]))).is_ok());
        let before = with(json!([kubelets]));
        assert!(agent.authorize_change(nodes, &before, &with(json!([kubelets, own]))).is_ok());
        assert!(
            agent.authorize_change(nodes, &before, &with(json!([own]))).is_err(),
            "the kubelet's is gone"
        );
    }
}
