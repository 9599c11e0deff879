//! What routes need of Secrets and ConfigMaps: users, authorities, headers, certificates. Each that cannot be had is told at its
//! Ingress.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use jiff::Timestamp;
use weft_model::ingress::{Answer, Bytes, Data, Ingress, IngressConfig, Reference};
use weft_model::{NamespacedName, ObjectRef, Problem, Reason, Snapshot};

use super::table::{Certificate, RouteMaterials};
use super::{Claimed, object};
use crate::annotations::{BasicAuth, Settings, VerifyClient};
use crate::certificate::{Validity, validity};

pub(super) struct Materials<'a> {
    snapshot: &'a Snapshot,
    waiting: BTreeSet<Reference>,
    now: Timestamp,
    known: &'a mut Certificates,
}

/// Certificates of Secrets that were looked at before: to see whether chain and key go together takes a signature.
#[derive(Default)]
pub(super) struct Certificates(BTreeMap<Reference, Read>);

/// What a Secret gave, and when that holds.
#[derive(Clone)]
struct Read {
    answer: Arc<Answer>,
    certificate: Result<Arc<Certificate>, Lack>,
    validity: Option<Validity>,
}

/// Why there is nothing.
#[derive(Clone)]
enum Lack {
    /// It was not asked for yet.
    Waiting,
    /// What is wrong and what to do.
    Told(Reason, String),
}

impl<'a> Materials<'a> {
    pub(super) fn new(snapshot: &'a Snapshot, now: Timestamp, known: &'a mut Certificates) -> Self {
        known.0.retain(|reference, _| snapshot.referred.contains_key(reference));
        Self { snapshot, waiting: BTreeSet::new(), now, known }
    }

    pub(super) fn waiting(self) -> BTreeSet<Reference> {
        self.waiting
    }

    fn answer(&mut self, reference: &Reference) -> Result<&'a Arc<Answer>, Lack> {
        let answer = self.snapshot.referred.get(reference);
        answer.ok_or_else(|| {
            self.waiting.insert(reference.clone());
            Lack::Waiting
        })
    }

    fn data(&mut self, reference: &Reference) -> Result<&'a Data, Lack> {
        found(reference, self.answer(reference)?)
    }

    fn named(&mut self, ingress: &Ingress, text: &str, secret: bool) -> Result<&'a Data, Lack> {
        let key = own_key(ingress, text)?;
        self.data(&if secret { Reference::Secret(key) } else { Reference::ConfigMap(key) })
    }

    /// Chain and key of a Secret, which go together.
    fn certificate(&mut self, key: NamespacedName) -> Result<(Arc<Certificate>, Option<Validity>), Lack> {
        let reference = Reference::Secret(key.clone());
        let answer = self.answer(&reference)?;
        let known = self.known.0.get(&reference).filter(|known| Arc::ptr_eq(&known.answer, answer));
        let read = match known {
            Some(known) => known.clone(),
            None => {
                let certificate = found(&reference, answer).and_then(|data| certificate(key, data));
                let certificate = certificate.map(Arc::new);
                let validity = certificate.as_ref().ok().and_then(|one| validity(&one.chain_pem.0));
                let read = Read { answer: answer.clone(), certificate, validity };
                self.known.0.insert(reference, read.clone());
                read
            }
        };
        Ok((read.certificate?, read.validity))
    }

    /// What the routes of one Ingress need, and why every request is refused, if so.
    pub(super) fn of_routes(
        &mut self,
        ingress: &Ingress,
        settings: &Settings,
        problems: &mut Vec<Problem>,
    ) -> (RouteMaterials, Option<String>) {
        let mut found = RouteMaterials::default();
        let mut closed = None;
        let mut tell = |annotation: &str, lack: Lack, protects: bool| {
            let consequence = if protects { "; every request gets 503 meanwhile" } else { "" };
            if let Lack::Told(reason, message) = lack {
                let message = format!("annotation {annotation}: {message}{consequence}");
                problems.push(Problem::new(object(ingress), reason, message));
            }
            if protects {
                closed = Some(format!("what the annotation {annotation} names cannot be used"));
            }
        };
        if let Some(basic) = &settings.basic {
            match self.named(ingress, &basic.secret, true).and_then(|data| users(data, basic)) {
                Ok(users) => found.users = Some(users),
                Err(lack) => tell("auth-secret", lack, true),
            }
        }
        let verified = settings.client_tls.as_ref().filter(|tls| tls.verify != VerifyClient::Off);
        if let Some(tls) = verified {
            match self.named(ingress, &tls.secret, true).and_then(authorities) {
                Ok(bytes) => found.client_authorities = Some(bytes),
                Err(lack) => tell("auth-tls-secret", lack, tls.verify != VerifyClient::OptionalNoCa),
            }
        }
        if let Some(secret) = &settings.upstream_tls.secret {
            match self.named(ingress, secret, true) {
                Ok(data) => {
                    found.upstream_authorities = data.bytes("ca.crt").map(|bytes| Bytes(bytes.to_vec()));
                    found.upstream_certificate = certificate(ingress.referred(secret), data).ok();
                }
                Err(lack) => tell("proxy-ssl-secret", lack, settings.upstream_tls.verify),
            }
        }
        if let Some(map) = settings.forward_auth.as_ref().and_then(|auth| auth.set_headers.as_ref()) {
            match self.named(ingress, map, false) {
                Ok(data) => found.auth_headers = headers(data),
                Err(lack) => tell("auth-proxy-set-headers", lack, false),
            }
        }
        if let Some(map) = &settings.custom_headers {
            match self.named(ingress, map, false) {
                Ok(data) => found.answer_headers = headers(data),
                Err(lack) => tell("custom-headers", lack, false),
            }
        }
        (found, closed)
    }

    /// The first port of a Service of the Ingress's namespace.
    pub(super) fn first_port(&self, ingress: &Ingress, service: &str) -> Option<u16> {
        let key = NamespacedName::new(&ingress.key.namespace, service);
        self.snapshot.services.get(&key)?.ports.first().map(|port| port.port)
    }

    /// Of every host that an Ingress lists under `spec.tls`; of two for one host the older one's.
    pub(super) fn certificates(
        &mut self,
        claimed: &[Arc<Claimed>],
        config: &IngressConfig,
        problems: &mut Vec<Problem>,
    ) -> BTreeMap<String, Arc<Certificate>> {
        let mut certificates: BTreeMap<String, (Arc<Certificate>, ObjectRef)> = BTreeMap::new();
        for one in claimed {
            for (i, tls) in one.ingress.tls.iter().enumerate() {
                let Some(secret) = &tls.secret else { continue };
                let found = own_key(&one.ingress, secret).and_then(|key| self.certificate(key));
                let (found, validity) = match found {
                    Ok(found) => found,
                    Err(Lack::Waiting) => continue,
                    Err(Lack::Told(reason, message)) => {
                        let meanwhile = if config.default_certificate.is_some() {
                            "the default certificate answers meanwhile"
                        } else {
                            "TLS to its hosts fails meanwhile"
                        };
                        let message = format!("spec.tls[{i}].secretName: {message}; {meanwhile}");
                        problems.push(Problem::new(one.object(), reason, message));
                        continue;
                    }
                };
                if let Some(why) = validity.and_then(|validity| validity.objection(self.now)) {
                    let message = format!("spec.tls[{i}].secretName: Secret {}: {why}", found.secret);
                    problems.push(Problem::new(one.object(), Reason::InvalidField, message));
                }
                let rules = one.ingress.rules.iter().filter_map(|rule| rule.host.clone());
                let hosts: BTreeSet<String> = match tls.hosts.is_empty() {
                    true => rules.collect(),
                    false => tls.hosts.iter().cloned().collect(),
                };
                for host in hosts {
                    match certificates.get(&host) {
                        None => {
                            certificates.insert(host, (found.clone(), one.object()));
                        }
                        Some((held, _)) if *held == found => {}
                        Some((_, holder)) => {
                            let message = format!(
                                "spec.tls[{i}]: {host} has the certificate of the older {holder}; list the host in one of the two"
                            );
                            problems.push(Problem::new(one.object(), Reason::Conflict, message));
                        }
                    }
                }
            }
        }
        certificates.into_iter().map(|(host, (certificate, _))| (host, certificate)).collect()
    }

    pub(super) fn default_certificate(
        &mut self,
        config: &IngressConfig,
        problems: &mut Vec<Problem>,
    ) -> Option<Arc<Certificate>> {
        let key = config.default_certificate.clone()?;
        match self.certificate(key.clone()) {
            Ok((found, validity)) => {
                if let Some(why) = validity.and_then(|validity| validity.objection(self.now)) {
                    let object = ObjectRef::new("Secret", &key.namespace, &key.name);
                    let message = format!("--ingress-default-certificate: {why}");
                    problems.push(Problem::new(object, Reason::InvalidField, message));
                }
                Some(found)
            }
            Err(Lack::Waiting) => None,
            Err(Lack::Told(reason, message)) => {
                let object = ObjectRef::new("Secret", &key.namespace, &key.name);
                let message = format!(
                    "--ingress-default-certificate: {message}; TLS to hosts without a certificate fails meanwhile"
                );
                problems.push(Problem::new(object, reason, message));
                None
            }
        }
    }
}

fn found<'a>(reference: &Reference, answer: &'a Answer) -> Result<&'a Data, Lack> {
    match answer {
        Answer::Found(data) => Ok(data),
        Answer::Absent => Err(Lack::Told(Reason::Missing, format!("there is no {reference}; create it"))),
        Answer::Refused(why) => {
            Err(Lack::Told(Reason::Missing, format!("{reference} may not be read: {why}")))
        }
    }
}

/// Of the Ingress's own namespace: no other is read.
fn own_key(ingress: &Ingress, text: &str) -> Result<NamespacedName, Lack> {
    let key = ingress.referred(text);
    if key.namespace == ingress.key.namespace {
        return Ok(key);
    }
    Err(Lack::Told(
        Reason::NotSupported,
        format!(
            "{text:?} is of another namespace, and only the Ingress's own one ({}) is read; copy it there",
            ingress.key.namespace
        ),
    ))
}

fn lacks(key: &str) -> Lack {
    Lack::Told(Reason::Missing, format!("the Secret has no {key}; put it there"))
}

fn certificate(secret: NamespacedName, data: &Data) -> Result<Certificate, Lack> {
    let bytes = |key: &str| data.bytes(key).map(|bytes| Bytes(bytes.to_vec())).ok_or_else(|| lacks(key));
    let found = Certificate { secret, chain_pem: bytes("tls.crt")?, key_pem: bytes("tls.key")? };
    match crate::certificate::objection(&found.chain_pem.0, &found.key_pem.0) {
        None => Ok(found),
        Some(why) => Err(Lack::Told(Reason::InvalidField, format!("Secret {}: {why}", found.secret))),
    }
}

fn authorities(data: &Data) -> Result<Bytes, Lack> {
    data.bytes("ca.crt").map(|bytes| Bytes(bytes.to_vec())).ok_or_else(|| lacks("ca.crt"))
}

/// Every key a user, or the lines `user:hash` of the key `auth`.
/// Hashes by user, or by user and realm (`user:realm`) where they are htdigest's.
fn users(data: &Data, auth: &BasicAuth) -> Result<BTreeMap<String, String>, Lack> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    let lines: Vec<String> = if auth.map {
        data.0.iter().map(|(user, hash)| format!("{user}:{}", text(&hash.0))).collect()
    } else {
        let kind = if auth.digest { "htdigest" } else { "htpasswd" };
        let file = data.bytes("auth").ok_or_else(|| lacks(&format!("key auth (an {kind} file)")))?;
        let file = text(file);
        let lines = file.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        lines.map(str::to_owned).collect()
    };
    let split = |line: &String| {
        let (user, hash) = if auth.digest { line.rsplit_once(':') } else { line.split_once(':') }?;
        Some((user.to_owned(), hash.to_owned()))
    };
    let users: BTreeMap<String, String> = lines.iter().filter_map(split).collect();
    let of_realm = |user: &String| user.strip_suffix(&auth.realm).is_some_and(|user| user.ends_with(':'));
    if auth.digest && !users.keys().any(of_realm) {
        let realm = &auth.realm;
        return Err(lacks(&format!(
            "user of the realm {realm:?} of auth-realm (htdigest FILE REALM USER makes one)"
        )));
    }
    Ok(users)
}

fn headers(data: &Data) -> BTreeMap<String, String> {
    let text = |bytes: &Bytes| String::from_utf8_lossy(&bytes.0).trim().to_owned();
    data.0.iter().map(|(name, value)| (name.clone(), text(value))).collect()
}
