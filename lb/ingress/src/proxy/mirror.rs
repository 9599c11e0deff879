//! `mirror-target`: a copy of each request to another place, whose answer nobody reads. The client never waits for it: a copy that
//! is slower than the request itself is given up.

use std::collections::BTreeSet;
use std::time::Duration;

use http::header::{self, HeaderMap, HeaderValue};
use http::request::Parts;
use http::{Request, Uri};
use tokio::sync::mpsc;

use super::Worker;
use super::authenticate;
use super::balance::Choice;
use super::body::{Body, Piece};
use super::forward::{Plan, address, forward};
use super::upload::Upload;
use super::variables::{self, target};
use crate::annotations::{Mirror, Retry};

/// Copies that are under way at once, of all routes.
pub(super) const MAX_COPIES: usize = 256;
/// Pieces of a body that a copy may be behind: about a megabyte.
const MAX_BEHIND: usize = 64;
/// nginx's defaults, which `mirror` has no annotation for.
const CONNECT: Duration = Duration::from_secs(5);
const READ: Duration = Duration::from_secs(60);

/// Starts the copy of a request whose fields are those for the backend. Where its body goes too, the pieces are to be put into
/// what is returned.
pub(super) fn start(
    worker: &Worker,
    mirror: &Mirror,
    request: &variables::Request<'_>,
    (headers, has_body): (&HeaderMap, bool),
) -> Option<mpsc::Sender<Piece>> {
    let url: Uri = request.expand(&mirror.target).parse().ok()?;
    let upstream = authenticate::upstream(&url)?;
    let (mut head, ()) = Request::new(()).into_parts();
    head.method = request.method.clone();
    head.headers = headers.clone();
    let copied = has_body && mirror.body;
    if !copied {
        head.headers.remove(header::CONTENT_LENGTH);
    }
    for name in [header::CONNECTION, header::UPGRADE] {
        head.headers.remove(name);
    }
    head.headers.insert("x-mirrored", HeaderValue::from_static("true"));
    // A target that names no path means the request's own.
    let whole = if url.path() == "/" && url.query().is_none() && !mirror.target.ends_with('/') {
        target(request.uri)
    } else {
        target(&url)
    };
    let host = mirror.host.as_deref().map_or_else(
        || url.authority().map(|authority| authority.as_str().to_owned()),
        |host| Some(request.expand(host)),
    )?;
    address(&mut head, &upstream.speech, whole, &host).ok()?;
    let counted = worker.proxy.standing.copies.clone().try_acquire_owned().ok()?;
    let (sender, body) = if copied {
        let (sender, pieces) = mpsc::channel(MAX_BEHIND);
        (Some(sender), Body::Copy(pieces))
    } else {
        (None, Body::Empty)
    };
    let (proxy, pool) = (worker.proxy.clone(), worker.pool.clone());
    tokio::spawn(async move {
        let _counted = counted;
        let retry = Retry { on: BTreeSet::new(), tries: 1, timeout: Duration::ZERO };
        let plan = Plan {
            pool: &pool,
            standing: &proxy.standing,
            upstream: &upstream,
            choice: Choice::LeastOfTwo,
            retry: &retry,
            connect_timeout: CONNECT,
            send_timeout: READ,
            read_timeout: READ,
            upload: Upload::default(),
            told: None,
        };
        if let Err(status) = sent(&plan, head, body).await {
            tracing::debug!(%status, %url, "mirror");
        }
    });
    sender
}

/// An answer without a body leaves its connection for the next copy.
async fn sent(plan: &Plan<'_>, head: Parts, body: Body) -> Result<(), http::StatusCode> {
    let mut answered = forward(plan, &head, body).await?;
    answered.held.end(answered.response.body_mut());
    Ok(())
}
