//! Hands the table of routes to the process `weft ingress`: a file that is whole or absent, and a word on its socket.
//!
//! In: [`RouteTable`]. Outside: `ingress/routes.json` in the run directory, which the process reads at its start and whenever it
//! is told so (`POST /apply` on `ingress/ingress.sock`): a line with a whole table and a line for each change since, so that a
//! host among ten thousand is written and read alone. What is whole is there by a rename; a line is added by one write. Folder and file belong to root; of others only the group of that process
//! reads them, because private keys stand in the file, and nobody but root writes them.

use std::fs::{File, Metadata};
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, chown, fchown};
use std::path::{Path, PathBuf};

use weft_model::constants::INGRESS_USER;
use weft_netstack::control;
use weft_netstack::reconcile::{Applied, Applier, Trust, chain};

use crate::plan::table::RouteTable;

/// Folder in the run directory, and what stands in it.
pub const FOLDER: &str = "ingress";
pub const ROUTES_FILE: &str = "routes.json";
pub const SOCKET_FILE: &str = "ingress.sock";

/// Of changes in the file beyond what the whole table takes, before it is written anew.
const LEEWAY_BYTES: u64 = 1 << 20;

#[derive(Debug, thiserror::Error)]
pub enum RoutesError {
    #[error("encode {ROUTES_FILE}")]
    Encode(#[source] serde_json::Error),
    #[error("write {path}")]
    Write { path: PathBuf, source: std::io::Error },
    #[error(
        "tell the ingress on {path}: is `weft ingress` running? `weft install` makes it a service (systemctl start weft-ingress)"
    )]
    Tell { path: PathBuf, source: std::io::Error },
}

/// The folder of both processes, whichever comes first: root writes, the group of `weft ingress` reads, nobody else enters.
///
/// # Errors
/// It cannot be made.
pub fn folder(run_dir: &Path) -> std::io::Result<PathBuf> {
    let folder = run_dir.join(FOLDER);
    std::fs::create_dir_all(&folder)?;
    // Without root there is one user only.
    if folder.metadata()?.uid() == 0 {
        chown(&folder, None, Some(INGRESS_USER))?;
    }
    std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o750))?;
    Ok(folder)
}

/// For an agent that serves no Ingress: what an earlier one wrote is served no longer.
///
/// # Errors
/// The file is there and cannot be replaced. A process that is away needs no word.
pub async fn withdraw(run_dir: &Path) -> Result<(), RoutesError> {
    let path = run_dir.join(FOLDER).join(ROUTES_FILE);
    if !path.exists() {
        return Ok(());
    }
    let mut applier = RoutesApplier::new(run_dir);
    match applier.hand_over(&RouteTable::default(), Trust::Nothing, &mut Vec::new()).await {
        Err(RoutesError::Tell { .. }) => Ok(()),
        outcome => outcome,
    }
}

/// Owner of the routes file.
pub struct RoutesApplier {
    run_dir: PathBuf,
    written: Option<Written>,
    /// The process did not take what was written last: one of the version before knows no lines.
    untold: bool,
}

/// The file as it was left, and what it holds.
struct Written {
    table: RouteTable,
    file: File,
    /// Of the whole table, and with the changes.
    bytes: (u64, u64),
}

impl Written {
    /// Whether the path leads to this file still and nobody else wrote to it.
    fn stands_at(&self, path: &Path) -> bool {
        let of = |found: Metadata| (found.dev(), found.ino(), found.len());
        let (ours, found) = (self.file.metadata().map(of), path.metadata().map(of));
        ours.is_ok_and(|ours| ours.2 == self.bytes.1 && found.is_ok_and(|found| found == ours))
    }
}

impl RoutesApplier {
    pub fn new(run_dir: &Path) -> Self {
        Self { run_dir: run_dir.to_owned(), written: None, untold: false }
    }

    /// Says in `changed`, which is empty, what it did to the file.
    async fn hand_over(
        &mut self,
        table: &RouteTable,
        trust: Trust,
        changed: &mut Vec<String>,
    ) -> Result<(), RoutesError> {
        // Forgotten until all is well, so that the next pass writes the whole.
        let written = self.written.take();
        let written = match written.filter(|written| written.stands_at(&self.path())) {
            Some(written) if trust == Trust::Shadow => self.add(written, table, changed)?,
            _ => self.write(table, changed)?,
        };
        if !changed.is_empty() || trust == Trust::Nothing {
            self.untold = true;
            tell(&self.run_dir).await?;
            self.untold = false;
        }
        self.written = Some(written);
        Ok(())
    }

    fn path(&self) -> PathBuf {
        self.run_dir.join(FOLDER).join(ROUTES_FILE)
    }

    /// A line for what is another than in the file, unless that would keep what nobody is to have any more.
    fn add(
        &self,
        mut written: Written,
        table: &RouteTable,
        changed: &mut Vec<String>,
    ) -> Result<Written, RoutesError> {
        let Some(line) = table.encode_change(&written.table).map_err(RoutesError::Encode)? else {
            return Ok(written);
        };
        let (whole, all) = written.bytes;
        let all = all + line.len() as u64;
        if all > 2 * whole + LEEWAY_BYTES || table.withdraws_secrets_of(&written.table) {
            return self.write(table, changed);
        }
        let added = written.file.write_all(&line);
        added.map_err(|source| RoutesError::Write { path: self.path(), source })?;
        changed.push(format!("{ROUTES_FILE}: {} bytes more", line.len()));
        written.bytes.1 = all;
        written.table = table.clone();
        Ok(written)
    }

    /// The whole table, unless the file holds just that in a way that the process takes.
    fn write(&self, table: &RouteTable, changed: &mut Vec<String>) -> Result<Written, RoutesError> {
        let path = self.path();
        let cannot = |source| RoutesError::Write { path: path.clone(), source };
        let found = std::fs::read(&path).unwrap_or_default();
        let mut bytes = found.len() as u64;
        let unreadable = self.untold && found.contains(&b'\n');
        if unreadable || RouteTable::decode(&found).ok().as_ref() != Some(table) {
            let text = table.encode().map_err(RoutesError::Encode)?;
            replace(&self.run_dir, &text).map_err(cannot)?;
            bytes = text.len() as u64;
            changed.push(format!("{ROUTES_FILE}: {bytes} bytes"));
        }
        let file = File::options().append(true).open(&path).map_err(cannot)?;
        Ok(Written { table: table.clone(), file, bytes: (bytes, bytes) })
    }
}

impl Applier for RoutesApplier {
    type Plan = RouteTable;

    async fn apply(&mut self, plan: &RouteTable, trust: Trust) -> Applied {
        let mut applied = Applied { details: details(plan), ..Applied::default() };
        // A table that is not whole would take certificates away that are only being read; the one before stays meanwhile.
        if plan.waiting.is_empty() {
            let outcome = self.hand_over(plan, trust, &mut applied.changed).await;
            applied.failed.extend(outcome.err().map(|error| chain(&error)));
        }
        applied
    }
}

fn details(plan: &RouteTable) -> Vec<(String, String)> {
    let routes: usize = plan.hosts.values().map(|server| server.routes.len()).sum();
    let mut details = vec![
        ("hosts".to_owned(), plan.hosts.len().to_string()),
        ("routes".to_owned(), routes.to_string()),
        ("certificates".to_owned(), plan.certificates.len().to_string()),
    ];
    if !plan.waiting.is_empty() {
        let waiting: Vec<String> = plan.waiting.iter().map(ToString::to_string).collect();
        details.push(("reading".to_owned(), waiting.join(", ")));
    }
    details
}

/// The old content or the new, never a part, for nobody but the owner of the folder and its group.
fn replace(run_dir: &Path, content: &[u8]) -> std::io::Result<()> {
    let folder = folder(run_dir)?;
    let path = folder.join(ROUTES_FILE);
    let beside = path.with_extension("json.new");
    let mut file = File::options().write(true).create(true).truncate(true).mode(0o640).open(&beside)?;
    let folder = folder.metadata()?;
    fchown(&file, Some(folder.uid()), Some(folder.gid()))?;
    file.write_all(content)?;
    std::fs::rename(&beside, path)
}

/// A process that hangs must not hold up the runtime.
async fn tell(run_dir: &Path) -> Result<(), RoutesError> {
    let path = run_dir.join(FOLDER).join(SOCKET_FILE);
    let socket = path.clone();
    let asked = tokio::task::spawn_blocking(move || control::request(&socket, "POST", "/apply")).await;
    let answer = asked.unwrap_or_else(|error| Err(std::io::Error::other(error)));
    answer.map(|_| ()).map_err(|source| RoutesError::Tell { path, source })
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::unix::fs::PermissionsExt as _;
    use std::os::unix::net::UnixListener;

    use weft_model::NamespacedName;
    use weft_model::ingress::Reference;

    use super::*;

    /// Answers one question and returns it.
    fn listen(folder: &Path) -> std::thread::JoinHandle<String> {
        std::fs::create_dir_all(folder).unwrap();
        let socket = folder.join(SOCKET_FILE);
        let _ = std::fs::remove_file(&socket);
        let listener = UnixListener::bind(socket).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut asked = Vec::new();
            while !asked.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                stream.read_exact(&mut byte).unwrap();
                asked.extend(byte);
            }
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").unwrap();
            String::from_utf8_lossy(&asked).into_owned()
        })
    }

    #[tokio::test]
    async fn a_new_table_is_written_for_one_reader_and_told_once() {
        let run_dir = tempfile::tempdir().unwrap();
        let folder = run_dir.path().join(FOLDER);
        let asked = listen(&folder);
        let mut applier = RoutesApplier::new(run_dir.path());
        let table = RouteTable::default();
        let applied = applier.apply(&table, Trust::Nothing).await;
        assert_eq!((applied.changed.len(), applied.failed.as_slice()), (1, &[][..]));
        assert!(asked.join().unwrap().starts_with("POST /apply "));
        let path = folder.join(ROUTES_FILE);
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&folder), mode(&path)), (0o750, 0o640));
        assert_eq!(path.metadata().unwrap().gid(), folder.metadata().unwrap().gid());
        let read = RouteTable::decode(&std::fs::read(&path).unwrap()).unwrap();
        assert_eq!(read, table);
        assert_eq!(applier.apply(&table, Trust::Shadow).await.changed, [""; 0], "nobody is told again");
    }

    #[tokio::test]
    async fn an_agent_without_ingress_leaves_no_routes_and_makes_no_file() {
        let run_dir = tempfile::tempdir().unwrap();
        let path = run_dir.path().join(FOLDER).join(ROUTES_FILE);
        withdraw(run_dir.path()).await.unwrap();
        assert!(!path.exists());
        let table = RouteTable { addresses: vec!["10.0.0.2".parse().unwrap()], ..RouteTable::default() };
        RoutesApplier::new(run_dir.path()).apply(&table, Trust::Nothing).await;
        withdraw(run_dir.path()).await.unwrap();
        let read = RouteTable::decode(&std::fs::read(&path).unwrap()).unwrap();
        assert_eq!(read, RouteTable::default());
    }

    #[tokio::test]
    async fn a_process_that_is_away_is_named_and_the_file_is_there_for_its_start() {
        let run_dir = tempfile::tempdir().unwrap();
        let applied = RoutesApplier::new(run_dir.path()).apply(&RouteTable::default(), Trust::Nothing).await;
        assert!(applied.failed[0].contains("is `weft ingress` running?"), "{:?}", applied.failed);
        assert!(run_dir.path().join(FOLDER).join(ROUTES_FILE).exists());
    }

    #[tokio::test]
    async fn a_table_that_is_not_whole_is_not_handed_over() {
        let run_dir = tempfile::tempdir().unwrap();
        let waiting = [Reference::Secret(NamespacedName::new("d", "tls"))].into();
        let table = RouteTable { waiting, ..RouteTable::default() };
        let applied = RoutesApplier::new(run_dir.path()).apply(&table, Trust::Nothing).await;
        assert!(applied.failed.is_empty() && applied.changed.is_empty());
        assert!(applied.details.contains(&("reading".to_owned(), "Secret d/tls".to_owned())));
        assert!(!run_dir.path().join(FOLDER).exists());
    }
}
