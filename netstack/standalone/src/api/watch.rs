//! watch: a stream of events from a revision on. In: a [`Call`] and the store's history. Out: one JSON event per line.
//! The stream holds a position, not a queue: it wakes when the revision grows and reads what is new, so a slow client
//! costs nothing until the history has moved on, and then gets 410 and lists again.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::StatusCode;
use axum::response::Response;
use serde_json::json;
use tokio::time::Instant;

use super::read::{Filter, bookmark, render};
use super::{Api, Call, body_response};
use crate::status::{ApiError, Cause};
use crate::store::{Event, EventKind, Store, Stored, View};

/// How often an idle watch is told the latest revision (the real API server: about once a minute).
const BOOKMARK_INTERVAL: Duration = Duration::from_mins(1);
/// Watches end after this when the client names no time, as the real API server's do after 30 to 60 minutes.
const DEFAULT_TIMEOUT: Duration = Duration::from_mins(45);

/// Where a watch begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Start {
    /// Everything there is as ADDED, then changes; `end_bookmark` says where the first part ends.
    Initial { end_bookmark: bool },
    /// Changes after a revision.
    After(u64),
    /// Changes from now on.
    Now,
}

struct Stream {
    store: Arc<Store>,
    revisions: tokio::sync::watch::Receiver<u64>,
    call: Call,
    filter: Filter,
    position: u64,
    ready: Vec<u8>,
    deadline: Instant,
    next_bookmark: Instant,
    sent_columns: bool,
    ended: bool,
}

impl Api {
    pub(super) fn watch(&self, call: &Call) -> Result<Response, ApiError> {
        let start = start(call)?;
        let filter = Filter::of(call)?;
        let now = Instant::now();
        let timeout = call.options.timeout_seconds.map_or(DEFAULT_TIMEOUT, Duration::from_secs);
        let mut stream = Stream {
            store: self.store.clone(),
            revisions: self.store.revisions(),
            call: call.clone(),
            filter,
            position: 0,
            ready: Vec::new(),
            deadline: now + timeout,
            next_bookmark: now + BOOKMARK_INTERVAL,
            sent_columns: false,
            ended: false,
        };
        stream.begin(start)?;
        let chunks = futures::stream::unfold(stream, |mut stream| async move {
            let chunk = stream.next().await?;
            Some((Ok::<_, std::convert::Infallible>(chunk), stream))
        });
        Ok(body_response(StatusCode::OK, "application/json", Body::from_stream(chunks)))
    }
}

/// The rules of KEP-3157 for `sendInitialEvents`, and the older ones without it.
fn start(call: &Call) -> Result<Start, ApiError> {
    let options = &call.options;
    let revision = options.revision()?;
    let newer = options.resource_version_match == "NotOlderThan";
    let refused = |field: &str, message: &str| {
        let cause =
            Cause { reason: "FieldValueForbidden", message: message.to_owned(), field: field.to_owned() };
        Err(ApiError::invalid(call.target.resource, "", vec![cause]))
    };
    match options.send_initial_events {
        Some(_) if !newer => {
            refused("resourceVersionMatch", "sendInitialEvents requires resourceVersionMatch=NotOlderThan")
        }
        Some(true) => Ok(Start::Initial { end_bookmark: options.allow_bookmarks }),
        None if !options.resource_version_match.is_empty() => {
            refused("resourceVersionMatch", "is forbidden for watch unless sendInitialEvents is provided")
        }
        Some(false) if revision.unwrap_or(0) == 0 => Ok(Start::Now),
        None if revision.unwrap_or(0) == 0 => Ok(Start::Initial { end_bookmark: false }),
        _ => Ok(Start::After(revision.unwrap_or(0))),
    }
}

impl Stream {
    fn begin(&mut self, start: Start) -> Result<(), ApiError> {
        let store = self.store.clone();
        store.read(|view| match start {
            Start::Initial { end_bookmark } => {
                let asked = self.call.options.revision()?.unwrap_or(0);
                if asked > view.revision() {
                    return Err(ApiError::too_large_revision(asked, view.revision()));
                }
                let objects: Vec<_> = self.filter.objects(view).cloned().collect();
                objects.iter().for_each(|it| self.write("ADDED", it));
                self.position = view.revision();
                if end_bookmark {
                    self.write_bookmark(true);
                }
                Ok(())
            }
            Start::After(revision) => {
                self.position = revision;
                Ok(())
            }
            Start::Now => {
                self.position = view.revision();
                Ok(())
            }
        })
    }

    /// The next chunk of events; `None` ends the response.
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if !self.ready.is_empty() {
                return Some(Bytes::from(std::mem::take(&mut self.ready)));
            }
            if self.ended || Instant::now() >= self.deadline {
                return None;
            }
            self.revisions.mark_unchanged();
            self.catch_up();
            if !self.ready.is_empty() {
                continue;
            }
            tokio::select! {
                changed = self.revisions.changed() => self.ended |= changed.is_err(),
                () = tokio::time::sleep_until(self.next_bookmark) => self.periodic_bookmark(),
                () = tokio::time::sleep_until(self.deadline) => {}
            }
        }
    }

    fn catch_up(&mut self) {
        let store = self.store.clone();
        let result = store.read(|view: &View| {
            let events = view.events_after(self.position)?;
            let news: Vec<(&'static str, Arc<Stored>)> = events
                .filter_map(|event| Some((verdict(&self.filter, event)?, event.object.clone())))
                .collect();
            Ok::<_, ApiError>((view.revision(), news))
        });
        match result {
            Ok((revision, news)) => {
                news.iter().for_each(|(kind, stored)| self.write(kind, stored));
                self.position = revision;
            }
            Err(error) => {
                self.ready.extend_from_slice(
                    json!({"type": "ERROR", "object": error.to_json()}).to_string().as_bytes(),
                );
                self.ready.push(b'\n');
                self.ended = true;
            }
        }
    }

    fn periodic_bookmark(&mut self) {
        self.next_bookmark = Instant::now() + BOOKMARK_INTERVAL;
        if self.call.options.allow_bookmarks {
            self.write_bookmark(false);
        }
    }

    fn write_bookmark(&mut self, initial_end: bool) {
        let object = bookmark(self.call.target.resource, self.call.shape, self.position, initial_end);
        self.ready.extend_from_slice(json!({"type": "BOOKMARK", "object": object}).to_string().as_bytes());
        self.ready.push(b'\n');
    }

    fn write(&mut self, kind: &str, stored: &Arc<Stored>) {
        let object = render(&self.call, stored, !self.sent_columns);
        self.sent_columns = true;
        self.ready.extend_from_slice(br#"{"type":""#);
        self.ready.extend_from_slice(kind.as_bytes());
        self.ready.extend_from_slice(br#"","object":"#);
        self.ready.extend_from_slice(&object);
        self.ready.extend_from_slice(b"}\n");
    }
}

/// What a change means to a watch that sees only what its filter matches. Without the previous state the answer is the
/// safe one: the client may be told of a deletion it never saw the object of.
fn verdict(filter: &Filter, event: &Event) -> Option<&'static str> {
    let now = filter.matches(&event.object);
    let before = event.previous.as_ref().map(|it| filter.matches(it));
    match (event.kind, before, now) {
        (EventKind::Added, _, true) | (EventKind::Modified, Some(false), true) => Some("ADDED"),
        (EventKind::Modified, _, true) => Some("MODIFIED"),
        (EventKind::Modified, Some(true) | None, false) => {
            filter.is_in_place(event.object.as_ref()).then_some("DELETED")
        }
        (EventKind::Deleted, Some(true), _) | (EventKind::Deleted, None, true) => Some("DELETED"),
        _ => None,
    }
}
