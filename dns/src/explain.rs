//! What a pod's resolver hears for a name, step by step, and where each answer comes from: for people.
//!
//! The answers are those of the serving path itself; only their sources are looked up beside them.

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use hickory_proto::op::{Message, Query, ResponseCode};
use hickory_proto::rr::RecordType;
use hickory_server::net::xfer::Protocol;

use crate::custom::{Rewritten, Server, Verdict};
use crate::log::Page;
use crate::name::{InvalidName, Name};
use crate::serve::Resolver;
use crate::store::NO_OBJECT;

/// `options ndots:5`, as the kubelet writes it for pods that use the cluster's DNS.
const NDOTS: usize = 5;
/// The source port of the questions: answered by nobody, but it has to be one.
const SOURCE_PORT: u16 = 53_000;

/// Explains names to people, and shows them what pods ask.
#[derive(Clone)]
pub struct Explainer(pub(crate) Arc<Resolver>);

impl Explainer {
    /// As a pod of `namespace` with the address `client` would hear it: every name of its search path up to the first that
    /// exists, both families. Text of several lines.
    pub async fn explain(&self, client: IpAddr, namespace: &str, name: &str) -> Result<String, InvalidName> {
        let domain = self.0.store().domain().unwrap_or_else(Name::root);
        let path = search_path(name, namespace, &domain, &self.0.forwarder().search())?;
        let mut text = String::new();
        for name in &path {
            let _ = writeln!(text, "{name}");
            let mut exists = false;
            for record_type in [RecordType::A, RecordType::AAAA] {
                let heard = self.ask(client, name, record_type).await;
                exists |= heard
                    .as_ref()
                    .is_some_and(|answer| answer.metadata.response_code == ResponseCode::NoError);
                let said = heard.as_ref().map_or_else(|| "no answer".to_owned(), said);
                let source = self.source(name, record_type, heard.as_ref());
                let _ = writeln!(text, "    {:<5} {said:<46} {source}", record_type.to_string());
            }
            if exists {
                let left = path.iter().skip_while(|other| *other != name).count() - 1;
                if left > 0 {
                    let _ = writeln!(
                        text,
                        "the resolver stops here, {left} names before the end of its search path"
                    );
                }
                break;
            }
        }
        Ok(text)
    }

    /// What the clients asked since the page whose `last` this is, from the first call on, as long as somebody goes on
    /// calling every few seconds.
    pub fn log(&self, clients: &[IpAddr], after: Option<u64>) -> Page {
        self.0.log().page(clients, after, Instant::now())
    }

    async fn ask(&self, client: IpAddr, name: &Name, record_type: RecordType) -> Option<Message> {
        let mut query = Message::query();
        query.metadata.recursion_desired = true;
        query.add_query(Query::query(name.to_hickory(), record_type));
        let from = SocketAddr::new(client, SOURCE_PORT);
        let answer = self.0.exchange(query.to_vec().ok()?, from, Protocol::Tcp).await?;
        Message::from_vec(&answer).ok()
    }

    fn source(&self, name: &Name, record_type: RecordType, heard: Option<&Message>) -> String {
        let custom = self.0.custom();
        let (name, rewritten) = match custom.rewrite(name) {
            Some(Rewritten(new)) => (new.clone(), format!("rewritten to {new} by coredns-custom; ")),
            None => (name.clone(), String::new()),
        };
        let source = match custom.answer(&name, record_type) {
            Verdict::Hosts { .. } => "hosts of coredns-custom, or a Node".to_owned(),
            Verdict::Records { .. } => "template, file or hosts of coredns-custom".to_owned(),
            Verdict::Passed { cluster } => {
                let of_cluster = if cluster { self.0.store().sources(&name) } else { None };
                let is_alias = heard.and_then(|heard| heard.answers.first()).is_some_and(|first| {
                    first.record_type() == RecordType::CNAME && first.name == name.to_hickory()
                });
                match of_cluster {
                    Some(source) if source == NO_OBJECT && is_alias => {
                        "autopath of coredns-custom".to_owned()
                    }
                    Some(source) => source,
                    None => self.upstreams(&name),
                }
            }
        };
        rewritten + &source
    }

    fn upstreams(&self, name: &Name) -> String {
        let servers = self.0.forwarder().servers_for(&name.to_hickory());
        if servers.is_empty() {
            return "no upstream to ask".to_owned();
        }
        let described = |(server, failure): &(Server, Option<String>)| match failure {
            None => server.to_string(),
            Some(why) => format!("{server} (did not answer: {why})"),
        };
        let servers: Vec<String> = servers.iter().map(described).collect();
        let stops = self.0.forwarder().stops_rebinding(name);
        let stopped = if stops { ", less what leads inside (stop-dns-rebind)" } else { "" };
        format!("upstream {}{stopped}", servers.join(", "))
    }
}

/// An answer in a few words.
pub(crate) fn said(answer: &Message) -> String {
    match answer.metadata.response_code {
        ResponseCode::NoError if answer.answers.is_empty() => "no such record".to_owned(),
        ResponseCode::NoError => {
            let records = answer.answers.iter().map(|record| record.data.to_string());
            let ttl = answer.answers.iter().map(|record| record.ttl).min().unwrap_or_default();
            format!("{} ({ttl} s)", records.collect::<Vec<_>>().join(" "))
        }
        ResponseCode::NXDomain => "no such name".to_owned(),
        other => other.to_string(),
    }
}

/// The names that a resolver asks for in turn (resolv.conf(5), `search` and `ndots`).
fn search_path(
    text: &str,
    namespace: &str,
    domain: &Name,
    search: &[Name],
) -> Result<Vec<Name>, InvalidName> {
    let name = Name::parse(text)?;
    if text.ends_with('.') {
        return Ok(vec![name]);
    }
    let services = domain.child("svc")?;
    let suffixes = [services.child(namespace)?, services, domain.clone()];
    let below = |suffix: &Name| Name::from_labels(name.labels().chain(suffix.labels()));
    let mut path: Vec<Name> = suffixes.iter().chain(search).filter_map(|suffix| below(suffix).ok()).collect();
    let dots = text.matches('.').count();
    path.insert(if dots < NDOTS { path.len() } else { 0 }, name.clone());
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> Vec<String> {
        let name = |text: &str| Name::parse(text).unwrap();
        let path = search_path(text, "shop", &name("cluster.local"), &[name("lan")]).unwrap();
        path.iter().map(Name::to_string).collect()
    }

    #[test]
    fn a_name_with_few_dots_is_searched_for_first_and_one_with_many_last() {
        assert_eq!(
            path("web"),
            [
                "web.shop.svc.cluster.local.",
                "web.svc.cluster.local.",
                "web.cluster.local.",
                "web.lan.",
                "web."
            ]
        );
        assert_eq!(path("a.b.c.d.e.f")[0], "a.b.c.d.e.f.");
        assert_eq!(path("a.b.c.d.e.f").len(), 5);
        assert_eq!(path("www.example.com."), ["www.example.com."]);
    }
}
