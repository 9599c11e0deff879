//! Names and newtypes. A name says what it names; two addresses of different roles never mix.

use std::cell::RefCell;
use std::cmp::Ordering;
use std::fmt;
use std::sync::Arc;

use base64::Engine as _;
use serde::{Deserialize, Serialize};

/// `metadata.name` of a Node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NodeName(pub Box<str>);

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<&str> for NodeName {
    fn from(name: &str) -> Self {
        Self(name.into())
    }
}

/// Namespace and name of a namespaced object; prints and serialises as `namespace/name`, so that it can be a JSON key.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NamespacedName {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

thread_local! {
    /// Objects come sorted by namespace, and one name is read more than once: the texts are shared.
    static LAST: RefCell<NamespacedName> =
        RefCell::new(NamespacedName { namespace: "".into(), name: "".into() });
}

impl NamespacedName {
    pub fn new(namespace: impl AsRef<str>, name: impl AsRef<str>) -> Self {
        LAST.with_borrow_mut(|last| {
            if *last.namespace != *namespace.as_ref() {
                last.namespace = namespace.as_ref().into();
            }
            if *last.name != *name.as_ref() {
                last.name = name.as_ref().into();
            }
            last.clone()
        })
    }
}

/// By namespace, then by name. Big maps have these keys, and text that is shared need not be read.
impl Ord for NamespacedName {
    fn cmp(&self, other: &Self) -> Ordering {
        let text = |a: &Arc<str>, b: &Arc<str>| if Arc::ptr_eq(a, b) { Ordering::Equal } else { a.cmp(b) };
        text(&self.namespace, &other.namespace).then_with(|| text(&self.name, &other.name))
    }
}

impl PartialOrd for NamespacedName {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for NamespacedName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl Serialize for NamespacedName {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for NamespacedName {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let (namespace, name) =
            text.split_once('/').ok_or_else(|| serde::de::Error::custom("expected namespace/name"))?;
        Ok(Self::new(namespace, name))
    }
}

pub type ServiceKey = NamespacedName;
pub type PodKey = NamespacedName;
/// Key of a NetworkPolicy.
pub type PolicyKey = NamespacedName;
/// Key of an EndpointSlice.
pub type SliceKey = NamespacedName;

/// Number of a Snapshot; grows by one with every change, never goes back within one process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Generation(pub u64);

impl Generation {
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}", self.0)
    }
}

/// A Curve25519 public key; prints and parses as standard base64, as `wg` does.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WgPublicKey(pub [u8; 32]);

/// A text that is not 32 bytes of standard base64.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("a WireGuard public key is 32 bytes in standard base64 (44 characters)")]
pub struct InvalidKey;

impl std::str::FromStr for WgPublicKey {
    type Err = InvalidKey;

    fn from_str(text: &str) -> Result<Self, InvalidKey> {
        let bytes = base64::engine::general_purpose::STANDARD.decode(text).map_err(|_| InvalidKey)?;
        bytes.try_into().map(Self).map_err(|_| InvalidKey)
    }
}

impl fmt::Display for WgPublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&base64::engine::general_purpose::STANDARD.encode(self.0))
    }
}

impl fmt::Debug for WgPublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WgPublicKey({self})")
    }
}

impl Serialize for WgPublicKey {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for WgPublicKey {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_in_the_order_of_their_namespaces_and_share_their_text() {
        let key = NamespacedName::new;
        let mut keys = [key("b", "a"), key("a-b", "z"), key("a", "c"), key("a", "b"), key("a", "b")];
        keys.sort();
        assert_eq!(
            keys.iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["a/b", "a/b", "a/c", "a-b/z", "b/a"]
        );
        assert!(Arc::ptr_eq(&keys[0].name, &keys[1].name));
        assert!(Arc::ptr_eq(&keys[0].namespace, &keys[2].namespace));
        assert_eq!(keys[0].cmp(&keys[1]), Ordering::Equal);
        assert_eq!(keys[0].cmp(&keys[0].clone()), Ordering::Equal);
    }

    #[test]
    fn a_public_key_prints_as_it_was_written() {
        let text = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=";
        assert_eq!(text.parse::<WgPublicKey>().map(|key| key.to_string()), Ok(text.to_owned()));
        assert_eq!("short".parse::<WgPublicKey>(), Err(InvalidKey));
    }
}
