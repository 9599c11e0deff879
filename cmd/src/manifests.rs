//! `weft manifests`: the embedded manifests with this cluster's values put in.
//!
//! In: an image and the agent's flags, checked as the agent checks them. Out: YAML for `kubectl apply -f -`.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, ensure};
use clap::Args;
use serde::Deserialize as _;
use serde_json::{Value, json};

use crate::Invalid;
use crate::agent::{GivenArgs, api_server};
use crate::install::environment;

#[derive(Args)]
pub(crate) struct ManifestsArgs {
    /// Image of the DaemonSet's container; the binary is /weft in it
    #[arg(long, default_value = concat!("weft:", env!("CARGO_PKG_VERSION")))]
    image: String,
    /// Leave the DaemonSet out: `weft install` is run on each node by hand
    #[arg(long)]
    no_daemonset: bool,
    #[command(flatten)]
    given: GivenArgs,
}

pub(crate) fn run(args: ManifestsArgs) -> anyhow::Result<()> {
    let text = render(args).map_err(|error| Invalid(format!("{error:#}")))?;
    crate::print(&text)
}

/// The objects of a text of several documents.
pub(crate) fn documents(text: &str) -> anyhow::Result<Vec<Value>> {
    let read = serde_yaml_ng::Deserializer::from_str(text).map(Value::deserialize);
    Ok(read.collect::<Result<_, _>>()?)
}

/// All documents in the order in which they are applied.
fn render(args: ManifestsArgs) -> anyhow::Result<String> {
    let agent = &args.given.agent;
    let cluster = agent.cluster()?;
    if let Some(url) = &agent.api_server {
        api_server(url)?;
    }
    let of_one_node = [
        ("--node-name", agent.node_name.is_some()),
        ("--kubeconfig", agent.kubeconfig.is_some()),
        ("--token-file", agent.token_file.is_some()),
        ("--ca-file", agent.ca_file.is_some()),
    ];
    for (flag, given) in of_one_node {
        ensure!(!given, "{flag} cannot stand in manifests: the DaemonSet takes it from its pod on each node");
    }
    ensure!(
        !args.image.is_empty() && !args.image.contains(char::is_whitespace),
        "--image {:?} is no image",
        args.image
    );
    environment::render(&args.given.words)?;
    let daemonset = daemonset(&args.image, &args.given.words, agent.observe_address)?;
    let mut documents = vec![weft_manifests::RBAC.to_owned(), weft_manifests::POLICY.to_owned()];
    if !args.no_daemonset {
        documents.push(serde_yaml_ng::to_string(&daemonset)?);
    }
    documents.push(serde_yaml_ng::to_string(&kube_dns(&cluster.cluster_dns)?)?);
    documents.extend(cluster.ingress.on.then(|| weft_manifests::INGRESS.to_owned()));
    Ok(documents.join("---\n"))
}

/// `words` are the agent's flags, each with its value. They stand in one text each: a lone `on` is a truth value to kubectl, whose
/// YAML is of version 1.1.
fn daemonset(image: &str, words: &[String], observe: SocketAddr) -> anyhow::Result<Value> {
    let mut daemonset = document(weft_manifests::DAEMONSET)?;
    let container = part(&mut daemonset, "/spec/template/spec/containers/0")?;
    container["image"] = json!(image);
    let args = part(container, "/args")?.as_array_mut().context("its args are no list")?;
    args.extend(words.chunks(2).map(|flag| json!(flag.join("="))));
    let probe = part(container, "/readinessProbe/httpGet")?;
    probe["host"] = json!(probed(observe.ip()));
    probe["port"] = json!(observe.port());
    Ok(daemonset)
}

/// As JSON: read as its type it would bring a parser of every kind of volume with it.
fn document(text: &str) -> anyhow::Result<Value> {
    Ok(serde_yaml_ng::from_str(text)?)
}

fn part<'a>(document: &'a mut Value, pointer: &str) -> anyhow::Result<&'a mut Value> {
    document.pointer_mut(pointer).with_context(|| format!("the embedded manifest has no {pointer}"))
}

/// Where the kubelet reaches what listens on `address`.
fn probed(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(any) if any.is_unspecified() => std::net::Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(any) if any.is_unspecified() => std::net::Ipv6Addr::LOCALHOST.into(),
        one => one,
    }
}

fn kube_dns(addresses: &[IpAddr]) -> anyhow::Result<Value> {
    let mut service = document(weft_manifests::KUBE_DNS)?;
    let spec = part(&mut service, "/spec")?;
    let family = |address: &IpAddr| if address.is_ipv4() { "IPv4" } else { "IPv6" };
    let policy = if addresses.len() > 1 { "RequireDualStack" } else { "SingleStack" };
    spec["clusterIP"] = json!(addresses.first());
    spec["clusterIPs"] = json!(addresses);
    spec["ipFamilies"] = addresses.iter().map(family).collect();
    spec["ipFamilyPolicy"] = json!(policy);
    Ok(service)
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;
    use k8s_openapi::api::admissionregistration::v1::ValidatingAdmissionPolicy;
    use k8s_openapi::api::apps::v1::DaemonSet;
    use k8s_openapi::api::core::v1::Service;
    use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
    use serde::Serialize;
    use serde::de::DeserializeOwned;

    use super::*;
    use crate::{Cli, Command};

    fn manifests(flags: &[&str]) -> Result<String, String> {
        let line = ["weft", "manifests"].iter().chain(flags);
        match Cli::try_parse_from(line).map_err(|error| error.to_string())?.command {
            Command::Manifests(args) => render(*args).map_err(|error| format!("{error:#}")),
            _ => Err("another command".to_owned()),
        }
    }

    /// A document that loses nothing when it is read as `T` has no field that Kubernetes does not know.
    fn loses_nothing<T: DeserializeOwned + Serialize>(text: &str) {
        let written = documents(text).unwrap().remove(0);
        let read: T = serde_json::from_value(written.clone()).unwrap();
        assert_eq!(serde_json::to_value(read).unwrap(), written);
    }

    #[test]
    fn the_documents_have_only_fields_that_kubernetes_knows() {
        loses_nothing::<DaemonSet>(weft_manifests::DAEMONSET);
        loses_nothing::<Service>(weft_manifests::KUBE_DNS);
        loses_nothing::<ValidatingAdmissionPolicy>(weft_manifests::POLICY);
    }

    #[test]
    fn the_daemonsets_flags_are_those_of_weft_install_and_mean_what_was_given() {
        let given = ["--api-server", "https://[fd00::1]:6443", "--cluster-cidr", "10.1.0.0/16"];
        let text = manifests(&[&given[..], &["--wireguard-port", "7", "--ingress", "on"]].concat()).unwrap();
        let document = text.split("---\n").find(|document| document.contains("kind: DaemonSet")).unwrap();
        let daemonset: DaemonSet = serde_yaml_ng::from_str(document).unwrap();
        let mut containers = daemonset.spec.unwrap().template.spec.unwrap().containers;
        let container = containers.remove(0);
        assert_eq!(container.image.unwrap(), concat!("weft:", env!("CARGO_PKG_VERSION")));
        let args = container.args.as_deref().unwrap_or_default();
        // YAML 1.1, which kubectl reads, takes these words for truth values.
        assert!(!args.iter().any(|arg| ["on", "off", "yes", "no"].contains(&arg.as_str())), "{args:?}");
        let line = [container.command.unwrap(), container.args.unwrap()].concat();
        let Command::Install(install) = Cli::try_parse_from(&line).unwrap().command else {
            panic!("{line:?} is not weft install")
        };
        let mut given = install.given;
        given.agent.node_name = Some("n1".to_owned());
        let config = given.agent.validate().unwrap();
        assert!(config.cluster.ingress.on);
        assert_eq!(config.cluster.wireguard_port, 7);
        assert_eq!(config.cluster.cluster_cidrs, ["10.1.0.0/16".parse().unwrap()]);
    }

    #[test]
    fn the_daemonset_can_be_left_out() {
        let count = |flags: &[&str]| manifests(flags).unwrap().matches("\nkind: DaemonSet\n").count();
        assert_eq!((count(&[]), count(&["--no-daemonset"])), (1, 0));
    }

    #[test]
    fn the_probe_asks_where_the_agent_answers() {
        let probe = |address: &str| {
            let daemonset = daemonset("i", &[], address.parse().unwrap()).unwrap();
            let daemonset: DaemonSet = serde_json::from_value(daemonset).unwrap();
            let container = daemonset.spec.unwrap().template.spec.unwrap().containers.remove(0);
            let get = container.readiness_probe.unwrap().http_get.unwrap();
            (get.host.unwrap(), get.port)
        };
        assert_eq!(probe("0.0.0.0:80"), ("127.0.0.1".to_owned(), IntOrString::Int(80)));
        assert_eq!(probe("[::]:81"), ("::1".to_owned(), IntOrString::Int(81)));
        assert_eq!(probe("192.0.2.1:9470"), ("192.0.2.1".to_owned(), IntOrString::Int(9470)));
    }

    #[test]
    fn the_dns_service_has_the_given_addresses_in_their_order() {
        let spec = |addresses: &[&str]| {
            let addresses: Vec<IpAddr> = addresses.iter().map(|text| text.parse().unwrap()).collect();
            let service: Service = serde_json::from_value(kube_dns(&addresses).unwrap()).unwrap();
            let spec = service.spec.unwrap();
            (
                spec.cluster_ip.unwrap(),
                spec.cluster_ips.unwrap(),
                spec.ip_families.unwrap(),
                spec.ip_family_policy,
            )
        };
        let (first, all, families, policy) = spec(&["fd00::a", "10.0.0.10"]);
        assert_eq!((first.as_str(), policy.as_deref()), ("fd00::a", Some("RequireDualStack")));
        assert_eq!(
            (all, families),
            (vec!["fd00::a".into(), "10.0.0.10".into()], vec!["IPv6".into(), "IPv4".into()])
        );
        let (_, all, families, policy) = spec(&["10.0.0.10"]);
        assert_eq!((all.len(), families.len(), policy.as_deref()), (1, 1, Some("SingleStack")));
    }

    #[test]
    fn what_the_agent_would_refuse_is_refused() {
        let refused = |flags: &[&str]| manifests(flags).err().unwrap();
        assert!(refused(&["--cluster-dns", "10.99.0.10"]).contains("--cluster-dns 10.99.0.10"));
        assert!(refused(&["--api-server", "nowhere"]).contains("--api-server"));
        assert!(refused(&["--node-name", "n1"]).contains("--node-name"));
        assert!(refused(&["--image", "a b"]).contains("--image"));
        assert!(refused(&["--cni-bin-dir", "/a b"]).contains("/a b"));
    }
}
