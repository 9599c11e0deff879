//! The search path of a pod, walked here instead of by its resolver (CoreDNS's `autopath`). Pure.
//!
//! A pod that wants `www.example.com` asks for `www.example.com.<its namespace>.svc.<domain>` first, and for three and more
//! other names before the one it means. Whoever knows the namespace of the pod can give the last answer to the first
//! question. That a question is of this kind can be told only for the namespace that the pod is really in.

use crate::name::Name;

/// The names that the pod's resolver would ask for next, in order, when it asked for `name` first: below the cluster's
/// domains, then below `search` (the host's), then as it stands. `None` when its search path does not begin so.
pub(crate) fn rest_of_path(
    name: &Name,
    namespace: &str,
    domain: &Name,
    search: &[Name],
) -> Option<Vec<Name>> {
    let services = domain.child("svc").ok()?;
    let first = services.child(namespace).ok()?;
    if !name.is_in(&first) || *name == first {
        return None;
    }
    let wanted: Vec<&[u8]> = name.labels().take(name.labels().count() - first.labels().count()).collect();
    let below = |suffix: &Name| Name::from_labels(wanted.iter().copied().chain(suffix.labels())).ok();
    let suffixes = [services, domain.clone()].into_iter().chain(search.iter().cloned()).chain([Name::root()]);
    Some(suffixes.filter_map(|suffix| below(&suffix)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(name: &str, namespace: &str) -> Option<Vec<String>> {
        let domain = Name::parse("cluster.local").unwrap();
        let search = [Name::parse("lan").unwrap()];
        let names = rest_of_path(&Name::parse(name).unwrap(), namespace, &domain, &search)?;
        Some(names.iter().map(Name::to_string).collect())
    }

    #[test]
    fn the_rest_of_the_path_is_the_clusters_domains_the_hosts_and_the_name_itself() {
        let expected = [
            "www.example.com.svc.cluster.local.",
            "www.example.com.cluster.local.",
            "www.example.com.lan.",
            "www.example.com.",
        ];
        assert_eq!(
            path("www.example.com.shop.svc.cluster.local", "shop"),
            Some(expected.map(str::to_owned).into())
        );
    }

    #[test]
    fn another_beginning_is_no_search_path_of_the_pod() {
        assert_eq!(path("www.example.com.shop.svc.cluster.local", "other"), None);
        assert_eq!(path("shop.svc.cluster.local", "shop"), None);
        assert_eq!(path("www.example.com.svc.cluster.local", "shop"), None);
        assert_eq!(path("www.example.com", "shop"), None);
    }
}
