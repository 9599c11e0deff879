//! Paths of requests as routes are matched against them, in the proxy and in explanations. Pure.

/// Unescaped, without empty and `.` elements, `..` resolved; `None` for NUL, broken escapes and what leaves the root.
pub(crate) fn normal(raw: &str) -> Option<String> {
    if is_normal(raw) {
        return Some(raw.to_owned());
    }
    let mut bytes = Vec::with_capacity(raw.len());
    let mut rest = raw.bytes();
    while let Some(byte) = rest.next() {
        let byte = match byte {
            b'%' => hex(rest.next()?)? * 16 + hex(rest.next()?)?,
            other => other,
        };
        if byte == 0 {
            return None;
        }
        bytes.push(byte);
    }
    let path = String::from_utf8_lossy(&bytes);
    let mut elements: Vec<&str> = Vec::new();
    for element in path.split('/') {
        match element {
            "" | "." => {}
            ".." => drop(elements.pop()?),
            other => elements.push(other),
        }
    }
    let directory = path.ends_with('/') || path.ends_with("/.") || path.ends_with("/..");
    let end = if directory && !elements.is_empty() { "/" } else { "" };
    Some(format!("/{}{end}", elements.join("/")))
}

/// Most are so as they come: nothing is escaped, and no element is empty or begins with a dot.
fn is_normal(raw: &str) -> bool {
    let odd = |pair: (u8, u8)| matches!(pair, (b'/', b'/' | b'.') | (_, b'%' | 0));
    raw.starts_with('/') && !raw.bytes().zip(raw.bytes().skip(1)).any(odd)
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routes_see_the_path_that_backends_will_make_of_it() {
        assert_eq!(normal("/a/%2e%2e/b").as_deref(), Some("/b"));
        assert_eq!(normal("/public/..%2fadmin").as_deref(), Some("/admin"));
        assert_eq!(normal("//a///b/./c/").as_deref(), Some("/a/b/c/"));
        assert_eq!(normal("/a/b.c/d").as_deref(), Some("/a/b.c/d"));
        assert_eq!(normal("/.hidden/").as_deref(), Some("/.hidden/"));
        assert_eq!(normal("a/./b").as_deref(), Some("/a/b"));
        assert_eq!(normal("/../etc"), None);
        assert_eq!(normal("/a%00"), None);
        assert_eq!(normal("/a%zz"), None);
        assert_eq!(normal("/a%4"), None);
    }
}
