//! Digest access authentication (RFC 7616) by MD5 and qop `auth`, which is what the lines of an htdigest file (`user:realm:HA1`) allow.
//!
//! ```text
//!  no or a wrong answer -> challenge with a nonce: time, random number, keyed hash of both and the realm      (nothing is kept)
//!  answer -> the right one for method, target and nonce? -> nonce of the last minute, its count not used yet? -> pass
//!                                                            \- else `stale`: the client answers anew by itself
//! ```
//!
//! Who overhears an answer cannot use it a second time.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use ring::hmac;
use ring::rand::SystemRandom;

use super::htpasswd::{hex, md5, same};

/// Of a nonce (nginx's auth_digest_timeout).
const LIFETIME: Duration = Duration::from_secs(60);
/// Nonces whose counts are remembered at one time; beyond, the oldest ends early.
const MAX_USED: usize = 16_384;
/// Counts behind the highest that may come still: a browser asks over several connections at once.
const WINDOW: u32 = 64;
/// Of the keyed hash in a nonce.
const TAG_BYTES: usize = 16;

/// A request for something that is protected.
pub(super) struct Asked<'a> {
    pub(super) method: &'a str,
    /// Path and query as the client sent them.
    pub(super) target: &'a str,
    pub(super) realm: &'a str,
    /// HA1 by `user:realm`.
    pub(super) users: &'a BTreeMap<String, String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Pass,
    Wrong,
    /// Right, but for a nonce that is not good any more.
    Stale,
}

/// What challenges are made of and answers are held against.
pub(super) struct Nonces {
    key: Option<hmac::Key>,
    began: Instant,
    used: Mutex<Used>,
}

/// Milliseconds since [`Nonces::began`], and a random number.
type Nonce = (u64, u64);

#[derive(Default)]
struct Used {
    counts: BTreeMap<Nonce, Counts>,
    /// It and all before it are not good any more.
    ended: Option<Nonce>,
}

/// The highest count and, by bits, which of those up to it came.
#[derive(Default)]
struct Counts {
    highest: u32,
    came: u64,
}

impl Default for Nonces {
    fn default() -> Self {
        let key = hmac::Key::generate(hmac::HMAC_SHA256, &SystemRandom::new()).ok();
        Self { key, began: Instant::now(), used: Mutex::default() }
    }
}

impl Nonces {
    /// The value of WWW-Authenticate.
    pub(super) fn challenge(&self, realm: &str, stale: bool) -> String {
        let millis = self.millis(Instant::now());
        let nonce = self.told((millis, rand::random()), realm);
        let stale = if stale { ", stale=true" } else { "" };
        format!("Digest realm={}, qop=\"auth\", algorithm=MD5, nonce=\"{nonce}\"{stale}", quoted(realm))
    }

    /// Of the value of an Authorization field.
    pub(super) fn check(&self, asked: &Asked<'_>, field: &str) -> Verdict {
        self.check_at(asked, field, Instant::now())
    }

    fn check_at(&self, asked: &Asked<'_>, field: &str, now: Instant) -> Verdict {
        let Some(given) = parameters(field) else { return Verdict::Wrong };
        let of = |name: &str| given.get(name).map_or("", String::as_str);
        // With a colon in it a user's name would reach into the realm of another.
        let user = Some(of("username")).filter(|user| !user.contains(':'));
        let Some(ha1) = user.and_then(|user| asked.users.get(&format!("{user}:{}", asked.realm))) else {
            return Verdict::Wrong;
        };
        let ha2 = hash(&[asked.method, of("uri")]);
        let parts = [ha1, of("nonce"), of("nc"), of("cnonce"), of("qop"), &ha2];
        let right = same(hash(&parts).as_bytes(), of("response").to_ascii_lowercase().as_bytes());
        let algorithm = given.get("algorithm").is_none_or(|name| name.eq_ignore_ascii_case("MD5"));
        if !right
            || !algorithm
            || of("realm") != asked.realm
            || of("qop") != "auth"
            || of("cnonce").is_empty()
            || of("uri") != asked.target
        {
            return Verdict::Wrong;
        }
        let millis = self.millis(now);
        let good = self
            .read(of("nonce"), asked.realm)
            .filter(|(made, _)| u128::from(millis.saturating_sub(*made)) <= LIFETIME.as_millis())
            .zip(count(of("nc")))
            .is_some_and(|(nonce, count)| {
                self.used.lock().unwrap_or_else(PoisonError::into_inner).take(nonce, count, millis)
            });
        if good { Verdict::Pass } else { Verdict::Stale }
    }

    fn millis(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.began).as_millis()).unwrap_or(u64::MAX)
    }

    fn told(&self, nonce: Nonce, realm: &str) -> String {
        let bytes = octets(nonce);
        hex(&[&bytes[..], &self.tag(&bytes, realm)].concat())
    }

    /// `None` for what this process did not tell for this realm.
    fn read(&self, told: &str, realm: &str) -> Option<Nonce> {
        let digits = told.get(..32).filter(|digits| digits.bytes().all(|digit| digit.is_ascii_hexdigit()))?;
        let (millis, random) = digits.split_at(16);
        let nonce = (u64::from_str_radix(millis, 16).ok()?, u64::from_str_radix(random, 16).ok()?);
        (self.key.is_some() && same(self.told(nonce, realm).as_bytes(), told.as_bytes())).then_some(nonce)
    }

    fn tag(&self, bytes: &[u8], realm: &str) -> [u8; TAG_BYTES] {
        let signed = self.key.as_ref().map(|key| hmac::sign(key, &[bytes, realm.as_bytes()].concat()));
        signed.and_then(|tag| tag.as_ref().first_chunk().copied()).unwrap_or_default()
    }
}

impl Used {
    /// Whether the nonce is good and the count new.
    fn take(&mut self, nonce: Nonce, count: u32, now_millis: u64) -> bool {
        while let Some(entry) = self.counts.first_entry() {
            if u128::from(now_millis.saturating_sub(entry.key().0)) <= LIFETIME.as_millis() {
                break;
            }
            entry.remove();
        }
        if self.ended.is_some_and(|ended| nonce <= ended) {
            return false;
        }
        if self.counts.len() >= MAX_USED
            && !self.counts.contains_key(&nonce)
            && let Some((oldest, _)) = self.counts.pop_first()
        {
            self.ended = Some(oldest);
        }
        self.ended.is_none_or(|ended| nonce > ended) && self.counts.entry(nonce).or_default().take(count)
    }
}

impl Counts {
    fn take(&mut self, count: u32) -> bool {
        if count > self.highest {
            let by = count - self.highest;
            self.came = self.came.checked_shl(by).unwrap_or_default() | 1;
            self.highest = count;
            return true;
        }
        let behind = self.highest - count;
        if behind >= WINDOW || count == 0 {
            return false;
        }
        let bit = 1 << behind;
        let is_new = self.came & bit == 0;
        self.came |= bit;
        is_new
    }
}

/// Of eight hexadecimal digits.
fn count(digits: &str) -> Option<u32> {
    let is_count = digits.len() == 8 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    u32::from_str_radix(digits, 16).ok().filter(|_| is_count)
}

/// The parameters of a Digest field, names in lower case; `None` for what is none, or says something twice.
fn parameters(field: &str) -> Option<BTreeMap<String, String>> {
    let (scheme, mut rest) = field.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("digest") {
        return None;
    }
    let mut given = BTreeMap::new();
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        if rest.is_empty() {
            return Some(given);
        }
        let (name, behind) = rest.split_once('=')?;
        let (value, behind) = match behind.trim_start().strip_prefix('"') {
            Some(quoted) => unquoted(quoted)?,
            None => {
                let (value, behind) = behind.split_at(behind.find(',').unwrap_or(behind.len()));
                (value.trim().to_owned(), behind)
            }
        };
        if given.insert(name.trim().to_ascii_lowercase(), value).is_some() {
            return None;
        }
        rest = behind;
    }
}

/// A quoted string (RFC 9110 section 5.6.4) without its first quote, and what follows it.
fn unquoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut letters = text.char_indices();
    while let Some((at, letter)) = letters.next() {
        match letter {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => value.push(letters.next()?.1),
            other => value.push(other),
        }
    }
    None
}

fn quoted(text: &str) -> String {
    let escaped = text.replace('\\', "\\\\").replace('"', "\\\"");
    format!("\"{escaped}\"")
}

/// MD5 of the parts with colons between them, in hexadecimal.
fn hash(parts: &[&str]) -> String {
    hex(&md5(parts.join(":").as_bytes()))
}

fn octets((millis, random): Nonce) -> [u8; 16] {
    (u128::from(millis) << 64 | u128::from(random)).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn users() -> BTreeMap<String, String> {
        let line = |user: &str, realm: &str, password: &str| {
            (format!("{user}:{realm}"), hash(&[user, realm, password]))
        };
        [line("Mufasa", "http-auth@example.org", "Circle of Life"), line("a\"b", "r\\s", "x")].into()
    }

    fn nonce_of(challenge: &str) -> String {
        parameters(challenge).unwrap()["nonce"].clone()
    }

    /// As a client answers; `change` replaces one piece of the field by another.
    fn answer(nonce: &str, nc: &str, change: (&str, &str)) -> String {
        let ha1 = hash(&["Mufasa", "http-auth@example.org", "Circle of Life"]);
        let ha2 = hash(&["GET", "/dir/index.html?a=1,b"]);
        let response = hash(&[&ha1, nonce, nc, "f2/wE4q74E6zIJEtWaHKaf5wv/H5QzzpXusqGemxURZJ", "auth", &ha2]);
        let field = format!(
            "Digest username=\"Mufasa\", realm=\"http-auth@example.org\", uri=\"/dir/index.html?a=1,b\", algorithm=MD5, \
             nonce=\"{nonce}\", nc={nc}, cnonce=\"f2/wE4q74E6zIJEtWaHKaf5wv/H5QzzpXusqGemxURZJ\", qop=auth, \
             response=\"{response}\", opaque=\"x\""
        );
        assert!(field.contains(change.0));
        field.replacen(change.0, change.1, 1)
    }

    fn asked(users: &BTreeMap<String, String>) -> Asked<'_> {
        Asked { method: "GET", target: "/dir/index.html?a=1,b", realm: "http-auth@example.org", users }
    }

    /// The example of RFC 7616 section 3.9.1, its MD5 answer.
    #[test]
    fn the_answer_is_that_of_the_rfc() {
        let ha1 = hash(&["Mufasa", "http-auth@example.org", "Circle of Life"]);
        let (nonce, cnonce) =
            ("7ypf/xlj9XXwfDPEoM4URrv/xwf94BcCAzFZH4GiTo0v", "f2/wE4q74E6zIJEtWaHKaf5wv/H5QzzpXusqGemxURZJ");
        let made = hash(&[&ha1, nonce, "00000001", cnonce, "auth", &hash(&["GET", "/dir/index.html"])]);
        assert_eq!(made, "8ca523f5e9506fed4657c9700eebdbec");
    }

    #[test]
    fn the_right_answer_passes_once() {
        let (nonces, users) = (Nonces::default(), users());
        let nonce = nonce_of(&nonces.challenge("http-auth@example.org", false));
        let check = |nc: &str| nonces.check(&asked(&users), &answer(&nonce, nc, ("", "")));
        assert_eq!(check("00000001"), Verdict::Pass);
        assert_eq!(check("00000001"), Verdict::Stale, "overheard");
        assert_eq!(
            [check("00000003"), check("00000002"), check("00000002")],
            [Verdict::Pass, Verdict::Pass, Verdict::Stale]
        );
        assert_eq!(
            [check("00000100"), check("00000050"), check("000000c1")],
            [Verdict::Pass, Verdict::Stale, Verdict::Pass]
        );
        assert_eq!([check("00000000"), check("1"), check("+0000101")], [Verdict::Stale; 3]);
    }

    #[test]
    fn anything_else_is_wrong() {
        let (nonces, users) = (Nonces::default(), users());
        let nonce = nonce_of(&nonces.challenge("http-auth@example.org", false));
        for change in [
            ("Mufasa", "Scar"),
            ("realm=\"http-auth@", "realm=\"other@"),
            ("index.html", "other.html"),
            ("=MD5", "=SHA-256"),
            ("qop=auth", "qop=auth-int"),
            (", qop=auth", ""),
            ("cnonce=\"f", "cnonce=\"g"),
            ("nc=00000001", "nc=00000002"),
            ("response=\"", "response=\"0"),
            ("Digest ", "Basic "),
            ("opaque=\"x\"", "opaque=\"x"),
            ("opaque=\"x\"", "username=\"Mufasa\""),
        ] {
            let field = answer(&nonce, "00000001", change);
            assert_eq!(nonces.check(&asked(&users), &field), Verdict::Wrong, "{field}");
        }
        let field = answer(&nonce, "00000001", ("", ""));
        for other in [Asked { method: "POST", ..asked(&users) }, Asked { target: "/", ..asked(&users) }] {
            assert_eq!(nonces.check(&other, &field), Verdict::Wrong);
        }
        assert_eq!(nonces.check(&asked(&users), &field), Verdict::Pass, "nothing was used up by these");
    }

    #[test]
    fn a_nonce_of_another_process_realm_or_time_is_stale() {
        let (nonces, users) = (Nonces::default(), users());
        let foreign = nonce_of(&Nonces::default().challenge("http-auth@example.org", false));
        let of_realm = nonce_of(&nonces.challenge("other", false));
        for nonce in [foreign.as_str(), &of_realm, "", "zz", &"é".repeat(16)] {
            let verdict = nonces.check(&asked(&users), &answer(nonce, "00000001", ("", "")));
            assert_eq!(verdict, Verdict::Stale, "{nonce}");
        }
        let nonce = nonce_of(&nonces.challenge("http-auth@example.org", true));
        let at = |after, nc| {
            nonces.check_at(
                &asked(&users),
                &answer(&nonce, nc, ("", "")),
                Instant::now() + Duration::from_secs(after),
            )
        };
        assert_eq!([at(50, "00000001"), at(62, "00000002")], [Verdict::Pass, Verdict::Stale]);
    }

    #[test]
    fn a_user_of_one_realm_is_none_of_another_that_ends_like_it() {
        let nonces = Nonces::default();
        let ha1 = hash(&["ann", "Staff:Cellar", "x"]);
        let users = BTreeMap::from([("ann:Staff:Cellar".to_owned(), ha1.clone())]);
        let verdict = |user: &str, realm: &str| {
            let nonce = nonce_of(&nonces.challenge(realm, false));
            let response = hash(&[&ha1, &nonce, "00000001", "c", "auth", &hash(&["GET", "/"])]);
            let field = format!(
                "Digest username=\"{user}\", realm=\"{realm}\", nonce=\"{nonce}\", uri=\"/\", nc=00000001, cnonce=\"c\", \
                 qop=auth, response=\"{response}\""
            );
            nonces.check(&Asked { method: "GET", target: "/", realm, users: &users }, &field)
        };
        assert_eq!(verdict("ann", "Staff:Cellar"), Verdict::Pass);
        assert_eq!(verdict("ann:Staff", "Cellar"), Verdict::Wrong);
    }

    #[test]
    fn what_is_remembered_is_bounded_and_what_was_forgotten_is_not_good_again() {
        let mut used = Used::default();
        let most = u64::try_from(MAX_USED).unwrap();
        assert!((0..most).all(|n| used.take((5, n), 1, 5)));
        assert!(used.take((5, most), 1, 5) && used.counts.len() == MAX_USED);
        assert!(!used.take((5, 0), 1, 5) && !used.take((5, 0), 2, 5) && used.take((5, 1), 2, 5));
        assert!(used.take((70_000, 0), 1, 70_000) && used.counts.len() == 1, "those of before are over");
    }

    #[test]
    fn quotes_in_names_are_the_clients_to_escape() {
        let (nonces, users) = (Nonces::default(), users());
        let challenge = nonces.challenge("r\\s", false);
        assert_eq!(parameters(&challenge).unwrap()["realm"], "r\\s");
        let nonce = nonce_of(&challenge);
        let response =
            hash(&[&hash(&["a\"b", "r\\s", "x"]), &nonce, "00000001", "c", "auth", &hash(&["GET", "/"])]);
        let field = format!(
            "digest username=\"a\\\"b\",realm=\"r\\\\s\",nonce=\"{nonce}\",uri=\"/\",nc=00000001,cnonce=\"c\",qop=\"auth\",response={response}"
        );
        let asked = Asked { method: "GET", target: "/", realm: "r\\s", users: &users };
        assert_eq!(nonces.check(&asked, &field), Verdict::Pass);
    }
}
