//! Parts of the proxy: what a request must be, who may pass, which endpoint answers, how it is reached.
//!
//! ```text
//!  RouteTable --compiled--> match table + certificates (tls)
//!  request --hygiene--> admitted --compiled.find--> route --limits, access--> balance --> pool --> answer (body)
//! ```

pub mod access;
pub mod balance;
pub mod body;
pub mod compiled;
pub mod htpasswd;
pub mod hygiene;
pub mod limits;
pub mod pool;
pub mod tls;
