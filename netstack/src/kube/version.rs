//! Which API servers are new enough: the answer of `/version` in, a verdict out. Pure.

use k8s_openapi::apimachinery::pkg::version::Info;

use super::failure::Address;

/// 1.30 is the first with `ValidatingAdmissionPolicy` v1 and with the node's name in a pod's token (KEP-3488, KEP-4193):
/// without them nothing keeps an agent to its own Node.
const FLOOR: (u32, u32) = (1, 30);

/// What an API server said of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServerVersion {
    Supported(String),
    TooOld(String),
    /// It does not say, or not in a form that is known; it is used like a supported one.
    Unknown(String),
}

impl ServerVersion {
    pub fn of(info: &Info) -> Self {
        let text = info.git_version.trim().to_owned();
        match number(&info.major).zip(number(&info.minor)).or_else(|| of_git(&text)) {
            Some(found) if found < FLOOR => Self::TooOld(text),
            Some(_) => Self::Supported(text),
            None => Self::Unknown(text),
        }
    }

    pub fn text(&self) -> &str {
        match self {
            Self::Supported(text) | Self::TooOld(text) | Self::Unknown(text) => text,
        }
    }

    /// One line with the remedy, when it is too old.
    pub fn refusal(&self, server: &Address) -> Option<String> {
        let Self::TooOld(text) = self else { return None };
        let (major, minor) = FLOOR;
        Some(format!(
            "API server {server} is of Kubernetes {text}, Weft needs {major}.{minor} or newer: upgrade the control plane"
        ))
    }
}

/// Vendors write `30+`.
fn number(text: &str) -> Option<u32> {
    text.trim().trim_end_matches('+').parse().ok()
}

/// `v1.30.4-eks-036c24b`
fn of_git(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.trim_start_matches('v').split('.');
    Some((number(parts.next()?)?, number(parts.next()?)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(major: &str, minor: &str, git_version: &str) -> Info {
        let (major, minor, git_version) = (major.to_owned(), minor.to_owned(), git_version.to_owned());
        Info { major, minor, git_version, ..Info::default() }
    }

    #[test]
    fn the_floor_divides_and_what_cannot_be_read_is_no_error() {
        let of = |major, minor, git| ServerVersion::of(&info(major, minor, git));
        assert_eq!(of("1", "29", "v1.29.15"), ServerVersion::TooOld("v1.29.15".into()));
        assert_eq!(of("1", "30", "v1.30.0"), ServerVersion::Supported("v1.30.0".into()));
        assert_eq!(of("1", "37+", "v1.37.2-gke.5"), ServerVersion::Supported("v1.37.2-gke.5".into()));
        assert_eq!(of("", "", "v1.28.3+k3s1"), ServerVersion::TooOld("v1.28.3+k3s1".into()));
        assert_eq!(of("2", "0", "v2.0.0"), ServerVersion::Supported("v2.0.0".into()));
        assert_eq!(of("", "", "main"), ServerVersion::Unknown("main".into()));
        assert_eq!(of("one", "", ""), ServerVersion::Unknown(String::new()));
    }
}
