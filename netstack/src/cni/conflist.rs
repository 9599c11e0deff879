//! The network configuration list that container runtimes read: what it says, keeping it in place, and whose
//! lie beside it.
//!
//! Its appearance makes the kubelet call the node Ready, so it is written last, atomically, and only when ADD can work.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::files::{self, Outlives};

/// Runtimes take the first file in lexical order; `05` comes before what other installers usually write (`10-...`).
pub const FILE_NAME: &str = "05-weft.conflist";
/// containerd 1.6 brings libcni 1.1, which knows specifications up to 1.0.0 and reads only this field.
const CNI_VERSION: &str = "1.0.0";
/// Runtimes of CNI 1.1 take the highest of these that they know; without it they would never send STATUS and GC.
const CNI_VERSIONS: [&str; 2] = ["1.0.0", "1.1.0"];

#[derive(Debug, thiserror::Error)]
pub enum ConflistError {
    #[error("read {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("write {path}")]
    Write { path: PathBuf, source: io::Error },
    #[error("remove {path}")]
    Remove { path: PathBuf, source: io::Error },
}

/// Configurations of others that runtimes read, by file name, in lexical order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Others {
    /// Runtimes take the first of these instead of ours.
    pub before: Vec<String>,
    /// Not taken while ours is there.
    pub after: Vec<String>,
}

/// The list for a plugin that finds the agent at `socket`. A runtime passes on what a capability names
/// (`runtimeConfig.portMappings`, `runtimeConfig.bandwidth`).
pub fn render(socket: &Path) -> String {
    let list = json!({
        "cniVersion": CNI_VERSION,
        "cniVersions": CNI_VERSIONS,
        "name": "weft",
        "plugins": [{ "type": "weft", "socket": socket, "capabilities": { "bandwidth": true, "portMappings": true } }],
    });
    format!("{list:#}\n")
}

/// Makes `folder/05-weft.conflist` hold `text`; false when it did already.
pub fn ensure(folder: &Path, text: &str) -> Result<bool, ConflistError> {
    let path = folder.join(FILE_NAME);
    let present = fs::read_to_string(&path).is_ok_and(|present| present == text);
    if !present {
        write_atomically(folder, &path, text)
            .map_err(|source| ConflistError::Write { path: path.clone(), source })?;
    }
    Ok(!present)
}

/// Whether runtimes find ours now, whatever it holds.
pub fn present(folder: &Path) -> bool {
    folder.join(FILE_NAME).exists()
}

/// True when it was there.
pub fn remove(folder: &Path) -> Result<bool, ConflistError> {
    let path = folder.join(FILE_NAME);
    match fs::remove_file(&path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(ConflistError::Remove { path, source }),
    }
}

/// The temporary name begins with a dot and ends in no suffix that runtimes read.
fn write_atomically(folder: &Path, path: &Path, text: &str) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    let temporary = folder.join(format!(".weft-{}.tmp", std::process::id()));
    files::replace(path, &temporary, 0o666, text.as_bytes(), Outlives::PowerCut)
}

/// libcni reads `.conf`, `.conflist` and `.json`, in lexical order. A list that calls plugin `weft` itself (with others after
/// it, or from within a plugin that multiplies networks) is no rival: it counts as `after`, wherever it stands.
pub fn others(folder: &Path) -> Result<Others, ConflistError> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Others::default()),
        Err(source) => return Err(ConflistError::Read { path: folder.to_owned(), source }),
    };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let read_by_runtimes = |name: &String| {
        matches!(Path::new(name).extension().and_then(|e| e.to_str()), Some("conf" | "conflist" | "json"))
    };
    let mut names: Vec<String> = names.filter(read_by_runtimes).filter(|name| name != FILE_NAME).collect();
    names.sort();
    let (before, after) =
        names.into_iter().partition(|name| name.as_str() < FILE_NAME && !calls_weft(&folder.join(name)));
    Ok(Others { before, after })
}

fn calls_weft(path: &Path) -> bool {
    let list = fs::read(path).ok().and_then(|text| serde_json::from_slice(&text).ok());
    list.is_some_and(|list: Value| names_weft(&list))
}

fn names_weft(value: &Value) -> bool {
    match value {
        Value::Object(fields) => {
            fields.get("type").is_some_and(|it| it == "weft") || fields.values().any(names_weft)
        }
        Value::Array(values) => values.iter().any(names_weft),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_written_once_and_removed_once() {
        let folder = tempfile::tempdir().unwrap();
        let net_d = folder.path().join("cni/net.d");
        let text = render(Path::new("/run/weft/agent.sock"));
        assert!(ensure(&net_d, &text).unwrap());
        assert!(!ensure(&net_d, &text).unwrap());
        let names: Vec<_> = fs::read_dir(&net_d).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, [FILE_NAME]);
        assert!(remove(&net_d).unwrap());
        assert!(!remove(&net_d).unwrap());
    }

    #[test]
    fn the_list_names_the_plugin_and_the_socket() {
        let list: serde_json::Value = serde_json::from_str(&render(Path::new("/a b/x.sock"))).unwrap();
        let plugin = json!({"type": "weft", "socket": "/a b/x.sock", "capabilities": {"bandwidth": true, "portMappings": true}});
        assert_eq!(
            list,
            json!({"cniVersion": "1.0.0", "cniVersions": ["1.0.0", "1.1.0"], "name": "weft", "plugins": [plugin]})
        );
    }

    #[test]
    fn the_lists_of_others_are_told_apart_by_what_runtimes_take_first() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(others(&folder.path().join("missing")).unwrap(), Others::default());
        let chained = json!({"plugins": [{"type": "weft"}, {"type": "tuning"}]}).to_string();
        let texts = [
            ("10-flannel.conflist", "{}"),
            ("00-readme.txt", "{}"),
            ("04-calico.conflist", "{}"),
            ("01-old.conf", "not JSON"),
            ("02-chained.conflist", &chained),
            (FILE_NAME, "{}"),
        ];
        for (name, text) in texts {
            fs::write(folder.path().join(name), text).unwrap();
        }
        let found = others(folder.path()).unwrap();
        assert_eq!(found.before, ["01-old.conf", "04-calico.conflist"]);
        assert_eq!(found.after, ["02-chained.conflist", "10-flannel.conflist"]);
    }
}
