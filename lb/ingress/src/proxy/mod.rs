//! The proxy: from a client's connection to a backend's answer.
//!
//! ```text
//!  RouteTable --compiled--> match table, certificates (swapped in one step)
//!  listen (PROXY protocol, TLS by SNI, HTTP/1.1, HTTP/2) --answer--> hygiene -> front (who asks) -> route -> early answers -> limits -> access, authenticate
//!      -> select (canary, affinity) -> forward: balance -> pool -> backend; its answer streams back
//!  listen --a name whose TLS is not for us--> passthrough: balance -> backend, bytes to and fro
//! ```
//!
//! Threads share the table and what is known of endpoints and clients; each has its own listeners and connections to backends.
//! Nothing here knows of Kubernetes: flows go on while the agent is dead.

mod access;
mod answer;
mod arriving;
mod authenticate;
mod balance;
mod body;
mod codec;
mod compiled;
mod digest;
mod exchange;
mod forward;
mod front;
mod handover;
mod htpasswd;
mod hygiene;
mod limits;
mod linger;
pub mod listen;
mod log;
mod mirror;
mod passthrough;
mod pool;
pub mod process;
mod proxy_protocol;
mod select;
mod short;
mod splice;
mod stats;
mod tickets;
mod tls;
mod upload;
mod variables;

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod large_answers;
#[cfg(test)]
mod raw_answers;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::{Arc, OnceLock};

use arc_swap::ArcSwap;

use crate::plan::table::RouteTable;
use compiled::{Compiled, Standing};
use log::AccessLog;
use pool::{Pool, Sources};
use tickets::Tickets;
use tls::{Certificates, ServerConfigs};

pub use handover::Handover;
pub use tls::TlsError;

/// What all threads share.
pub struct Proxy {
    compiled: ArcSwap<Compiled>,
    certificates: Arc<ArcSwap<Certificates>>,
    standing: Standing,
    sources: Arc<Sources>,
    tls: ServerConfigs,
    log: OnceLock<AccessLog>,
}

/// One thread's share.
pub struct Worker {
    proxy: Arc<Proxy>,
    pool: Arc<Pool>,
}

impl Proxy {
    /// With no route: every request gets 404. `tickets` holds the keys of session tickets.
    ///
    /// # Errors
    /// TLS cannot be set up.
    pub fn new(tickets: &Path) -> Result<Arc<Self>, TlsError> {
        let certificates: Arc<ArcSwap<Certificates>> = Arc::default();
        let tickets = Arc::new(Tickets::open(tickets).ok_or(TlsError::Random)?);
        let tls = ServerConfigs::new(&certificates, &tickets)?;
        Ok(Arc::new(Self {
            compiled: ArcSwap::default(),
            certificates,
            standing: Standing::default(),
            sources: Arc::default(),
            tls,
            log: OnceLock::new(),
        }))
    }

    /// Takes another table in one step: requests under way end on the one before.
    pub fn apply(&self, table: &RouteTable) {
        if table.observe.access_log && self.log.get().is_none() {
            self.log_to(std::io::stdout());
        }
        let compiled = Compiled::new(table, &self.compiled.load(), &self.standing);
        let certificates = Certificates::new(table, &self.certificates.load(), compiled::mutual(table));
        self.sources.store(Arc::new(table.addresses.clone()));
        // A host's certificate is there before its routes are.
        self.certificates.store(Arc::new(certificates));
        self.compiled.store(Arc::new(compiled));
        self.standing.tidy();
    }

    /// Where the access log goes; only the first word counts.
    fn log_to(&self, out: impl std::io::Write + Send + 'static) {
        match AccessLog::start(out) {
            Ok(log) => drop(self.log.set(log)),
            Err(error) => tracing::warn!(%error, "there is no access log: its thread cannot start"),
        }
    }

    /// What was counted, as OpenMetrics text without its end.
    pub fn metrics(&self) -> String {
        self.standing.stats.text(self.compiled.load().observe.nginx_metrics)
    }

    pub fn worker(self: &Arc<Self>) -> Arc<Worker> {
        Arc::new(Worker { proxy: self.clone(), pool: Arc::new(Pool::new(self.sources.clone())) })
    }
}

impl Worker {
    /// Closes connections to endpoints that no route leads to any more; for once in a while.
    pub fn tidy(&self) {
        let compiled = self.proxy.compiled.load();
        self.pool.tidy(|address| compiled.addresses.contains(&address));
    }
}
