//! The table of routes as a value: what every request becomes.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, LazyLock};

use serde::{Deserialize, Serialize};
use weft_model::NamespacedName;
use weft_model::ingress::{Bytes, Front, Observe, Reference};

use crate::annotations::{Canary, HttpRedirect, ProxyVersion, Settings};

/// Everything that the ingress of one node does. Written and read by the methods here alone.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteTable {
    /// Where it listens.
    pub addresses: Vec<IpAddr>,
    pub hosts: BTreeMap<Host, Arc<Server>>,
    #[serde(with = "pairs")]
    pub backends: BTreeMap<BackendKey, Arc<Backend>>,
    /// By host name in lower case, `*.` for one label.
    pub certificates: BTreeMap<String, Arc<Certificate>>,
    pub default_certificate: Option<Arc<Certificate>>,
    /// What stands in front of the ingress, and whom of it to believe.
    #[serde(default)]
    pub front: Front,
    #[serde(default)]
    pub observe: Observe,
    /// Asked for and not answered yet: the table is not whole.
    pub waiting: BTreeSet<Reference>,
}

/// A line of the file: settings stand once in it, however many routes have the same.
#[derive(Serialize)]
struct Encoded<'a> {
    table: &'a RouteTable,
    #[serde(skip_serializing_if = "Gone::is_nothing")]
    gone: &'a Gone,
    settings: Vec<&'a Settings>,
    /// For each route, host by host, the place of its settings.
    settings_of_routes: Vec<usize>,
}

#[derive(Deserialize)]
struct Decoded {
    table: RouteTable,
    #[serde(default)]
    gone: Gone,
    settings: Vec<Arc<Settings>>,
    settings_of_routes: Vec<usize>,
}

/// What a change takes away.
#[derive(Default, PartialEq, Serialize, Deserialize)]
struct Gone {
    hosts: Vec<Host>,
    backends: Vec<BackendKey>,
    certificates: Vec<String>,
}

impl Gone {
    fn is_nothing(&self) -> bool {
        *self == Self::default()
    }
}

/// What is new or another in `now`, and what is gone.
fn changed<K: Ord + Clone, V: PartialEq + Clone>(
    now: &BTreeMap<K, V>,
    before: &BTreeMap<K, V>,
) -> (BTreeMap<K, V>, Vec<K>) {
    let others = now.iter().filter(|(key, value)| before.get(key) != Some(value));
    let gone = before.keys().filter(|key| !now.contains_key(key));
    (others.map(|(key, value)| (key.clone(), value.clone())).collect(), gone.cloned().collect())
}

fn with<K: Ord, V>(mut table: BTreeMap<K, V>, others: BTreeMap<K, V>, gone: &[K]) -> BTreeMap<K, V> {
    table.extend(others);
    for key in gone {
        table.remove(key);
    }
    table
}

impl RouteTable {
    /// The whole table as a line, without its end.
    ///
    /// # Errors
    /// None that a table of the planner could give.
    pub fn encode(&self) -> serde_json::Result<Vec<u8>> {
        self.encode_line(&Gone::default())
    }

    /// The line that makes this table of the one `before`, after the line's end there; `None` when they are the same.
    ///
    /// # Errors
    /// None that a table of the planner could give.
    pub fn encode_change(&self, before: &Self) -> serde_json::Result<Option<Vec<u8>>> {
        let (hosts, hosts_gone) = changed(&self.hosts, &before.hosts);
        let (backends, backends_gone) = changed(&self.backends, &before.backends);
        let (certificates, certificates_gone) = changed(&self.certificates, &before.certificates);
        let gone = Gone { hosts: hosts_gone, backends: backends_gone, certificates: certificates_gone };
        let rest = |table: &Self| Self {
            addresses: table.addresses.clone(),
            default_certificate: table.default_certificate.clone(),
            front: table.front.clone(),
            observe: table.observe,
            waiting: table.waiting.clone(),
            ..Self::default()
        };
        let change = Self { hosts, backends, certificates, ..rest(self) };
        if gone.is_nothing() && change == rest(before) {
            return Ok(None);
        }
        let mut line = vec![b'\n'];
        line.extend(change.encode_line(&gone)?);
        Ok(Some(line))
    }

    /// Whether the table `before` holds keys or users that this one does not: what is withdrawn is not to stay in a file.
    pub fn withdraws_secrets_of(&self, before: &Self) -> bool {
        let withdrawn = |(name, one)| self.certificates.get(name) != Some(one);
        let changed = |(host, server): &(&Host, &Arc<Server>)| self.hosts.get(host) != Some(server);
        let holds =
            |(_, server): (_, &Arc<Server>)| server.routes.iter().any(|route| !route.materials.is_empty());
        before.certificates.iter().any(withdrawn)
            || before.default_certificate.is_some() && before.default_certificate != self.default_certificate
            || before.hosts.iter().filter(changed).any(holds)
    }

    fn encode_line(&self, gone: &Gone) -> serde_json::Result<Vec<u8>> {
        let (mut settings, mut settings_of_routes) = (Vec::new(), Vec::new());
        let (mut by_address, mut by_text) = (HashMap::new(), HashMap::new());
        for route in self.hosts.values().flat_map(|server| &server.routes) {
            let address = Arc::as_ptr(&route.settings);
            let place = match by_address.get(&address) {
                Some(place) => *place,
                None => {
                    let text = serde_json::to_string(&*route.settings)?;
                    let place = *by_text.entry(text).or_insert_with(|| {
                        settings.push(&*route.settings);
                        settings.len() - 1
                    });
                    by_address.insert(address, place);
                    place
                }
            };
            settings_of_routes.push(place);
        }
        serde_json::to_vec(&Encoded { table: self, gone, settings, settings_of_routes })
    }

    /// A file of the table's line and those of its changes.
    ///
    /// # Errors
    /// It is no file that this version or the one before wrote.
    pub fn decode(text: &[u8]) -> serde_json::Result<Self> {
        let mut lines = text.split(|byte| *byte == b'\n');
        let mut table = Self::decode_line(lines.next().unwrap_or_default())?.0;
        lines.try_for_each(|line| table.change(line))?;
        Ok(table)
    }

    /// Takes a line of [`RouteTable::encode_change`], without the end of the line before it.
    ///
    /// # Errors
    /// It is no such line; nothing changes.
    pub fn change(&mut self, line: &[u8]) -> serde_json::Result<()> {
        let (mut change, gone) = Self::decode_line(line)?;
        change.hosts = with(std::mem::take(&mut self.hosts), change.hosts, &gone.hosts);
        change.backends = with(std::mem::take(&mut self.backends), change.backends, &gone.backends);
        change.certificates =
            with(std::mem::take(&mut self.certificates), change.certificates, &gone.certificates);
        *self = change;
        Ok(())
    }

    fn decode_line(line: &[u8]) -> serde_json::Result<(Self, Gone)> {
        use serde::de::Error as _;
        let Decoded { mut table, gone, settings, settings_of_routes } = match serde_json::from_slice(line) {
            Ok(decoded) => decoded,
            // What the agent of the version before wrote has settings in each route: an upgraded proxy serves it until the agent
            // writes anew.
            Err(error) => {
                return serde_json::from_slice(line).map(|table| (table, Gone::default())).map_err(|_| error);
            }
        };
        let routes = table.hosts.values_mut().flat_map(|server| &mut Arc::make_mut(server).routes);
        let mut places = settings_of_routes.into_iter();
        for route in routes {
            let of_route = places.next().and_then(|place| settings.get(place)).cloned();
            Arc::make_mut(route).settings =
                of_route.ok_or_else(|| serde_json::Error::custom("a route without settings"))?;
        }
        // Hosts of one certificate share it, as in the table that was written.
        let mut first: HashMap<NamespacedName, Arc<Certificate>> = HashMap::new();
        for one in table.certificates.values_mut() {
            let known = first.entry(one.secret.clone()).or_insert_with(|| one.clone());
            if known == one {
                *one = known.clone();
            }
        }
        Ok((table, gone))
    }
}

/// What a route has until its settings are found.
fn unset() -> Arc<Settings> {
    static UNSET: LazyLock<Arc<Settings>> = LazyLock::new(Arc::default);
    UNSET.clone()
}

/// The host part of a rule. Order: exact names, wildcards, then every host.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", from = "String")]
pub enum Host {
    Exact(String),
    /// `*.example.com` without the `*.`: one label more.
    Wildcard(String),
    Any,
}

impl Host {
    pub fn of(text: Option<&str>) -> Self {
        match text {
            None => Self::Any,
            Some(text) => match text.strip_prefix("*.") {
                Some(suffix) => Self::Wildcard(suffix.to_owned()),
                None => Self::Exact(text.to_owned()),
            },
        }
    }

    /// Whether a request for this name, in lower case and without a port, is meant.
    pub fn matches(&self, name: &str) -> bool {
        match self {
            Self::Exact(host) => host == name,
            Self::Wildcard(suffix) => {
                name.split_once('.').is_some_and(|(label, rest)| !label.is_empty() && rest == suffix)
            }
            Self::Any => true,
        }
    }
}

impl From<Host> for String {
    fn from(host: Host) -> Self {
        host.to_string()
    }
}

impl From<String> for Host {
    fn from(text: String) -> Self {
        Self::of(Some(text.as_str()).filter(|text| *text != "*"))
    }
}

impl std::fmt::Display for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exact(host) => f.write_str(host),
            Self::Wildcard(suffix) => write!(f, "*.{suffix}"),
            Self::Any => f.write_str("*"),
        }
    }
}

/// The routes of one host, in the order in which they are tried: the first that matches is taken.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Server {
    pub routes: Vec<Arc<Route>>,
    /// Another name of the same host: requests are redirected to it (`from-to-www-redirect`).
    pub redirect_to: Option<String>,
    /// Connections for this host over TLS are not for the routes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub passthrough: Option<Passthrough>,
}

impl Server {
    /// What its routes lead to; one may come more than once.
    pub fn backends(&self) -> impl Iterator<Item = &BackendKey> {
        let passed = self.passthrough.as_ref().map(|passthrough| &passthrough.backend);
        self.routes.iter().flat_map(|route| route.backends()).chain(passed)
    }
}

/// TLS that goes to a backend as it is (`ssl-passthrough`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Passthrough {
    pub backend: BackendKey,
    pub origin: Origin,
    /// The backend hears first whose connection it is.
    pub proxy_protocol: Option<ProxyVersion>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    pub matcher: PathMatch,
    pub origin: Origin,
    pub action: Action,
    /// Tried in order before the action: header, cookie, weight.
    pub canary: Option<CanaryBranch>,
    /// Answers where the backend has no endpoint, and gives the pages of `custom-http-errors`.
    pub fallback: Option<BackendKey>,
    #[serde(skip_serializing, default = "unset")]
    pub settings: Arc<Settings>,
    #[serde(default, skip_serializing_if = "RouteMaterials::is_empty")]
    pub materials: RouteMaterials,
    /// HTTP is redirected to HTTPS.
    pub to_https: bool,
}

impl Route {
    fn backends(&self) -> impl Iterator<Item = &BackendKey> {
        let forward = match &self.action {
            Action::Forward(key) => Some(key),
            _ => None,
        };
        let canary = self.canary.as_ref().map(|canary| &canary.backend);
        [forward, canary, self.fallback.as_ref()].into_iter().flatten()
    }
}

/// Where a route comes from, for people.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Origin {
    pub ingress: NamespacedName,
    /// `spec.rules[0].http.paths[1]` or `spec.defaultBackend`.
    pub field: String,
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Ingress {} {}", self.ingress, self.field)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum PathMatch {
    Exact(String),
    /// By element, without a `/` at the end; empty is every path.
    Prefix(String),
    /// By character: what ingress-nginx does with ImplementationSpecific.
    Text(String),
    /// A case-insensitive expression that the path must begin with.
    Regex(String),
}

impl PathMatch {
    /// Longer goes first (Kubernetes: "precedence will be given first to the longest matching path"), Exact before others.
    pub fn order(&self) -> (std::cmp::Reverse<usize>, u8, &str) {
        let (rank, text) = match self {
            Self::Exact(text) => (0, text),
            Self::Prefix(text) => (1, text),
            Self::Text(text) => (2, text),
            Self::Regex(text) => (3, text),
        };
        (std::cmp::Reverse(text.len()), rank, text)
    }

    /// Whether a normalised path is meant; an expression is compiled anew, so this is for explanations.
    pub fn matches(&self, path: &str) -> bool {
        match self {
            Self::Exact(text) => path == text,
            Self::Prefix(text) => {
                path.strip_prefix(text.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            }
            Self::Text(text) => path.starts_with(text.as_str()),
            Self::Regex(text) => expression(text).is_ok_and(|expression| expression.is_match(path)),
        }
    }
}

impl PathMatch {
    /// The path of the rule.
    pub fn path(&self) -> &str {
        match self {
            Self::Prefix(text) if text.is_empty() => "/",
            Self::Exact(text) | Self::Prefix(text) | Self::Text(text) | Self::Regex(text) => text,
        }
    }
}

impl std::fmt::Display for PathMatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exact(text) => write!(f, "= {text}"),
            Self::Prefix(text) => write!(f, "{text}/"),
            Self::Text(text) => write!(f, "{text}*"),
            Self::Regex(text) => write!(f, "~* ^{text}"),
        }
    }
}

/// The expression that a path of a regex host stands for, as ingress-nginx makes it: `~* "^PATH"`.
pub fn expression(path: &str) -> Result<regex::Regex, regex::Error> {
    regex::RegexBuilder::new(&format!("^{path}")).case_insensitive(true).size_limit(1 << 20).build()
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Action {
    Forward(BackendKey),
    Redirect(HttpRedirect),
    /// Answered with this status; why, for people.
    Refuse {
        status: u16,
        why: String,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CanaryBranch {
    pub origin: Origin,
    pub rule: Canary,
    pub backend: BackendKey,
}

/// A Service and its port as a route names it; prints as `namespace/name:port`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct BackendKey {
    pub service: NamespacedName,
    pub port: weft_model::ingress::BackendPort,
    /// Its ClusterIP instead of its endpoints (`service-upstream`).
    pub by_service: bool,
}

impl std::fmt::Display for BackendKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{}:{}{}",
            self.service,
            self.port,
            if self.by_service { " (by its ClusterIP)" } else { "" }
        )
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Backend {
    /// In the order of their addresses.
    Endpoints(Vec<Target>),
    /// An ExternalName Service: a name and a port.
    Name(String, u16),
    /// 503, and why.
    Missing(String),
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Target {
    pub address: SocketAddr,
    /// It is about to end and serves still: used only where nobody else is ready.
    pub terminating: bool,
    /// `namespace/name`, for people.
    pub pod: Option<NamespacedName>,
    pub node: Option<String>,
}

/// Chain and key of a Secret, in PEM. Debug output never shows the key.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Certificate {
    pub secret: NamespacedName,
    pub chain_pem: Bytes,
    pub key_pem: Bytes,
}

impl std::fmt::Debug for Certificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Certificate({})", self.secret)
    }
}

/// What a route needs of Secrets and ConfigMaps.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteMaterials {
    /// User and hash, as in an htpasswd file.
    pub users: Option<BTreeMap<String, String>>,
    /// Headers to the authenticator.
    pub auth_headers: BTreeMap<String, String>,
    /// Headers added to answers.
    pub answer_headers: BTreeMap<String, String>,
    /// Authorities of client certificates, PEM.
    pub client_authorities: Option<Bytes>,
    /// Certificate, key and authorities for backends, PEM.
    pub upstream_certificate: Option<Certificate>,
    pub upstream_authorities: Option<Bytes>,
}

impl RouteMaterials {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl std::fmt::Debug for RouteMaterials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let users = self.users.as_ref().map(|users| users.keys().collect::<Vec<_>>());
        f.debug_struct("RouteMaterials")
            .field("users", &users)
            .field("auth_headers", &self.auth_headers)
            .field("answer_headers", &self.answer_headers)
            .field("client_authorities", &self.client_authorities.is_some())
            .field("upstream_certificate", &self.upstream_certificate)
            .finish_non_exhaustive()
    }
}

/// A map whose keys are no texts, as a list of pairs.
mod pairs {
    use std::collections::BTreeMap;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<K: Serialize, V: Serialize, S: Serializer>(
        map: &BTreeMap<K, V>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(map)
    }

    pub(super) fn deserialize<'de, K, V, D>(deserializer: D) -> Result<BTreeMap<K, V>, D::Error>
    where
        K: Deserialize<'de> + Ord,
        V: Deserialize<'de>,
        D: Deserializer<'de>,
    {
        Ok(Vec::<(K, V)>::deserialize(deserializer)?.into_iter().collect())
    }
}
