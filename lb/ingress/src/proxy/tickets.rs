//! Session tickets (RFC 8446 4.6.1, RFC 5077): sealed with keys that every thread shares and that outlive the process, so that a
//! client resumes its session after a restart.
//!
//! The keys stand in `ingress/tickets.key` of the run directory, in memory only after a reboot, for nobody but the user of this
//! process. A key seals for six hours and opens for twelve. A file that cannot be read or written costs the resumption of sessions
//! over a restart and nothing else.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _, fchown};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ring::aead::{self, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::digest::{SHA256, SHA256_OUTPUT_LEN, digest};
use ring::rand::{SecureRandom as _, SystemRandom};
use rustls::server::ProducesTickets;
use weft_model::constants::INGRESS_USER;

/// In [`crate::apply::FOLDER`].
pub(super) const TICKETS_FILE: &str = "tickets.key";
const SEALS: Duration = Duration::from_secs(6 * 60 * 60);
const OPENS: Duration = Duration::from_secs(12 * 60 * 60);
const SECRET_LEN: usize = 32;
const NAME_LEN: usize = 16;
/// When it was made, in seconds since the epoch, and the secret.
const RECORD_LEN: usize = 8 + SECRET_LEN;
/// The newest key, the one before, a digest of both.
const FILE_LEN: usize = 2 * RECORD_LEN + SHA256_OUTPUT_LEN;
/// Of a ticket; ours are of a few hundred bytes.
const MAX_TICKET_BYTES: usize = 4096;

/// Makes the file where there is none, for the user that the process becomes; root's part.
///
/// # Errors
/// It cannot be made.
pub(super) fn prepare(path: &Path) -> io::Result<()> {
    match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
        // Without root there is one user only.
        Ok(file) if file.metadata()?.uid() == 0 => fchown(&file, Some(INGRESS_USER), Some(INGRESS_USER)),
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

pub(super) struct Tickets {
    keys: Mutex<Keys>,
    random: SystemRandom,
    file: Option<File>,
    now: fn() -> Duration,
}

/// The newest, which seals, and the one before.
struct Keys {
    newest: Key,
    before: Option<Key>,
}

struct Key {
    made: Duration,
    secret: [u8; SECRET_LEN],
    name: [u8; NAME_LEN],
    sealing: LessSafeKey,
}

impl std::fmt::Debug for Tickets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tickets")
    }
}

impl Key {
    fn new(made: Duration, secret: [u8; SECRET_LEN]) -> Option<Self> {
        let sealing = LessSafeKey::new(UnboundKey::new(&aead::CHACHA20_POLY1305, &secret).ok()?);
        let named = digest(&SHA256, &[b"name".as_slice(), &secret].concat());
        let name = named.as_ref().first_chunk().copied()?;
        Some(Self { made, secret, name, sealing })
    }

    fn fresh(random: &SystemRandom, now: Duration) -> Option<Self> {
        let mut secret = [0; SECRET_LEN];
        random.fill(&mut secret).ok()?;
        Self::new(now, secret)
    }

    fn record(&self) -> Vec<u8> {
        [self.made.as_secs().to_be_bytes().as_slice(), &self.secret].concat()
    }

    fn from_record(record: &[u8]) -> Option<Self> {
        let (made, secret) = record.split_first_chunk()?;
        Self::new(Duration::from_secs(u64::from_be_bytes(*made)), secret.try_into().ok()?)
    }

    /// A clock that was put back makes no key older.
    fn is_younger_than(&self, age: Duration, now: Duration) -> bool {
        now.saturating_sub(self.made) < age
    }
}

impl Tickets {
    /// With the keys of the process before, where `path` holds some. `None` when the system gives no random bytes.
    pub(super) fn open(path: &Path) -> Option<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path);
        let file = file.inspect_err(|error| {
            tracing::warn!(%error, path = %path.display(), "sessions are not resumed after a restart");
        });
        Self::new(file.ok(), wall_clock)
    }

    fn new(file: Option<File>, now: fn() -> Duration) -> Option<Self> {
        let random = SystemRandom::new();
        let keys = match file.as_ref().and_then(read) {
            Some(keys) => keys,
            None => {
                let keys = Keys { newest: Key::fresh(&random, now())?, before: None };
                write(file.as_ref(), &keys);
                keys
            }
        };
        Some(Self { keys: Mutex::new(keys), random, file, now })
    }

    /// Puts a new key before the newest when that has sealed long enough.
    fn rotate(&self, keys: &mut Keys) {
        let now = (self.now)();
        if keys.newest.is_younger_than(SEALS, now) {
            return;
        }
        let Some(fresh) = Key::fresh(&self.random, now) else { return };
        keys.before = Some(std::mem::replace(&mut keys.newest, fresh));
        write(self.file.as_ref(), keys);
    }
}

fn wall_clock() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// What an earlier process wrote, whole.
fn read(file: &File) -> Option<Keys> {
    let mut bytes = [0; FILE_LEN];
    file.read_exact_at(&mut bytes, 0).ok()?;
    let (records, told) = bytes.split_at(2 * RECORD_LEN);
    if digest(&SHA256, records).as_ref() != told {
        return None;
    }
    let (newest, before) = records.split_at(RECORD_LEN);
    let is_there = before.iter().any(|byte| *byte != 0);
    Some(Keys {
        newest: Key::from_record(newest)?,
        before: is_there.then(|| Key::from_record(before)).flatten(),
    })
}

fn write(file: Option<&File>, keys: &Keys) {
    let Some(file) = file else { return };
    let before = keys.before.as_ref().map_or_else(|| vec![0; RECORD_LEN], Key::record);
    let mut bytes = [keys.newest.record(), before].concat();
    bytes.extend_from_slice(digest(&SHA256, &bytes).as_ref());
    if let Err(error) = file.write_all_at(&bytes, 0) {
        tracing::warn!(%error, "the keys of session tickets cannot be written");
    }
}

impl ProducesTickets for Tickets {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        u32::try_from(SEALS.as_secs()).unwrap_or(u32::MAX)
    }

    /// Name of the key, nonce, sealed text with its tag.
    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        let mut nonce = [0; NONCE_LEN];
        self.random.fill(&mut nonce).ok()?;
        let mut keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        self.rotate(&mut keys);
        let key = &keys.newest;
        let mut text = plain.to_vec();
        let sealed = Nonce::assume_unique_for_key(nonce);
        key.sealing.seal_in_place_append_tag(sealed, Aad::from(key.name), &mut text).ok()?;
        Some([key.name.as_slice(), &nonce, &text].concat())
    }

    fn decrypt(&self, ticket: &[u8]) -> Option<Vec<u8>> {
        if ticket.len() > MAX_TICKET_BYTES {
            return None;
        }
        let (name, rest) = ticket.split_first_chunk::<NAME_LEN>()?;
        let (nonce, sealed) = rest.split_first_chunk::<NONCE_LEN>()?;
        let keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        let now = (self.now)();
        let mut known = std::iter::once(&keys.newest).chain(&keys.before);
        let key = known.find(|key| key.name == *name && key.is_younger_than(OPENS, now))?;
        let mut text = sealed.to_vec();
        let nonce = Nonce::assume_unique_for_key(*nonce);
        let length = key.sealing.open_in_place(nonce, Aad::from(*name), &mut text).ok()?.len();
        text.truncate(length);
        Some(text)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    #[test]
    fn a_ticket_of_one_process_is_opened_by_the_next_and_by_nobody_without_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(TICKETS_FILE);
        prepare(&path).unwrap();
        let ticket = Tickets::open(&path).unwrap().encrypt(b"session").unwrap();
        prepare(&path).unwrap();
        let next = Tickets::open(&path).unwrap();
        assert_eq!(next.decrypt(&ticket).as_deref(), Some(&b"session"[..]));
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600, "nobody else reads it");
        assert_eq!(Tickets::new(None, wall_clock).unwrap().decrypt(&ticket), None);
        for at in 0..ticket.len() {
            let mut changed = ticket.clone();
            changed[at] ^= 1;
            assert_eq!(next.decrypt(&changed), None);
        }
        assert_eq!(next.decrypt(b""), None);
        assert_eq!(next.decrypt(&[0; 5000]), None);
    }

    #[test]
    fn a_damaged_file_gives_new_keys() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(TICKETS_FILE);
        prepare(&path).unwrap();
        let ticket = Tickets::open(&path).unwrap().encrypt(b"session").unwrap();
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[10] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        let next = Tickets::open(&path).unwrap();
        assert_eq!(next.decrypt(&ticket), None);
        let ticket = next.encrypt(b"session").unwrap();
        assert!(Tickets::open(&path).unwrap().decrypt(&ticket).is_some(), "which are written");
    }

    #[test]
    fn keys_seal_for_six_hours_and_open_for_twelve() {
        static HOURS: AtomicU64 = AtomicU64::new(1000);
        let now = || Duration::from_secs(HOURS.load(Ordering::Relaxed) * 3600);
        let tickets = Tickets::new(None, now).unwrap();
        let first = tickets.encrypt(b"first").unwrap();
        HOURS.store(1007, Ordering::Relaxed);
        let second = tickets.encrypt(b"second").unwrap();
        assert_ne!(first[..NAME_LEN], second[..NAME_LEN]);
        assert!(tickets.decrypt(&first).is_some() && tickets.decrypt(&second).is_some());
        HOURS.store(1012, Ordering::Relaxed);
        assert!(tickets.decrypt(&first).is_none() && tickets.decrypt(&second).is_some());
    }
}
