//! From the ConfigMap's text to blocks and Problems. Pure.
//!
//! What is wrong in itself (a block without an end, an address that is none) makes its whole key unreadable, so that what
//! was in force before stays; what is right but not there (another plugin) is left out alone. Either is named by its line.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::RecordType;
use ipnet::IpNet;
use regex::RegexBuilder;
use weft_model::objects::ConfigMap;
use weft_model::{ObjectRef, Problem, Reason};

use super::syntax::{Fault, Line, parse};
use super::template::Text;
use super::{
    Block, Blocks, Hosts, Matcher, Part, Parts, Pattern, PodMode, Rebinding, Rewrite, Server, Target,
    Template, Tls, ZoneFile,
};
use crate::DNS_PORT;
use crate::forward::has_authority;
use crate::name::Name;
use crate::zone::reverse_zones;

/// Memory that one regular expression may take.
const REGEX_BYTES: usize = 1 << 20;
/// TTL of hosts(5) entries, in seconds (CoreDNS's own).
const HOSTS_TTL_SECONDS: u32 = 3600;
/// The port of DNS over TLS (RFC 7858 section 3.1).
const DNS_OVER_TLS_PORT: u16 = 853;
/// Most servers of one `forward` (CoreDNS's own).
const MAX_SERVERS: usize = 15;

/// What the DNS room does anyway, whatever is said about it.
const BUILT_IN: [&str; 9] =
    ["errors", "health", "ready", "reload", "loop", "loadbalance", "prometheus", "bufsize", "minimal"];
/// Options of `forward` that say how, not where, and that are chosen well without them.
const FORWARD_OPTIONS: [&str; 9] = [
    "policy",
    "health_check",
    "max_fails",
    "expire",
    "max_concurrent",
    "prefer_udp",
    "next",
    "failfast_all_unhealthy_upstreams",
    "max_connect_attempts",
];

/// Every key that holds blocks: `*.override` adds to the default block, `*.server` and `Corefile` hold blocks of their own.
pub(crate) fn plan(config_map: &ConfigMap) -> (Parts, Vec<Problem>) {
    let mut parts = Parts::new();
    let mut problems = Vec::new();
    let object = ObjectRef::new("ConfigMap", &config_map.key.namespace, &config_map.key.name);
    for (key, text) in &config_map.data {
        let is_server = key.ends_with(".server") || key == "Corefile";
        if !is_server && !key.ends_with(".override") {
            continue;
        }
        let mut reader = Reader { data: &config_map.data, missing: Vec::new(), excepted: Vec::new() };
        let read = parse(text).and_then(|lines| {
            if is_server { reader.server_blocks(&lines) } else { reader.overrides(&lines) }
        });
        let said = |line: usize, what: &str| format!("data[{key}] line {line}: {what}");
        for (line, what) in &reader.missing {
            problems.push(Problem::new(object.clone(), Reason::NotSupported, said(*line, what)));
        }
        let part = match read {
            Ok(blocks) => Part::Read(Arc::new(blocks)),
            Err(fault) => {
                let message = format!(
                    "{}; until it is corrected, what {key} said before stays",
                    said(fault.line, &fault.what)
                );
                problems.push(Problem::new(object.clone(), Reason::InvalidField, message));
                Part::Unreadable
            }
        };
        parts.insert(key.clone(), part);
    }
    (parts, problems)
}

struct Reader<'a> {
    /// The whole ConfigMap, for zone files.
    data: &'a BTreeMap<String, String>,
    /// Lines that are left out.
    missing: Vec<(usize, String)>,
    /// Names that a `forward` of the block being read leaves out.
    excepted: Vec<Name>,
}

impl Reader<'_> {
    fn left_out(&mut self, line: &Line, what: impl Into<String>) {
        self.missing.push((line.number, what.into()));
    }

    fn overrides(&mut self, lines: &[Line]) -> Result<Blocks, Fault> {
        Ok(Blocks::from([(Name::root(), self.block(&Name::root(), lines)?)]))
    }

    fn server_blocks(&mut self, lines: &[Line]) -> Result<Blocks, Fault> {
        let mut blocks = Blocks::new();
        for line in lines {
            if line.words[0] == "import" {
                self.left_out(line, "import leads to files that are not there; write its lines here");
                continue;
            }
            if line.words[0].starts_with('(') {
                self.left_out(line, "snippets are not there; write their lines where they are imported");
                continue;
            }
            let Some(block) = &line.block else {
                return Err(Fault::new(
                    line.number,
                    format!("{:?} is no server block; write '{{' behind its zones", line.words.join(" ")),
                ));
            };
            let keys = line.words.iter().flat_map(|word| word.split(',')).filter(|key| !key.is_empty());
            for key in keys {
                for zone in self.zones_of_key(line, key)? {
                    let read = self.block(&zone, block)?;
                    blocks.entry(zone).or_default().add(&read);
                }
            }
        }
        Ok(blocks)
    }

    /// `example.com`, `dns://example.com:53`, `10.0.0.0/24`.
    fn zones_of_key(&mut self, line: &Line, key: &str) -> Result<Vec<Name>, Fault> {
        let (scheme, rest) = key.split_once("://").unwrap_or(("dns", key));
        let (zone, port) = match rest.rsplit_once(':') {
            Some((zone, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) && !zone.contains(':') => {
                (zone, port)
            }
            _ => (rest, "53"),
        };
        if scheme != "dns" || port != DNS_PORT.to_string() {
            self.left_out(line, format!("{key}: only DNS on port 53 is served; this block is left out"));
            return Ok(Vec::new());
        }
        zones(zone).map_err(|what| Fault::new(line.number, what))
    }

    fn block(&mut self, zone: &Name, lines: &[Line]) -> Result<Block, Fault> {
        let mut block = Block::default();
        for line in lines {
            self.plugin(zone, line, &mut block)?;
        }
        // A forward that names them says where they go.
        for name in self.excepted.drain(..) {
            block.forwards.entry(name).or_insert(Target::Servers(Vec::new()));
        }
        Ok(block)
    }

    fn plugin(&mut self, zone: &Name, line: &Line, block: &mut Block) -> Result<(), Fault> {
        match line.words[0].as_str() {
            "hosts" => block.hosts.push(self.hosts(zone, line)?),
            "rewrite" => block.rewrites.extend(self.rewrite(line)?),
            "template" => block.templates.extend(self.template(zone, line)?),
            "forward" => {
                if let Some((from, target)) = self.forward(line)? {
                    block.forwards.entry(from).or_insert(target);
                }
            }
            "file" => block.files.extend(self.file(zone, line)?),
            "cache" => block.cache_seconds = self.cache(zone, line)?,
            "kubernetes" => {
                block.kubernetes = true;
                block.pods = self.kubernetes(line)?;
            }
            "stop-dns-rebind" => block.rebinding = Some(self.rebinding(line)?),
            "log" => block.log = true,
            "autopath" if *zone == Name::root() => block.autopath = true,
            "autopath" => self.left_out(line, "autopath is of the default block; put it into an .override"),
            built_in if BUILT_IN.contains(&built_in) => {}
            "import" => self.left_out(line, "import leads to files that are not there; write its lines here"),
            other => self.left_out(line, format!("plugin {other} is not there; this line is left out")),
        }
        Ok(())
    }

    /// `hosts [FILE] [ZONES...] { ADDRESS NAMES... }`.
    fn hosts(&mut self, zone: &Name, line: &Line) -> Result<Hosts, Fault> {
        let mut hosts = Hosts { ttl_seconds: HOSTS_TTL_SECONDS, ..Hosts::default() };
        let mut reverse = true;
        let mut arguments = &line.words[1..];
        if let [file, rest @ ..] = arguments
            && file.starts_with('/')
        {
            arguments = rest;
            if !file.ends_with("/NodeHosts") {
                self.left_out(
                    line,
                    format!("hosts {file}: there is no such file; write its lines into the block"),
                );
            }
        }
        hosts.zones = zones_or(arguments, zone).map_err(|what| Fault::new(line.number, what))?;
        for line in line.block.iter().flatten() {
            match line.words.as_slice() {
                [word] if word == "no_reverse" => reverse = false,
                [word, ..] if word == "fallthrough" => hosts.falls_through = true,
                [word, ttl] if word == "ttl" => hosts.ttl_seconds = number(line, ttl)?,
                [word, _] if word == "reload" => {}
                [address, names @ ..] => {
                    let address: IpAddr = address.parse().map_err(|_| {
                        Fault::new(
                            line.number,
                            format!("{address:?} is no IP address, and no option of hosts; correct it"),
                        )
                    })?;
                    for name in names {
                        hosts.insert(&named(line, name)?, address);
                    }
                }
                [] => {}
            }
        }
        if !reverse {
            hosts.names.clear();
        }
        if *zone == Name::root() && !hosts.falls_through {
            hosts.falls_through = true;
            self.left_out(
                line,
                "hosts without fallthrough would let every other name fail; it is taken as if it had it",
            );
        }
        Ok(hosts)
    }

    /// `rewrite [continue|stop] name [exact|prefix|suffix|substring|regex] FROM TO [answer ...]`, in a line or a block. The
    /// answer is always given under the name that was asked for.
    fn rewrite(&mut self, line: &Line) -> Result<Option<Rewrite>, Fault> {
        let mut words: Vec<&str> = line.words[1..].iter().map(String::as_str).collect();
        let goes_on = words.first() == Some(&"continue");
        if goes_on || words.first() == Some(&"stop") {
            words.remove(0);
        }
        for inner in line.block.iter().flatten() {
            match inner.words[0].as_str() {
                "name" if words.is_empty() => words = inner.words.iter().map(String::as_str).collect(),
                "answer" => {}
                _ => self.left_out(inner, "only one name rule in a rewrite block; this line is left out"),
            }
        }
        let (kind, from, to) = match words.as_slice() {
            ["name", kind @ ("exact" | "prefix" | "suffix" | "substring" | "regex"), from, to, rest @ ..]
                if rest.is_empty() || rest[0] == "answer" =>
            {
                (*kind, *from, *to)
            }
            ["name", from, to] => ("exact", *from, *to),
            ["name", from, to, "answer", ..] => ("exact", *from, *to),
            ["name", ..] => {
                return Err(Fault::new(
                    line.number,
                    "rewrite name needs a name and another one instead: rewrite name FROM TO",
                ));
            }
            _ => {
                let field = words.first().copied().unwrap_or_default();
                self.left_out(
                    line,
                    format!("rewrite {field}: only names are rewritten; this line is left out"),
                );
                return Ok(None);
            }
        };
        let whole = |text: &str| format!("{}.", text.to_ascii_lowercase().trim_end_matches('.'));
        let (from, to) = match kind {
            "exact" => (Matcher::Exact(whole(from)), whole(to)),
            "prefix" => (Matcher::Prefix(from.to_ascii_lowercase()), to.to_ascii_lowercase()),
            "suffix" => (Matcher::Suffix(whole(from)), whole(to)),
            "substring" => (Matcher::Substring(from.to_ascii_lowercase()), to.to_ascii_lowercase()),
            _ => (Matcher::Regex(pattern(line, from)?), to.to_ascii_lowercase()),
        };
        Ok(Some(Rewrite { from, to, goes_on }))
    }

    /// `template CLASS TYPE [ZONES...] { match, answer, authority, rcode, fallthrough }`.
    fn template(&mut self, zone: &Name, line: &Line) -> Result<Option<Template>, Fault> {
        let [_, class, record_type, arguments @ ..] = line.words.as_slice() else {
            return Err(Fault::new(line.number, "template needs a class and a type: template IN A"));
        };
        if !matches!(class.as_str(), "IN" | "ANY") {
            self.left_out(line, format!("template {class}: only class IN is answered; it is left out"));
            return Ok(None);
        }
        let mut template = Template {
            record_type: match record_type.as_str() {
                "ANY" => None,
                text => Some(text.parse::<RecordType>().map_err(|_| {
                    Fault::new(line.number, format!("template: {text:?} is no type of record"))
                })?),
            },
            zones: zones_or(arguments, zone).map_err(|what| Fault::new(line.number, what))?,
            matches: Vec::new(),
            answers: Vec::new(),
            authorities: Vec::new(),
            code: ResponseCode::NoError,
            falls_through: false,
        };
        for line in line.block.iter().flatten() {
            match line.words.as_slice() {
                [word, patterns @ ..] if word == "match" => {
                    for text in patterns {
                        template.matches.push(pattern(line, text)?);
                    }
                }
                [word, text] if word == "answer" || word == "authority" => match Text::parse(text) {
                    Ok(text) if word == "answer" => template.answers.push(text),
                    Ok(text) => template.authorities.push(text),
                    Err(field) => {
                        self.left_out(
                            line,
                            format!("template: {field} is not understood; the whole template is left out"),
                        );
                        return Ok(None);
                    }
                },
                [word, code] if word == "rcode" => template.code = rcode(line, code)?,
                [word, ..] if word == "fallthrough" => template.falls_through = true,
                [word, ..] => {
                    self.left_out(line, format!("template: {word} is not there; this line is left out"))
                }
                [] => {}
            }
        }
        Ok(Some(template))
    }

    /// `forward FROM TO... { except NAMES..., tls [KEY], tls_servername NAME }`; servers as `tls://ADDRESS` are asked over TLS.
    fn forward(&mut self, line: &Line) -> Result<Option<(Name, Target)>, Fault> {
        let [_, from, to @ ..] = line.words.as_slice() else {
            return Err(Fault::new(line.number, "forward needs a zone and servers: forward . 192.0.2.53"));
        };
        let from = named(line, from)?;
        if to.is_empty() || to.len() > MAX_SERVERS {
            return Err(Fault::new(
                line.number,
                format!("forward needs one to {MAX_SERVERS} servers: forward . 192.0.2.53"),
            ));
        }
        let mut tls = Tls::default();
        for option in line.block.iter().flatten() {
            match option.words.as_slice() {
                [word, names @ ..] if word == "except" => {
                    for name in names {
                        self.excepted.push(named(option, name)?);
                    }
                }
                [word] if word == "tls" => {}
                [word, key] if word == "tls" => tls.authorities = Some(self.authorities(option, key)?),
                [word, name] if word == "tls_servername" => tls.name = Some(host_name(option, name)?),
                [word, ..] if word == "tls_servername" => {
                    let what = "tls_servername takes one name: tls_servername dns.example.net";
                    return Err(Fault::new(option.number, what));
                }
                [word, ..] if FORWARD_OPTIONS.contains(&word.as_str()) => {}
                [word, ..] => {
                    self.left_out(option, format!("forward: {word} is not there; this line is left out"))
                }
                [] => {}
            }
        }
        let tls = Arc::new(tls);
        let mut servers = Vec::new();
        let mut of_host = false;
        for word in to {
            let address = word.strip_prefix("dns://").unwrap_or(word);
            if address.starts_with('/') {
                of_host = true;
            } else if let Some(address) = word.strip_prefix("tls://") {
                let address = server(line, address, DNS_OVER_TLS_PORT)?;
                servers.push(Server { address, tls: Some(tls.clone()) });
            } else if address.contains("://") {
                self.left_out(
                    line,
                    format!(
                        "forward to {word}: only plain DNS and tls:// are spoken; this server is left out"
                    ),
                );
            } else {
                servers.push(Server::plain(server(line, address, DNS_PORT)?));
            }
        }
        if of_host && !servers.is_empty() {
            self.left_out(line, "forward to a file beside other servers: the file is left out");
        }
        Ok(match (of_host, servers.is_empty()) {
            (true, true) => Some((from, Target::Host)),
            (_, false) => Some((from, Target::Servers(servers))),
            (false, true) => Some((from, Target::Servers(Vec::new()))),
        })
    }

    /// The certificates of another key of the ConfigMap, the name's last part.
    fn authorities(&self, line: &Line, name: &str) -> Result<Arc<str>, Fault> {
        let key = name.rsplit('/').next().unwrap_or(name);
        match self.data.get(key) {
            Some(pem) if has_authority(pem) => Ok(Arc::from(pem.as_str())),
            Some(_) => Err(Fault::new(
                line.number,
                format!("tls {name}: key {key} holds no certificate in PEM; put it there"),
            )),
            None => Err(Fault::new(
                line.number,
                format!("tls {name}: the ConfigMap has no key {key}; put the authority's certificate there"),
            )),
        }
    }

    /// `file NAME [ZONES...]`, the name's last part being another key of the ConfigMap.
    fn file(&mut self, zone: &Name, line: &Line) -> Result<Vec<ZoneFile>, Fault> {
        let [_, name, arguments @ ..] = line.words.as_slice() else {
            return Err(Fault::new(
                line.number,
                "file needs the name of a zone file: file example.org.db example.org",
            ));
        };
        let key = name.rsplit('/').next().unwrap_or(name);
        let Some(text) = self.data.get(key) else {
            return Err(Fault::new(
                line.number,
                format!("file {name}: the ConfigMap has no key {key}; put the zone there"),
            ));
        };
        let zones = zones_or(arguments, zone).map_err(|what| Fault::new(line.number, what))?;
        let read = |zone: &Name| ZoneFile::parse(text, zone);
        let files: Result<Vec<ZoneFile>, String> = zones.iter().map(read).collect();
        files.map_err(|what| Fault::new(line.number, format!("file {key}: {what}")))
    }

    /// `cache [TTL] [ZONES...] { success CAPACITY [TTL], denial CAPACITY [TTL] }`. There is one cache: the default block's
    /// times hold.
    fn cache(&mut self, zone: &Name, line: &Line) -> Result<(Option<u32>, Option<u32>), Fault> {
        let ttl = line.words.get(1).filter(|word| word.bytes().all(|byte| byte.is_ascii_digit()));
        let ttl = ttl.map(|ttl| number(line, ttl)).transpose()?;
        let (mut positive, mut negative) = (ttl, ttl);
        for option in line.block.iter().flatten() {
            match option.words.as_slice() {
                [word, _, ttl, ..] if word == "success" => positive = Some(number(option, ttl)?),
                [word, _, ttl, ..] if word == "denial" => negative = Some(number(option, ttl)?),
                [word, ..]
                    if matches!(
                        word.as_str(),
                        "success" | "denial" | "prefetch" | "serve_stale" | "keepttl"
                    ) => {}
                [word, ..] => {
                    self.left_out(option, format!("cache: {word} is not there; this line is left out"))
                }
                [] => {}
            }
        }
        if *zone != Name::root() && (positive, negative) != (None, None) {
            self.left_out(line, "cache: times are those of the default block; give them in an .override");
        }
        Ok((positive, negative))
    }

    /// `stop-dns-rebind { rebind-domain-ok NAMES..., rebind-localhost-ok }`.
    fn rebinding(&mut self, line: &Line) -> Result<Rebinding, Fault> {
        let mut rebinding = Rebinding::default();
        for option in line.block.iter().flatten() {
            match option.words.as_slice() {
                [word, names @ ..] if word == "rebind-domain-ok" => {
                    for name in names {
                        rebinding.except.push(named(option, name)?);
                    }
                }
                [word] if word == "rebind-localhost-ok" => rebinding.localhost_ok = true,
                [word, ..] => {
                    let what = format!("stop-dns-rebind: {word} is not there; this line is left out");
                    self.left_out(option, what);
                }
                [] => {}
            }
        }
        Ok(rebinding)
    }

    /// Which names of pods exist, where it is said.
    fn kubernetes(&mut self, line: &Line) -> Result<Option<PodMode>, Fault> {
        let mut pods = None;
        for option in line.block.iter().flatten() {
            match option.words.as_slice() {
                [word, ..] if word == "fallthrough" => {}
                [word, mode] if word == "pods" => pods = Some(pod_mode(option, mode)?),
                [word, ..] => {
                    self.left_out(option, format!("kubernetes: {word} is not there; this line is left out"))
                }
                [] => {}
            }
        }
        Ok(pods)
    }
}

fn pod_mode(line: &Line, text: &str) -> Result<PodMode, Fault> {
    match text {
        "disabled" => Ok(PodMode::Disabled),
        "insecure" => Ok(PodMode::Insecure),
        "verified" => Ok(PodMode::Verified),
        _ => Err(Fault::new(line.number, format!("pods {text:?} is none of disabled, insecure, verified"))),
    }
}

/// A zone, or the reverse zones of a range.
fn zones(text: &str) -> Result<Vec<Name>, String> {
    if let Ok(range) = text.parse::<IpNet>() {
        return Ok(reverse_zones(range));
    }
    Name::parse(text)
        .map(|name| vec![name])
        .map_err(|error| format!("{text:?} is no zone ({error}); correct it"))
}

fn zones_or(arguments: &[String], zone: &Name) -> Result<Vec<Name>, String> {
    if arguments.is_empty() {
        return Ok(vec![zone.clone()]);
    }
    let each: Result<Vec<Vec<Name>>, String> = arguments.iter().map(|text| zones(text)).collect();
    each.map(|zones| zones.concat())
}

fn named(line: &Line, text: &str) -> Result<Name, Fault> {
    Name::parse(text)
        .map_err(|error| Fault::new(line.number, format!("{text:?} is no name ({error}); correct it")))
}

fn number(line: &Line, text: &str) -> Result<u32, Fault> {
    let text = text.strip_suffix('s').unwrap_or(text);
    let fault = |_| Fault::new(line.number, format!("{text:?} is no number of seconds; correct it"));
    text.parse::<u32>().map_err(fault)
}

/// A name that a certificate can be for.
fn host_name(line: &Line, text: &str) -> Result<String, Fault> {
    let name = text.trim_end_matches('.');
    let known = rustls::pki_types::DnsName::try_from(name).map(|_| name.to_owned());
    known.map_err(|_| {
        Fault::new(
            line.number,
            format!(
                "tls_servername {text:?} is no name of a host; write the name that the certificate is for"
            ),
        )
    })
}

/// An address with or without a port.
fn server(line: &Line, text: &str, port: u16) -> Result<SocketAddr, Fault> {
    let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    let with_port = || bare.parse::<IpAddr>().ok().map(|ip| SocketAddr::new(ip, port));
    let address = text.parse::<SocketAddr>().ok().or_else(with_port);
    address.ok_or_else(|| {
        Fault::new(
            line.number,
            format!(
                "{text:?} is no address of a server; write an IP address, with a port if it is not {port}"
            ),
        )
    })
}

fn pattern(line: &Line, text: &str) -> Result<Pattern, Fault> {
    let built = RegexBuilder::new(text).size_limit(REGEX_BYTES).build();
    built.map(Pattern).map_err(|error| {
        let first = error.to_string().lines().last().unwrap_or_default().trim().to_owned();
        Fault::new(line.number, format!("{text:?} is no regular expression ({first}); correct it"))
    })
}

fn rcode(line: &Line, text: &str) -> Result<ResponseCode, Fault> {
    match text.to_ascii_uppercase().as_str() {
        "NOERROR" => Ok(ResponseCode::NoError),
        "NXDOMAIN" => Ok(ResponseCode::NXDomain),
        "SERVFAIL" => Ok(ResponseCode::ServFail),
        "REFUSED" => Ok(ResponseCode::Refused),
        "NOTIMP" => Ok(ResponseCode::NotImp),
        "FORMERR" => Ok(ResponseCode::FormErr),
        _ => Err(Fault::new(
            line.number,
            format!("rcode {text:?} is none of NOERROR, NXDOMAIN, SERVFAIL, REFUSED, NOTIMP, FORMERR"),
        )),
    }
}

#[cfg(test)]
mod tests;
