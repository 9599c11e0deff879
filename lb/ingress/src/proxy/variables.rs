//! nginx's variables in annotations (`upstream-hash-by`, `auth-url`, `auth-signin`, `upstream-vhost`). Pure.

use http::header::{self, HeaderMap};
use http::{Method, Uri};

use super::front::Client;
use super::hygiene::Admitted;

/// What variables are taken from.
pub(super) struct Request<'a> {
    pub(super) method: &'a Method,
    pub(super) uri: &'a Uri,
    pub(super) headers: &'a HeaderMap,
    pub(super) admitted: &'a Admitted,
    pub(super) client: &'a Client,
}

impl Request<'_> {
    /// The text with every `$name` and `${name}` replaced; a name that is not known is empty.
    pub(super) fn expand(&self, text: &str) -> String {
        let mut expanded = String::with_capacity(text.len());
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('$') {
            expanded.push_str(before);
            let braced = after.strip_prefix('{').and_then(|inner| inner.split_once('}'));
            let (name, next) = braced.unwrap_or_else(|| {
                let legal = |letter: char| letter.is_ascii_alphanumeric() || letter == '_';
                after.split_at(after.find(|letter| !legal(letter)).unwrap_or(after.len()))
            });
            if name.is_empty() {
                expanded.push('$');
            }
            expanded.push_str(&self.value(name));
            rest = next;
        }
        expanded.push_str(rest);
        expanded
    }

    fn value(&self, name: &str) -> String {
        if let Some(header) = name.strip_prefix("http_").filter(|header| *header != "host") {
            return field(self.headers, &header.replace('_', "-"));
        }
        if let Some(argument) = name.strip_prefix("arg_") {
            return argument_of(self.uri, argument);
        }
        if let Some(cookie) = name.strip_prefix("cookie_") {
            return cookie_of(self.headers, cookie).unwrap_or_default().to_owned();
        }
        match name {
            "host" => self.admitted.host.clone(),
            "http_host" | "best_http_host" => self.admitted.authority.clone(),
            "uri" => self.admitted.path.clone(),
            "request_uri" => target(self.uri).to_owned(),
            "escaped_request_uri" => escaped(target(self.uri)),
            "args" | "query_string" => self.uri.query().unwrap_or_default().to_owned(),
            "scheme" | "pass_access_scheme" => self.scheme().to_owned(),
            "request_method" => self.method.to_string(),
            "remote_addr" | "the_real_ip" => self.client.address.to_string(),
            _ => String::new(),
        }
    }

    pub(super) fn scheme(&self) -> &'static str {
        if self.client.https { "https" } else { "http" }
    }
}

/// Path and query as the client wrote them.
pub(super) fn target(uri: &Uri) -> &str {
    uri.path_and_query().map_or("/", |target| target.as_str())
}

fn field(headers: &HeaderMap, name: &str) -> String {
    headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned()
}

fn argument_of(uri: &Uri, name: &str) -> String {
    let pairs = uri.query().unwrap_or_default().split('&').filter_map(|pair| pair.split_once('='));
    pairs.into_iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_owned()).unwrap_or_default()
}

/// The value of a cookie of the request.
pub(super) fn cookie_of<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers
        .get_all(header::COOKIE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(';'))
        .filter_map(|pair| pair.trim().split_once('='))
        .find(|(key, _)| *key == name)
        .map(|(_, value)| value)
}

/// Everything but unreserved characters percent-encoded (RFC 3986 2.3).
pub(super) fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            escaped.push(char::from(byte));
        } else {
            escaped.push_str(&format!("%{byte:02X}"));
        }
    }
    escaped
}

/// A path for a request line: what may not stand there is percent-encoded, what is encoded stays.
pub(super) fn as_path(text: &str) -> String {
    let mut path = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_graphic() && !b"\"<>\\^`{}|#".contains(&byte) {
            path.push(char::from(byte));
        } else {
            path.push_str(&format!("%{byte:02X}"));
        }
    }
    path
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::super::front::Chain;
    use super::*;

    #[test]
    fn variables_are_those_of_the_request() {
        let mut headers = HeaderMap::new();
        headers.insert("x-user", HeaderValue::from_static("ann"));
        headers.insert("cookie", HeaderValue::from_static("a=1; session=xyz"));
        let admitted = Admitted { host: "a.com".into(), authority: "a.com:8080".into(), path: "/p".into() };
        let request = Request {
            method: &Method::GET,
            uri: &Uri::from_static("/p?x=1&y=2"),
            headers: &headers,
            admitted: &admitted,
            client: &Client {
                address: "192.0.2.1".parse().unwrap(),
                https: true,
                port: 443,
                host: None,
                chain: Chain::None,
            },
        };
        let text =
            "$scheme://${http_host}$request_uri|$http_x_user|$cookie_session|$arg_y|$remote_addr|$nothing|$";
        assert_eq!(request.expand(text), "https://a.com:8080/p?x=1&y=2|ann|xyz|2|192.0.2.1||$");
        assert_eq!(request.expand("$escaped_request_uri"), "%2Fp%3Fx%3D1%26y%3D2");
    }
}
