//! HTTP/1.1 as backends speak it (RFC 9112): the head of an answer, where its body ends, and the head of a request. Pure.
//!
//! In: bytes as they were read. Out: heads and pieces of bodies. Two parsers that find different ends of one message are how requests are
//! smuggled, so an answer that has no one end by the text of the specification is refused, and what follows an answer is no answer.

use std::io::Write as _;
use std::mem::MaybeUninit;

use bytes::{Buf as _, Bytes, BytesMut};
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::request::Parts;
use http::{Method, Request, StatusCode, Uri};
use jiff::Timestamp;

use super::hygiene::Told;

/// Of an answer's head, and of its trailer.
pub(super) const MAX_HEAD_BYTES: usize = 64 * 1024;
const MAX_FIELDS: usize = 100;
/// Of a request's head that is looked at here.
const MAX_SHORT_HEAD_BYTES: usize = 8 * 1024;
/// Of the line before a chunk, and of all that stands in them beside the sizes.
const MAX_LINE_BYTES: usize = 4 * 1024;
const MAX_EXTENSION_BYTES: usize = 16 * 1024;

/// Why bytes are no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum Malformed {
    #[error("the head of the answer")]
    Head(#[from] httparse::Error),
    #[error("a head or trailer of more than {MAX_HEAD_BYTES} bytes")]
    TooLong,
    #[error("Content-Length is no number, or several (RFC 9112 6.3)")]
    Length,
    #[error("Transfer-Encoding is not chunked alone, or stands beside Content-Length (RFC 9112 6.1, 6.3)")]
    Coding,
    #[error("a field that can be none")]
    Field,
    #[error("a chunk (RFC 9112 7.1)")]
    Chunk,
}

/// An answer's head, without what it says of its framing.
#[derive(Debug)]
pub(super) struct Head {
    pub(super) status: StatusCode,
    pub(super) fields: HeaderMap,
    pub(super) framing: Framing,
    /// Another request may follow on the connection.
    pub(super) lasts: bool,
}

/// Where a body ends.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Framing {
    /// After so many bytes more.
    Length(u64),
    Chunked(Chunks),
    /// With the connection.
    Close,
}

/// The next of a body.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Piece {
    Data(Bytes),
    Trailer(HeaderMap),
    End,
    /// It is not there yet.
    More,
}

/// How far a chunked body was read.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Chunks {
    at: At,
    extension_bytes: usize,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum At {
    #[default]
    Size,
    Data(u64),
    /// The line end after a chunk's data.
    DataEnd,
    Trailer,
    End,
}

/// Takes the head of an answer to a request of this method off the buffer; `None` while it is not whole.
///
/// # Errors
/// It is none, or says of its body what can be understood in two ways.
pub(super) fn head(buffer: &mut BytesMut, asked: &Method) -> Result<Option<Head>, Malformed> {
    let mut room = [const { MaybeUninit::uninit() }; MAX_FIELDS];
    let mut parsed = httparse::Response::new(&mut []);
    let config = httparse::ParserConfig::default();
    let length = match config.parse_response_with_uninit_headers(&mut parsed, buffer, &mut room)? {
        httparse::Status::Complete(length) if length <= MAX_HEAD_BYTES => length,
        httparse::Status::Partial if buffer.len() <= MAX_HEAD_BYTES => return Ok(None),
        _ => return Err(Malformed::TooLong),
    };
    let status = parsed.code.and_then(|code| StatusCode::from_u16(code).ok()).ok_or(Malformed::Field)?;
    let is_1_1 = parsed.version == Some(1);
    let places = Places::of(buffer, parsed.headers);
    let text = buffer.split_to(length).freeze();
    let mut said = Said::default();
    let mut fields = HeaderMap::with_capacity(places.0.len());
    for field in places.fields(&text) {
        let (name, value) = field?;
        if said.hears(&name, &value)? {
            fields.append(name, HeaderValue::from_maybe_shared(value).map_err(|_| Malformed::Field)?);
        }
    }
    let framing = said.framing(status, asked, is_1_1)?;
    if let Some(length) = said.length.filter(|_| status != StatusCode::NO_CONTENT) {
        fields.insert(header::CONTENT_LENGTH, length.into());
    }
    let lasts = framing != Framing::Close && !said.close && (is_1_1 || said.keep_alive);
    Ok(Some(Head { status, fields, framing, lasts }))
}

/// Where fields stand in a head, so that their values can be shared with it: where name and value begin, and their lengths.
struct Places(Vec<[usize; 4]>);

impl Places {
    fn of(text: &[u8], fields: &[httparse::Header<'_>]) -> Self {
        let place = |field: &httparse::Header<'_>| {
            let (name, value) = (field.name.as_bytes(), field.value);
            [place_in(text, name), name.len(), place_in(text, value), value.len()]
        };
        Self(fields.iter().map(place).collect())
    }

    fn fields(&self, text: &Bytes) -> impl Iterator<Item = Result<(HeaderName, Bytes), Malformed>> {
        self.0.iter().map(|[name, name_length, value, value_length]| {
            let name = text.get(*name..name + name_length).unwrap_or_default();
            let name = HeaderName::from_bytes(name).map_err(|_| Malformed::Field)?;
            Ok((name, text.slice(*value..value + value_length)))
        })
    }
}

/// Where a part of the text begins; what is empty stands nowhere.
fn place_in(text: &[u8], part: &[u8]) -> usize {
    if part.is_empty() { 0 } else { part.as_ptr().addr() - text.as_ptr().addr() }
}

/// What the fields of an answer say of its framing.
#[derive(Default)]
struct Said {
    length: Option<u64>,
    chunked: bool,
    close: bool,
    keep_alive: bool,
}

impl Said {
    /// Whether the field goes on as it is.
    fn hears(&mut self, name: &HeaderName, value: &[u8]) -> Result<bool, Malformed> {
        if *name == header::CONTENT_LENGTH {
            for item in value.split(|byte| *byte == b',') {
                let length = number(item.trim_ascii()).ok_or(Malformed::Length)?;
                if self.length.is_some_and(|known| known != length) {
                    return Err(Malformed::Length);
                }
                self.length = Some(length);
            }
            return Ok(false);
        }
        if *name == header::TRANSFER_ENCODING {
            if self.chunked || !value.eq_ignore_ascii_case(b"chunked") {
                return Err(Malformed::Coding);
            }
            self.chunked = true;
            return Ok(false);
        }
        if *name == header::CONNECTION {
            let mut names_fields = false;
            for option in value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii) {
                let (close, keep) =
                    (option.eq_ignore_ascii_case(b"close"), option.eq_ignore_ascii_case(b"keep-alive"));
                self.close |= close;
                self.keep_alive |= keep;
                names_fields |= !close && !keep;
            }
            return Ok(names_fields);
        }
        Ok(true)
    }

    /// RFC 9112 6.3.
    fn framing(&self, status: StatusCode, asked: &Method, is_1_1: bool) -> Result<Framing, Malformed> {
        if self.chunked && (self.length.is_some() || !is_1_1) {
            return Err(Malformed::Coding);
        }
        let bodiless = status.is_informational()
            || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED)
            || asked == Method::HEAD;
        Ok(match self.length {
            _ if bodiless => Framing::Length(0),
            _ if self.chunked => Framing::Chunked(Chunks::default()),
            Some(length) => Framing::Length(length),
            None => Framing::Close,
        })
    }
}

/// Digits and nothing else (RFC 9110 8.6).
fn number(text: &[u8]) -> Option<u64> {
    let digits = !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(text).ok().filter(|_| digits)?.parse().ok()
}

impl Framing {
    /// Takes the next of the body off the buffer.
    ///
    /// # Errors
    /// What stands there can be none.
    pub(super) fn next(&mut self, buffer: &mut BytesMut) -> Result<Piece, Malformed> {
        match self {
            Self::Length(0) => Ok(Piece::End),
            Self::Length(left) => Ok(data(left, buffer)),
            Self::Close if buffer.is_empty() => Ok(Piece::More),
            Self::Close => Ok(Piece::Data(buffer.split().freeze())),
            Self::Chunked(chunks) => chunks.next(buffer),
        }
    }

    /// Nothing more comes; with what is there.
    pub(super) fn is_over(&mut self, buffer: &mut BytesMut) -> bool {
        match self {
            Self::Length(left) => *left == 0,
            Self::Close => false,
            Self::Chunked(chunks) => chunks.is_over(buffer),
        }
    }

    /// What is left of it, where that is known.
    pub(super) fn left(&self) -> Option<u64> {
        match self {
            Self::Length(left) => Some(*left),
            Self::Close | Self::Chunked(_) => None,
        }
    }
}

fn data(left: &mut u64, buffer: &mut BytesMut) -> Piece {
    if buffer.is_empty() {
        return Piece::More;
    }
    let length = usize::try_from(*left).unwrap_or(usize::MAX).min(buffer.len());
    *left -= length as u64;
    Piece::Data(buffer.split_to(length).freeze())
}

impl Chunks {
    fn next(&mut self, buffer: &mut BytesMut) -> Result<Piece, Malformed> {
        loop {
            match &mut self.at {
                At::End => return Ok(Piece::End),
                At::Data(0) => self.at = At::DataEnd,
                At::Data(left) => return Ok(data(left, buffer)),
                At::DataEnd => match buffer.get(..2) {
                    Some(b"\r\n") => {
                        buffer.advance(2);
                        self.at = At::Size;
                    }
                    Some(_) => return Err(Malformed::Chunk),
                    None => return Ok(Piece::More),
                },
                At::Size => {
                    let end = buffer.iter().position(|byte| *byte == b'\n');
                    if end.unwrap_or(buffer.len()) > MAX_LINE_BYTES {
                        return Err(Malformed::Chunk);
                    }
                    let Some(end) = end else { return Ok(Piece::More) };
                    let line = buffer.split_to(end + 1);
                    let (size, beside) = size(&line).ok_or(Malformed::Chunk)?;
                    self.extension_bytes += beside;
                    if self.extension_bytes > MAX_EXTENSION_BYTES {
                        return Err(Malformed::Chunk);
                    }
                    self.at = if size == 0 { At::Trailer } else { At::Data(size) };
                }
                At::Trailer => {
                    let Some(trailer) = trailer(buffer)? else { return Ok(Piece::More) };
                    self.at = At::End;
                    return Ok(if trailer.is_empty() { Piece::End } else { Piece::Trailer(trailer) });
                }
            }
        }
    }

    /// Takes the end where it follows at once, so that nobody has to come back for it.
    fn is_over(&mut self, buffer: &mut BytesMut) -> bool {
        let rest: &[u8] = match self.at {
            At::End => return true,
            At::Data(0) | At::DataEnd => b"\r\n0\r\n\r\n",
            At::Trailer => b"\r\n",
            At::Data(_) | At::Size => return false,
        };
        let follows = buffer.starts_with(rest);
        if follows {
            buffer.advance(rest.len());
            self.at = At::End;
        }
        follows
    }
}

/// A chunk's size, and how much of its line is something else; spaces behind the size are forgiven, because old servers fill it up.
fn size(line: &[u8]) -> Option<(u64, usize)> {
    let line = line.strip_suffix(b"\r\n")?;
    let digits = line.iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
    let (number, beside) = line.split_at(digits);
    let extension = beside.trim_ascii_start();
    let text = |byte: &u8| *byte == b'\t' || !byte.is_ascii_control();
    let sound = (1..=16).contains(&digits)
        && (extension.is_empty() || extension.starts_with(b";"))
        && beside.iter().all(text);
    let number = std::str::from_utf8(number).ok().filter(|_| sound)?;
    Some((u64::from_str_radix(number, 16).ok()?, beside.len()))
}

/// The fields after the last chunk, `None` while they are not whole.
fn trailer(buffer: &mut BytesMut) -> Result<Option<HeaderMap>, Malformed> {
    if buffer.starts_with(b"\r\n") {
        buffer.advance(2);
        return Ok(Some(HeaderMap::new()));
    }
    let end = buffer.windows(4).position(|bytes| bytes == b"\r\n\r\n");
    if end.unwrap_or(buffer.len()) > MAX_HEAD_BYTES {
        return Err(Malformed::TooLong);
    }
    let Some(end) = end else { return Ok(None) };
    let text = buffer.split_to(end + 4);
    // httparse would take a line feed alone for a line's end.
    let bare = |at: usize| at.checked_sub(1).and_then(|before| text.get(before)) != Some(&b'\r');
    if text.iter().enumerate().any(|(at, byte)| *byte == b'\n' && bare(at)) {
        return Err(Malformed::Chunk);
    }
    let mut room = [httparse::EMPTY_HEADER; MAX_FIELDS];
    let httparse::Status::Complete((_, parsed)) = httparse::parse_headers(&text, &mut room)? else {
        return Err(Malformed::Chunk);
    };
    let mut fields = HeaderMap::with_capacity(parsed.len());
    for field in parsed {
        let name = HeaderName::from_bytes(field.name.as_bytes()).map_err(|_| Malformed::Field)?;
        let value = HeaderValue::from_bytes(field.value).map_err(|_| Malformed::Field)?;
        if may_trail(&name) {
            fields.append(name, value);
        }
    }
    Ok(Some(fields))
}

/// Not what frames a message, says where it goes, who sends it or how its body is read (RFC 9110 6.5.1).
fn may_trail(name: &HeaderName) -> bool {
    const NOT: [HeaderName; 15] = [
        header::AUTHORIZATION,
        header::CACHE_CONTROL,
        header::CONNECTION,
        header::CONTENT_ENCODING,
        header::CONTENT_LENGTH,
        header::CONTENT_RANGE,
        header::CONTENT_TYPE,
        header::HOST,
        header::MAX_FORWARDS,
        header::PROXY_AUTHORIZATION,
        header::SET_COOKIE,
        header::TE,
        header::TRAILER,
        header::TRANSFER_ENCODING,
        header::UPGRADE,
    ];
    !NOT.contains(name)
}

/// What a client has sent.
pub(super) enum Asked {
    /// A request without a body, and whether another may follow.
    Plain(Box<Parts>, bool),
    /// Its head is not whole.
    More,
    /// Something else: it stands in the buffer as it came.
    Other,
}

/// Takes a request off the buffer that can be understood in one way only: HTTP/1.1, a path, one Host, and no field that speaks of a body
/// or of the connection but `Connection: close` and `keep-alive`.
pub(super) fn request(buffer: &mut BytesMut) -> Asked {
    if buffer.is_empty() {
        return Asked::More;
    }
    let mut room = [const { MaybeUninit::uninit() }; MAX_FIELDS];
    let mut parsed = httparse::Request::new(&mut []);
    let length = match parsed.parse_with_uninit_headers(buffer, &mut room) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) if buffer.len() < MAX_SHORT_HEAD_BYTES => return Asked::More,
        _ => return Asked::Other,
    };
    let (Some(method), Some(target), Some(1)) = (parsed.method, parsed.path, parsed.version) else {
        return Asked::Other;
    };
    let Some(lasts) =
        plain(parsed.headers).filter(|_| target.starts_with('/') && buffer.starts_with(method.as_bytes()))
    else {
        return Asked::Other;
    };
    let Ok(method) = Method::from_bytes(method.as_bytes()) else { return Asked::Other };
    let (target, target_length) = (place_in(buffer, target.as_bytes()), target.len());
    let places = Places::of(buffer, parsed.headers);
    let text = buffer.split_to(length).freeze();
    let fields = || -> Result<HeaderMap, Malformed> {
        let mut fields = HeaderMap::with_capacity(places.0.len());
        for field in places.fields(&text) {
            let (name, value) = field?;
            // It is for this connection only, and understood.
            if name == header::CONNECTION {
                continue;
            }
            fields.append(name, HeaderValue::from_maybe_shared(value).map_err(|_| Malformed::Field)?);
        }
        Ok(fields)
    };
    match (Uri::from_maybe_shared(text.slice(target..target + target_length)), fields()) {
        (Ok(uri), Ok(fields)) => {
            let (mut head, ()) = Request::new(()).into_parts();
            (head.method, head.uri, head.headers) = (method, uri, fields);
            Asked::Plain(Box::new(head), lasts)
        }
        _ => {
            *buffer = [&text[..], buffer].concat().as_slice().into();
            Asked::Other
        }
    }
}

/// Whether the connection lasts, of a request that has one Host and nothing unusual.
fn plain(fields: &[httparse::Header<'_>]) -> Option<bool> {
    let (mut hosts, mut lengths, mut connection) = (0, 0, None);
    for field in fields {
        let is = |name: &str| field.name.eq_ignore_ascii_case(name);
        if is("host") {
            hosts += 1;
        } else if is("connection") {
            let value = field.value;
            let close = value.eq_ignore_ascii_case(b"close");
            let known = close || value.eq_ignore_ascii_case(b"keep-alive");
            connection = Some(!close).filter(|_| known && connection.is_none());
            connection?;
        } else if is("content-length") && field.value == b"0" {
            lengths += 1;
        } else if is("content-length") || UNUSUAL.iter().any(|name| is(name)) {
            return None;
        }
    }
    (hosts == 1 && lengths <= 1).then_some(connection.unwrap_or(true))
}

const UNUSUAL: [&str; 8] = [
    "transfer-encoding",
    "te",
    "trailer",
    "upgrade",
    "expect",
    "keep-alive",
    "proxy-connection",
    "http2-settings",
];

/// Writes one field line; the value is one that a field can have.
fn write_field(into: &mut Vec<u8>, name: &HeaderName, value: &[u8]) {
    for part in [name.as_str().as_bytes(), b": ", value, b"\r\n"] {
        into.extend_from_slice(part);
    }
}

/// Writes an answer's head for HTTP/1.1; `body` is its length where that is known, and whether one is to be sent at all.
pub(super) fn write_answer(
    into: &mut Vec<u8>,
    head: &http::response::Parts,
    (sent, length): (bool, Option<u64>),
    lasts: bool,
) -> Frames {
    let reason = head.status.canonical_reason().unwrap_or("<none>");
    for part in ["HTTP/1.1 ", head.status.as_str(), " ", reason, "\r\n"] {
        into.extend_from_slice(part.as_bytes());
    }
    let (mut said, mut dated) = (None, false);
    for (name, value) in &head.headers {
        if *name == header::CONTENT_LENGTH {
            said = number(value.as_bytes());
        } else if *name != header::TRANSFER_ENCODING && *name != header::CONNECTION {
            dated |= *name == header::DATE;
            write_field(into, name, value.as_bytes());
        }
    }
    if !dated {
        let _ = write!(into, "date: {}\r\n", Timestamp::now().strftime("%a, %d %b %Y %H:%M:%S GMT"));
    }
    if !lasts {
        into.extend_from_slice(b"connection: close\r\n");
    }
    let length = said.or(length);
    match length {
        _ if head.status == StatusCode::NO_CONTENT => {}
        Some(length) => {
            let _ = write!(into, "content-length: {length}\r\n");
        }
        None if sent => into.extend_from_slice(b"transfer-encoding: chunked\r\n"),
        None => {}
    }
    into.extend_from_slice(b"\r\n");
    match length {
        _ if !sent => Frames::Length(0),
        Some(length) => Frames::Length(length),
        None => Frames::Chunked(Vec::new()),
    }
}

/// How a request's body is framed.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Frames {
    /// So many bytes are to come.
    Length(u64),
    /// With fields of these names after it.
    Chunked(Vec<HeaderName>),
}

/// Writes a request's head. `body` is `None` where there is none, else its length where that is known.
///
/// # Errors
/// Content-Length is no number.
pub(super) fn write_head(
    into: &mut Vec<u8>,
    head: &Parts,
    told: Option<Told<'_>>,
    body: Option<Option<u64>>,
) -> Result<Frames, Malformed> {
    let target = head.uri.path_and_query().map_or("/", |target| target.as_str());
    for part in [head.method.as_str(), " ", target, " HTTP/1.1\r\n"] {
        into.extend_from_slice(part.as_bytes());
    }
    let mut said = None;
    for (name, value) in &head.headers {
        if *name == header::CONTENT_LENGTH {
            said = Some(number(value.as_bytes()).ok_or(Malformed::Length)?);
        } else if *name != header::TRANSFER_ENCODING {
            write_field(into, name, value.as_bytes());
        }
    }
    if let Some(told) = told {
        told.write(into);
    }
    let frames = match body {
        None => Frames::Length(0),
        Some(known) => {
            said.or(known).map_or_else(|| Frames::Chunked(trailing(&head.headers)), Frames::Length)
        }
    };
    match &frames {
        // What has no body says so only where the client did.
        Frames::Length(0) if said.is_none() && body.is_none() => {}
        Frames::Length(length) => {
            let _ = write!(into, "content-length: {length}\r\n");
        }
        Frames::Chunked(_) => into.extend_from_slice(b"transfer-encoding: chunked\r\n"),
    }
    into.extend_from_slice(b"\r\n");
    Ok(frames)
}

/// Names that Trailer announces and that may stand there.
fn trailing(headers: &HeaderMap) -> Vec<HeaderName> {
    let named = headers.get_all(header::TRAILER).iter().filter_map(|value| value.to_str().ok());
    let names = named.flat_map(|value| value.split(',')).filter_map(|name| name.trim().parse().ok());
    names.filter(may_trail).collect()
}

/// Writes the line before a chunk.
pub(super) fn write_size(into: &mut Vec<u8>, size: usize) {
    let _ = write!(into, "{size:x}\r\n");
}

/// Writes the end of a chunked body.
pub(super) fn write_end(into: &mut Vec<u8>, announced: &[HeaderName], trailer: &HeaderMap) {
    into.extend_from_slice(b"0\r\n");
    for (name, value) in trailer.iter().filter(|(name, _)| announced.contains(name)) {
        write_field(into, name, value.as_bytes());
    }
    into.extend_from_slice(b"\r\n");
}
