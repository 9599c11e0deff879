//! What a request asks for, read from its path, query and headers. Pure. In: URI and headers. Out: [`Target`],
//! [`Options`], [`Shape`]. Source: Kubernetes API concepts ("Resource URIs", "Alternate representations").

use axum::extract::Query;
use axum::http::{HeaderMap, Uri, header};

use crate::admission::Strictness;
use crate::resources::{self, Resource};
use crate::status::ApiError;

/// The resource, and which of its objects.
#[derive(Clone, Debug)]
pub(super) struct Target {
    pub(super) resource: &'static Resource,
    /// `None` for cluster-scoped resources and for all namespaces.
    pub(super) namespace: Option<String>,
    pub(super) name: Option<String>,
    pub(super) subresource: Option<String>,
}

impl Target {
    /// `/api/v1/...` or `/apis/GROUP/VERSION/...`; `None` when no resource has that path.
    pub(super) fn parse(path: &str) -> Option<Self> {
        let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
        let (group, version, rest) = match parts.as_slice() {
            ["api", version, rest @ ..] => ("", *version, rest),
            ["apis", group, version, rest @ ..] => (*group, *version, rest),
            _ => return None,
        };
        match rest {
            ["namespaces", namespace, plural, rest @ ..]
                if !(group.is_empty() && matches!(*plural, "status" | "finalize")) =>
            {
                Self::of(group, version, Some(namespace), plural, rest).filter(|it| it.resource.namespaced)
            }
            [plural, rest @ ..] => {
                let target = Self::of(group, version, None, plural, rest)?;
                // Objects of a namespaced resource are only reached through their namespace.
                (!target.resource.namespaced || target.name.is_none()).then_some(target)
            }
            [] => None,
        }
    }

    fn of(group: &str, version: &str, namespace: Option<&str>, plural: &str, rest: &[&str]) -> Option<Self> {
        let resource = resources::find(group, version, plural)?;
        let (name, subresource) = match rest {
            [] => (None, None),
            [name] => (Some(*name), None),
            [name, subresource] => (Some(*name), Some(*subresource)),
            _ => return None,
        };
        let own = |it: &str| it.to_owned();
        Some(Self {
            resource,
            namespace: namespace.map(own),
            name: name.map(own),
            subresource: subresource.map(own),
        })
    }
}

/// The query of a request; what is not named here has no effect on this server.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Options {
    pub(super) label_selector: String,
    pub(super) field_selector: String,
    pub(super) watch: bool,
    pub(super) resource_version: String,
    pub(super) resource_version_match: String,
    pub(super) allow_bookmarks: bool,
    pub(super) send_initial_events: Option<bool>,
    pub(super) timeout_seconds: Option<u64>,
    /// Objects in one answer of a list; 0 is all.
    pub(super) limit: usize,
    /// Where the answer before ended, in the server's words.
    pub(super) continuation: String,
    pub(super) dry_run: bool,
    pub(super) strictness: Strictness,
    /// `includeObject` of a Table: `None`, `Metadata` or `Object`.
    pub(super) include_object: String,
}

impl Options {
    /// # Errors
    /// 400 for a value that cannot be read.
    pub(super) fn parse(uri: &Uri) -> Result<Self, ApiError> {
        let pairs: Query<Vec<(String, String)>> =
            Query::try_from_uri(uri).map_err(|error| ApiError::bad_request(error.to_string()))?;
        let mut options = Self::default();
        for (key, value) in pairs.0 {
            match key.as_str() {
                "labelSelector" => options.label_selector = value,
                "fieldSelector" => options.field_selector = value,
                "watch" => options.watch = is_true(&value),
                "resourceVersion" => options.resource_version = value,
                "resourceVersionMatch" => options.resource_version_match = value,
                "allowWatchBookmarks" => options.allow_bookmarks = is_true(&value),
                "sendInitialEvents" => options.send_initial_events = Some(is_true(&value)),
                "timeoutSeconds" => options.timeout_seconds = Some(number(&key, &value)?),
                "limit" => options.limit = usize::try_from(number(&key, &value)?).unwrap_or_default(),
                "continue" => options.continuation = value,
                "dryRun" => options.dry_run = dry_run(&value)?,
                "fieldValidation" => options.strictness = strictness(&value)?,
                "includeObject" => options.include_object = value,
                _ => {}
            }
        }
        Ok(options)
    }

    /// `resourceVersion` as a number; `None` when it was left out.
    ///
    /// # Errors
    /// 400 when it is not a number.
    pub(super) fn revision(&self) -> Result<Option<u64>, ApiError> {
        let text = self.resource_version.as_str();
        if text.is_empty() { Ok(None) } else { number("resourceVersion", text).map(Some) }
    }
}

fn is_true(value: &str) -> bool {
    matches!(value, "true" | "1" | "True" | "")
}

fn number(key: &str, value: &str) -> Result<u64, ApiError> {
    value.parse().map_err(|_| ApiError::bad_request(format!("{key}: Invalid value: {value:?}")))
}

fn dry_run(value: &str) -> Result<bool, ApiError> {
    match value {
        "" => Ok(false),
        "All" => Ok(true),
        _ => Err(ApiError::bad_request(format!(
            "dryRun: Unsupported value: {value:?}: supported values: \"All\""
        ))),
    }
}

fn strictness(value: &str) -> Result<Strictness, ApiError> {
    match value {
        "" | "Warn" => Ok(Strictness::Warn),
        "Ignore" => Ok(Strictness::Ignore),
        "Strict" => Ok(Strictness::Strict),
        _ => Err(ApiError::bad_request(format!("fieldValidation: Unsupported value: {value:?}"))),
    }
}

/// In what form objects are answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    Object,
    /// `meta.k8s.io/v1 Table`, what kubectl prints.
    Table,
    /// `meta.k8s.io/v1 PartialObjectMetadata`.
    Metadata,
}

impl Shape {
    /// The first form of `Accept` that this server has.
    ///
    /// # Errors
    /// 406 when there is none (protobuf or YAML alone).
    pub(super) fn parse(headers: &HeaderMap) -> Result<Self, ApiError> {
        let accept = headers.get(header::ACCEPT).and_then(|it| it.to_str().ok()).unwrap_or("*/*");
        accept.split(',').find_map(shape).ok_or_else(|| {
            ApiError::new(
                406,
                "NotAcceptable",
                "only the following media types are accepted: application/json",
            )
        })
    }
}

fn shape(media_type: &str) -> Option<Shape> {
    let mut parts = media_type.split(';').map(str::trim);
    if !matches!(parts.next()?, "application/json" | "*/*" | "application/*" | "") {
        return None;
    }
    let parameters: Vec<&str> = parts.collect();
    let parameter = |name: &str| parameters.iter().find_map(|it| it.strip_prefix(name)?.strip_prefix('='));
    match (parameter("as"), parameter("v")) {
        (None, _) => Some(Shape::Object),
        (Some("Table"), Some("v1")) => Some(Shape::Table),
        (Some("PartialObjectMetadata" | "PartialObjectMetadataList"), Some("v1")) => Some(Shape::Metadata),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Parts = (&'static str, Option<String>, Option<String>, Option<String>);

    fn parsed(path: &str) -> Option<Parts> {
        Target::parse(path).map(|it| (it.resource.plural, it.namespace, it.name, it.subresource))
    }

    #[test]
    fn paths_name_a_resource_a_namespace_a_name_and_a_subresource() {
        let own = |it: &str| Some(it.to_owned());
        assert_eq!(parsed("/api/v1/pods"), Some(("pods", None, None, None)));
        assert_eq!(
            parsed("/api/v1/namespaces/a/pods/b/status"),
            Some(("pods", own("a"), own("b"), own("status")))
        );
        assert_eq!(
            parsed("/api/v1/namespaces/a/status"),
            Some(("namespaces", None, own("a"), own("status")))
        );
        assert_eq!(
            parsed("/apis/discovery.k8s.io/v1/namespaces/a/endpointslices"),
            Some(("endpointslices", own("a"), None, None))
        );
        for wrong in
            ["/api/v1/pods/b", "/api/v1/namespaces/a/nodes", "/apis/apps/v1/deployments", "/api/v1", "/x"]
        {
            assert_eq!(parsed(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn the_first_known_form_of_accept_wins() {
        let accept = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::ACCEPT, text.parse().unwrap());
            Shape::parse(&headers).map_err(|it| it.code)
        };
        assert_eq!(accept("application/json;as=Table;v=v1;g=meta.k8s.io,application/json"), Ok(Shape::Table));
        assert_eq!(accept("application/vnd.kubernetes.protobuf, application/json"), Ok(Shape::Object));
        assert_eq!(accept("application/vnd.kubernetes.protobuf"), Err(406));
    }
}
