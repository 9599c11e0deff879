//! Flags of `weft agent` to one validated configuration.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use axum::http::Uri;
use clap::Args;
use ipnet::IpNet;
use weft_model::constants::{POD_GATEWAY_V4, POD_GATEWAY_V6};
use weft_model::{ClusterConfig, Front, IngressConfig, NamespacedName, NodeName, Observe, ProxyConfig};
use weft_netstack::kube::Endpoint;

use crate::log::LogArgs;

#[derive(Args)]
pub(crate) struct AgentArgs {
    /// Name of this node's Node object; the host name by default
    #[arg(long)]
    pub(crate) node_name: Option<String>,
    /// How to reach the API server
    #[arg(long, conflicts_with = "api_server")]
    pub(crate) kubeconfig: Option<PathBuf>,
    /// Address of the API server, such as <https://192.0.2.1:6443>, instead of a kubeconfig
    #[arg(long)]
    pub(crate) api_server: Option<String>,
    /// Bearer token for --api-server; read anew when it rotates
    #[arg(long)]
    pub(crate) token_file: Option<PathBuf>,
    /// CA certificate for --api-server
    #[arg(long)]
    pub(crate) ca_file: Option<PathBuf>,
    /// Pod ranges of the cluster, one a family
    #[arg(long, value_delimiter = ',', default_value = "10.42.0.0/16,fd00:10:42::/56")]
    cluster_cidr: Vec<IpNet>,
    /// Service ranges of the cluster, one a family
    #[arg(long, value_delimiter = ',', default_value = "10.43.0.0/16,fd00:10:43::/112")]
    service_cidr: Vec<IpNet>,
    /// Addresses of the cluster's DNS, one a family; each within a --service-cidr
    #[arg(long, value_delimiter = ',', default_value = "10.43.0.10,fd00:10:43::a")]
    cluster_dns: Vec<IpAddr>,
    /// Further addresses at which the node's resolver answers its pods, outside all ranges, such as the one that a NodeLocal
    /// DNSCache had and kubelets still name
    #[arg(long, value_delimiter = ',')]
    node_local_dns: Vec<IpAddr>,
    /// Domain of the cluster's names
    #[arg(long, default_value = "cluster.local")]
    cluster_domain: String,
    /// Ranges in which spec.externalIPs of Services are honoured; none by default
    #[arg(long, value_delimiter = ',')]
    external_ip_range: Vec<IpNet>,
    /// Node ports answer on the node's addresses in these ranges; by default on its first InternalIP of each family
    #[arg(long, value_delimiter = ',')]
    nodeport_addresses: Vec<IpNet>,
    /// UDP port of the overlay, the same on every node
    #[arg(long, default_value_t = weft_model::constants::WIREGUARD_PORT)]
    wireguard_port: u16,
    /// Replace the node's WireGuard key when it is this many days old; 0: only on `weft key rotate`
    #[arg(long, default_value_t = 0)]
    key_rotation_days: u32,
    /// Let pods pass the firewalls of other programs (Docker, ufw, firewalld) that drop what they forward
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    open_firewalls: bool,
    /// Resolvers for names outside the cluster
    #[arg(long, default_value = "/etc/resolv.conf")]
    resolv_conf: PathBuf,
    /// DNS questions that one client may ask in a second; 0: as many as it likes
    #[arg(long, default_value_t = weft_dns::QUERIES_PER_SECOND)]
    dns_rate_limit: u32,
    /// Where container runtimes look for network configurations
    #[arg(long, default_value = "/etc/cni/net.d")]
    pub(crate) cni_conf_dir: PathBuf,
    /// Where container runtimes look for plugins; the plugin `weft` is put there
    #[arg(long, default_value = "/opt/cni/bin")]
    pub(crate) cni_bin_dir: PathBuf,
    /// Socket, lock and leases; must not survive a reboot
    #[arg(long, default_value = "/run/weft")]
    run_dir: PathBuf,
    /// Private key and last good snapshot; must survive a reboot
    #[arg(long, default_value = "/var/lib/weft")]
    pub(crate) state_dir: PathBuf,
    /// Whether NetworkPolicies are enforced; off takes every rule away
    #[arg(long, value_enum, default_value = "on")]
    network_policy: Switch,
    /// Whether Services of type LoadBalancer get addresses; off leaves them to another controller
    #[arg(long, value_enum, default_value = "on")]
    load_balancer: Switch,
    /// Whether Ingresses are served
    #[arg(long, value_enum, default_value = "off")]
    ingress: Switch,
    /// Names of classes that are served, with or without an IngressClass of that name
    #[arg(long, value_delimiter = ',', default_value = "weft")]
    ingress_class: Vec<String>,
    /// Serve the class of ingress-nginx too
    #[arg(long, default_value_t = false, action = clap::ArgAction::Set)]
    adopt_ingress_nginx: bool,
    /// NAMESPACE/NAME of the Secret whose certificate answers where no other does
    #[arg(long)]
    ingress_default_certificate: Option<String>,
    /// Addresses of proxies and load balancers in front: their X-Forwarded-* and Forwarded are believed
    #[arg(long, value_delimiter = ',')]
    ingress_trusted_ranges: Vec<IpNet>,
    /// Whether connections from these addresses begin with a PROXY protocol header (version 1 or 2)
    #[arg(long, value_enum, default_value = "off")]
    ingress_proxy_protocol: Switch,
    /// Whether the ingress writes an access log, a JSON object a request, to its standard output
    #[arg(long, value_enum, default_value = "off")]
    ingress_access_log: Switch,
    /// Metrics of the ingress under the names of ingress-nginx too
    #[arg(long, default_value_t = false, action = clap::ArgAction::Set)]
    ingress_nginx_metrics: bool,
    /// Whether the addresses of Ingresses are written; off while another controller writes them
    #[arg(long, value_enum, default_value = "on")]
    ingress_status: Switch,
    /// Where /metrics, /healthz and /readyz are served
    #[arg(long, default_value = "127.0.0.1:9470")]
    pub(crate) observe_address: SocketAddr,
    /// Where /healthz and /livez of the service proxy are served to load balancers; [::] means IPv4 too
    #[arg(long, default_value = "[::]:10256")]
    proxy_health_address: SocketAddr,
    /// Where /metrics is served to what looks for CoreDNS's; off: nowhere but on --observe-address
    #[arg(long, default_value = "127.0.0.1:9153")]
    dns_metrics_address: String,
    #[command(flatten)]
    pub(crate) log: LogArgs,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Switch {
    On,
    Off,
}

pub(crate) struct Config {
    pub(crate) node: NodeName,
    pub(crate) api_server: Endpoint,
    pub(crate) cluster: ClusterConfig,
    pub(crate) open_firewalls: bool,
    pub(crate) max_key_age: Option<Duration>,
    pub(crate) resolv_conf: PathBuf,
    pub(crate) dns_rate_limit: u32,
    pub(crate) cni_conf_dir: PathBuf,
    pub(crate) cni_bin_dir: PathBuf,
    pub(crate) run_dir: PathBuf,
    pub(crate) state_dir: PathBuf,
    pub(crate) observe_address: SocketAddr,
    pub(crate) proxy_health_address: SocketAddr,
    pub(crate) dns_metrics_address: Option<SocketAddr>,
    pub(crate) network_policy: bool,
    pub(crate) load_balancer: bool,
    pub(crate) ingress_status: bool,
}

impl AgentArgs {
    /// Every field checked; the error is one sentence with the flag and the remedy.
    pub(crate) fn validate(self) -> anyhow::Result<Config> {
        let cluster = self.cluster()?;
        Ok(Config {
            node: node_name(self.node_name)?,
            api_server: endpoint(self.kubeconfig, self.api_server, self.token_file, self.ca_file)?,
            cluster,
            open_firewalls: self.open_firewalls,
            max_key_age: (self.key_rotation_days > 0)
                .then(|| Duration::from_secs(u64::from(self.key_rotation_days) * 86_400)),
            resolv_conf: self.resolv_conf,
            dns_rate_limit: self.dns_rate_limit,
            cni_conf_dir: self.cni_conf_dir,
            cni_bin_dir: self.cni_bin_dir,
            run_dir: self.run_dir,
            state_dir: self.state_dir,
            observe_address: self.observe_address,
            proxy_health_address: self.proxy_health_address,
            dns_metrics_address: address_or_off("--dns-metrics-address", &self.dns_metrics_address)?,
            network_policy: self.network_policy == Switch::On,
            load_balancer: self.load_balancer == Switch::On,
            ingress_status: self.ingress_status == Switch::On,
        })
    }

    /// What is the same on every node of a cluster, checked.
    pub(crate) fn cluster(&self) -> anyhow::Result<ClusterConfig> {
        one_a_family("--cluster-cidr", self.cluster_cidr.iter().map(IpNet::addr))?;
        one_a_family("--service-cidr", self.service_cidr.iter().map(IpNet::addr))?;
        one_a_family("--cluster-dns", self.cluster_dns.iter().copied())?;
        disjoint(&self.cluster_cidr, &self.service_cidr)?;
        for address in &self.cluster_dns {
            ensure!(
                self.service_cidr.iter().any(|range| range.contains(address)),
                "--cluster-dns {address} is in no --service-cidr; take an address of the service range, such as its tenth"
            );
        }
        for address in &self.node_local_dns {
            let ranges = || self.cluster_cidr.iter().chain(&self.service_cidr);
            ensure!(
                !ranges().any(|range| range.contains(address)),
                "--node-local-dns {address} lies in a range of pods or Services; take an address that nobody has, such as 169.254.20.10"
            );
            let gateways = [IpAddr::V4(POD_GATEWAY_V4), IpAddr::V6(POD_GATEWAY_V6)];
            let unusable = address.is_unspecified() || address.is_multicast() || address.is_loopback();
            ensure!(
                !unusable && !gateways.contains(address),
                "--node-local-dns {address} cannot be an address of a resolver for pods; take another, such as 169.254.20.10"
            );
        }
        Ok(ClusterConfig {
            cluster_cidrs: self.cluster_cidr.iter().map(IpNet::trunc).collect(),
            service_cidrs: self.service_cidr.iter().map(IpNet::trunc).collect(),
            cluster_dns: self.cluster_dns.clone(),
            node_local_dns: self.node_local_dns.clone(),
            cluster_domain: domain(&self.cluster_domain)?,
            wireguard_port: self.wireguard_port,
            proxy: self.proxy()?,
            ingress: self.ingress()?,
        })
    }

    fn ingress(&self) -> anyhow::Result<IngressConfig> {
        let certificate = self.ingress_default_certificate.as_deref().map(|text| {
            let (namespace, name) = text.split_once('/').unwrap_or_default();
            ensure!(
                !namespace.is_empty() && !name.is_empty() && !name.contains('/'),
                "--ingress-default-certificate {text:?} is no NAMESPACE/NAME of a Secret, such as default/wildcard-tls"
            );
            Ok(NamespacedName::new(namespace, name))
        });
        let front = Front {
            trusted: self.ingress_trusted_ranges.iter().map(IpNet::trunc).collect(),
            proxy_protocol: self.ingress_proxy_protocol == Switch::On,
        };
        ensure!(
            !front.proxy_protocol || !front.trusted.is_empty(),
            "--ingress-proxy-protocol on needs --ingress-trusted-ranges with the addresses of your load balancers, such as 192.0.2.0/28"
        );
        Ok(IngressConfig {
            on: self.ingress == Switch::On,
            classes: self.ingress_class.iter().cloned().collect(),
            adopt_nginx: self.adopt_ingress_nginx,
            default_certificate: certificate.transpose()?,
            front,
            observe: Observe {
                access_log: self.ingress_access_log == Switch::On,
                nginx_metrics: self.ingress_nginx_metrics,
            },
        })
    }

    fn proxy(&self) -> anyhow::Result<ProxyConfig> {
        let truncated = |ranges: &[IpNet]| ranges.iter().map(IpNet::trunc).collect::<Vec<_>>();
        let external_ip_ranges = truncated(&self.external_ip_range);
        for external in &external_ip_ranges {
            for (flag, of_cluster) in
                [("--cluster-cidr", &self.cluster_cidr), ("--service-cidr", &self.service_cidr)]
            {
                // A range around those of the cluster is fine: addresses in them are refused one by one.
                if let Some(range) = of_cluster.iter().find(|range| range.contains(external)) {
                    bail!(
                        "--external-ip-range {external} is within {flag} {range}; give a range outside the cluster"
                    );
                }
            }
        }
        Ok(ProxyConfig { external_ip_ranges, node_port_ranges: truncated(&self.nodeport_addresses) })
    }
}

pub(crate) fn one_a_family(flag: &str, addresses: impl Iterator<Item = IpAddr>) -> anyhow::Result<()> {
    let (v4, v6): (Vec<_>, Vec<_>) = addresses.partition(IpAddr::is_ipv4);
    ensure!(
        v4.len() <= 1 && v6.len() <= 1,
        "{flag} takes at most one value of each IP family, separated by a comma"
    );
    Ok(())
}

pub(crate) fn disjoint(cluster_cidrs: &[IpNet], service_cidrs: &[IpNet]) -> anyhow::Result<()> {
    for pods in cluster_cidrs {
        let overlap =
            service_cidrs.iter().find(|s| s.contains(&pods.network()) || pods.contains(&s.network()));
        if let Some(services) = overlap {
            bail!("--cluster-cidr {pods} and --service-cidr {services} overlap; choose disjoint ranges");
        }
    }
    Ok(())
}

fn address_or_off(flag: &str, text: &str) -> anyhow::Result<Option<SocketAddr>> {
    if text == "off" {
        return Ok(None);
    }
    let address = text.parse().with_context(|| {
        format!("{flag} {text:?} is neither an address with a port, such as 127.0.0.1:9153, nor off")
    });
    address.map(Some)
}

fn node_name(given: Option<String>) -> anyhow::Result<NodeName> {
    let name = match given {
        Some(name) => name,
        None => nix::unistd::gethostname()
            .context("the host name cannot be read; give --node-name")?
            .to_string_lossy()
            .to_lowercase(),
    };
    let valid = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
    ensure!(
        !name.is_empty() && name.len() <= 253 && name.chars().all(valid),
        "--node-name {name:?} is no name of a Node: lower-case letters, digits, '-' and '.' only"
    );
    Ok(NodeName(name.into()))
}

fn endpoint(
    kubeconfig: Option<PathBuf>,
    url: Option<String>,
    token_file: Option<PathBuf>,
    ca_file: Option<PathBuf>,
) -> anyhow::Result<Endpoint> {
    match (kubeconfig, url) {
        (None, None) => bail!("the API server is not named; give --kubeconfig or --api-server"),
        (None, Some(url)) => {
            api_server(&url)?;
            Ok(Endpoint::Server { url, token_file, ca_file })
        }
        (Some(_), _) if token_file.is_some() || ca_file.is_some() => {
            bail!("--token-file and --ca-file go with --api-server; a kubeconfig names its own")
        }
        (Some(path), _) => Ok(Endpoint::Kubeconfig(path)),
    }
}

/// `https://ADDRESS:PORT`, also `http://`, with nothing behind it but an optional `/`.
pub(crate) fn api_server(url: &str) -> anyhow::Result<()> {
    let parsed = url.parse::<Uri>().ok();
    let usable = parsed.is_some_and(|uri| {
        matches!(uri.scheme_str(), Some("https" | "http"))
            && uri.host().is_some_and(|host| !host.is_empty())
            && matches!(uri.path(), "" | "/")
            && uri.query().is_none()
    });
    ensure!(usable, "--api-server {url:?} is no address such as https://192.0.2.1:6443");
    Ok(())
}

fn domain(text: &str) -> anyhow::Result<String> {
    let domain = text.trim_end_matches('.').to_lowercase();
    let label = |label: &str| {
        (1..=63).contains(&label.len()) && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    ensure!(
        domain.len() <= 200 && domain.split('.').all(label),
        "--cluster-domain {text:?} is no domain name such as cluster.local"
    );
    Ok(domain)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        agent: AgentArgs,
    }

    fn validate(flags: &[&str]) -> Result<Config, String> {
        let line = ["weft", "--node-name", "a", "--kubeconfig", "/k"].iter().chain(flags);
        Line::try_parse_from(line)
            .map_err(|error| error.to_string())?
            .agent
            .validate()
            .map_err(|e| e.to_string())
    }

    #[test]
    fn the_defaults_are_valid() {
        assert!(validate(&[]).is_ok());
    }

    #[test]
    fn nobody_is_trusted_in_front_unless_a_range_says_so() {
        let of = |flags: &[&str]| validate(flags).map(|config| config.cluster.ingress.front);
        assert_eq!(of(&[]), Ok(Front::default()));
        let trusted = vec!["192.0.2.0/28".parse().unwrap(), "fd00::/64".parse().unwrap()];
        let flags = ["--ingress-trusted-ranges", "192.0.2.1/28,fd00::/64", "--ingress-proxy-protocol", "on"];
        assert_eq!(of(&flags), Ok(Front { trusted, proxy_protocol: true }));
        let refused = of(&["--ingress-proxy-protocol", "on"]).unwrap_err();
        assert!(
            refused.starts_with("--ingress-proxy-protocol on needs --ingress-trusted-ranges"),
            "{refused}"
        );
    }

    #[test]
    fn metrics_of_dns_have_an_address_of_their_own_or_none() {
        let of = |flags: &[&str]| validate(flags).unwrap().dns_metrics_address;
        assert_eq!(of(&[]), Some("127.0.0.1:9153".parse().unwrap()));
        assert_eq!(of(&["--dns-metrics-address", "[::]:9153"]), Some("[::]:9153".parse().unwrap()));
        assert_eq!(of(&["--dns-metrics-address", "off"]), None);
        let message = validate(&["--dns-metrics-address", "9153"]).err().unwrap_or_default();
        assert!(message.contains("--dns-metrics-address \"9153\" is neither an address"), "{message}");
    }

    #[test]
    fn an_api_server_is_an_address_and_nothing_more() {
        for good in
            ["https://192.0.2.1:6443", "https://[fd00::1]:6443/", "http://127.0.0.1:8080", "https://api"]
        {
            assert!(api_server(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "192.0.2.1:6443",
            "ftp://192.0.2.1",
            "https://",
            "https://a b",
            "https://a/api",
            "https://a?b",
        ] {
            assert!(api_server(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_token_beside_a_kubeconfig_is_refused() {
        let message = validate(&["--token-file", "/t"]).err().unwrap_or_default();
        assert!(message.contains("go with --api-server"), "{message}");
    }

    #[test]
    fn a_wrong_value_is_named_with_its_flag() {
        let wrong = [
            (["--cluster-cidr", "10.0.0.0/8,10.43.0.0/16"], "--cluster-cidr takes at most one"),
            (["--cluster-cidr", "10.43.0.0/20"], "overlap"),
            (["--cluster-dns", "10.99.0.10"], "--cluster-dns 10.99.0.10 is in no --service-cidr"),
            (
                ["--node-local-dns", "169.254.20.10,10.43.0.11"],
                "10.43.0.11 lies in a range of pods or Services",
            ),
            (["--node-local-dns", "169.254.1.1"], "169.254.1.1 cannot be an address of a resolver for pods"),
            (["--cluster-domain", "a..b"], "--cluster-domain"),
            (["--external-ip-range", "10.43.7.0/24"], "is within --service-cidr 10.43.0.0/16"),
        ];
        for (flags, expected) in wrong {
            let message = validate(&flags).err().unwrap_or_default();
            assert!(message.contains(expected), "{flags:?}: {message}");
        }
    }
}
