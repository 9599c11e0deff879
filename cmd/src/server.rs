//! `weft server`: flags to the embedded API server's configuration, then it runs until SIGTERM or SIGINT.
//! In: flags, inherited sockets. Out: a running API server, and a kubeconfig file when asked for.

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use ipnet::IpNet;
use tokio::signal::unix::{SignalKind, signal};
use weft_netstack::kernel::memory::be_frugal;
use weft_standalone::{Config, Identity, Server};

use crate::agent::{disjoint, one_a_family};
use crate::log::LogArgs;

/// Flags of `weft server`. Sockets passed by LISTEN_FDS (descriptor 3 on) are served beside `--listen`.
#[derive(clap::Args, Debug)]
pub(crate) struct ServerArgs {
    /// Address to listen on; repeatable. Default: 127.0.0.1:6443, unless sockets were inherited
    #[arg(long, value_name = "ADDR:PORT")]
    pub(crate) listen: Vec<SocketAddr>,
    /// Address of the `kubernetes` Service's endpoint, one a family; repeatable. Default: the first --listen that is not loopback
    #[arg(long, value_name = "ADDR")]
    pub(crate) advertise_address: Vec<IpAddr>,
    /// Port of that endpoint. Default: the first listener's
    #[arg(long, value_name = "PORT")]
    pub(crate) advertise_port: Option<u16>,
    /// Pod ranges of the cluster, at most one a family
    #[arg(long, value_name = "CIDR", value_delimiter = ',', default_value = "10.42.0.0/16,fd00:10:42::/56")]
    pub(crate) cluster_cidr: Vec<IpNet>,
    /// Prefix length of a node's IPv4 pod range
    #[arg(long, value_name = "BITS", default_value_t = 24, value_parser = clap::value_parser!(u8).range(1..=32))]
    pub(crate) node_cidr_mask_size_ipv4: u8,
    /// Prefix length of a node's IPv6 pod range
    #[arg(long, value_name = "BITS", default_value_t = 64, value_parser = clap::value_parser!(u8).range(1..=128))]
    pub(crate) node_cidr_mask_size_ipv6: u8,
    /// Ranges of Service addresses, at most one a family; the first is the default family
    #[arg(long, value_name = "CIDR", value_delimiter = ',', default_value = "10.43.0.0/16,fd00:10:43::/112")]
    pub(crate) service_cidr: Vec<IpNet>,
    /// Where objects, the CA and the admin token are kept
    #[arg(long, value_name = "DIR", default_value = "/var/lib/weft/server")]
    pub(crate) data_dir: PathBuf,
    /// Further name or address of the server certificate; repeatable
    #[arg(long, value_name = "NAME")]
    pub(crate) tls_san: Vec<String>,
    /// File of `token,user,groups` lines
    #[arg(long, value_name = "FILE")]
    pub(crate) token_file: Option<PathBuf>,
    /// Write an admin kubeconfig here (mode 0600)
    #[arg(long, value_name = "FILE")]
    pub(crate) kubeconfig_out: Option<PathBuf>,
    #[command(flatten)]
    log: LogArgs,
}

/// Runs until SIGTERM or SIGINT, then ends cleanly.
///
/// # Errors
/// One chain that says what could not be done: an address taken, a damaged store, an unreadable file.
pub(crate) async fn run(args: ServerArgs) -> anyhow::Result<()> {
    args.log.start()?;
    be_frugal();
    let kubeconfig_out = args.kubeconfig_out.clone();
    let advertised = args.advertise_address.first().copied();
    let mut terminate = signal(SignalKind::terminate()).context("installing the SIGTERM handler")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("installing the SIGINT handler")?;
    let tokens = validate(&args).map_err(|error| crate::Invalid(format!("{error:#}")))?;
    let mut server = Server::start(config(args, tokens)?)?;
    tracing::info!(addresses = ?server.addresses(), "API server is listening");
    if let Some(path) = kubeconfig_out {
        write_kubeconfig(&server, advertised, &path)?;
    }
    tokio::select! {
        () = server.ended() => anyhow::bail!("a part of the API server ended"),
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("ending");
    server.shutdown().await.context("closing the store")
}

type Tokens = Vec<(String, Identity)>;

/// Every flag checked before anything is touched, the token file read; the error is one sentence with the flag.
fn validate(args: &ServerArgs) -> anyhow::Result<Tokens> {
    one_a_family("--cluster-cidr", args.cluster_cidr.iter().map(IpNet::addr))?;
    one_a_family("--service-cidr", args.service_cidr.iter().map(IpNet::addr))?;
    one_a_family("--advertise-address", args.advertise_address.iter().copied())?;
    disjoint(&args.cluster_cidr, &args.service_cidr)?;
    for range in &args.cluster_cidr {
        let (flag, bits) = match range {
            IpNet::V4(_) => ("--node-cidr-mask-size-ipv4", args.node_cidr_mask_size_ipv4),
            IpNet::V6(_) => ("--node-cidr-mask-size-ipv6", args.node_cidr_mask_size_ipv6),
        };
        ensure!(
            bits >= range.prefix_len(),
            "--cluster-cidr {range} has no room for a node's /{bits}; give a wider range or another {flag}"
        );
    }
    let Some(path) = &args.token_file else { return Ok(Tokens::new()) };
    let text = std::fs::read_to_string(path).with_context(|| format!("--token-file {}", path.display()))?;
    weft_standalone::parse_tokens(&text).with_context(|| format!("--token-file {}", path.display()))
}

fn config(args: ServerArgs, tokens: Tokens) -> anyhow::Result<Config> {
    let mut listeners = weft_standalone::inherited()?;
    let wanted = if args.listen.is_empty() && listeners.is_empty() {
        vec![SocketAddr::from(([127, 0, 0, 1], 6443))]
    } else {
        args.listen
    };
    let bound: Vec<TcpListener> = wanted
        .into_iter()
        .map(weft_standalone::bind)
        .collect::<Result<_, _>>()
        .context("free the address or give another --listen")?;
    listeners.extend(bound);
    let mut config = Config::new(args.data_dir, listeners);
    config.advertise_addresses = args.advertise_address;
    config.advertise_port = args.advertise_port;
    config.cluster_cidrs = args.cluster_cidr;
    config.node_prefix_v4 = args.node_cidr_mask_size_ipv4;
    config.node_prefix_v6 = args.node_cidr_mask_size_ipv6;
    config.service_cidrs = args.service_cidr;
    config.tls_names = args.tls_san;
    config.tokens = tokens;
    Ok(config)
}

/// The kubeconfig names the advertised address where there is one, else the first listener; a wildcard becomes loopback.
fn write_kubeconfig(server: &Server, advertised: Option<IpAddr>, path: &Path) -> anyhow::Result<()> {
    let mut address = *server.addresses().first().context("the server has no address")?;
    if let Some(ip) = advertised {
        address.set_ip(ip);
    } else if address.ip().is_unspecified() {
        let loopback = if address.is_ipv4() {
            IpAddr::from([127, 0, 0, 1])
        } else {
            IpAddr::from(std::net::Ipv6Addr::LOCALHOST)
        };
        address.set_ip(loopback);
    }
    server
        .write_kubeconfig(path, address, server.admin_token())
        .with_context(|| format!("kubeconfig {}", path.display()))
}
