//! The CNI plugin: the short-lived process that a container runtime starts. Environment and standard input in, one exchange with the
//! agent over its Unix socket, one JSON object out. Called as `loopback`, it does without the agent.
//!
//! ```text
//!  runtime --environment, stdin--> execute --HTTP over /run/weft/agent.sock--> the agent (weft-netstack's `cni::server`)
//!          <--JSON, exit status---         <---- the very text to print ------
//! ```
//!
//! It is a program of its own (`main.rs`), and a small one, because a runtime starts it for each pod twice: no runtime, no threads, and a C library
//! that starts at once (decision record 20). `weft cni` is the same in the one binary.
//!
//! Source: CNI specification 1.1.0, "Section 2: Execution Protocol".

pub mod loopback;
pub mod wire;

use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use serde_json::Value;

use wire::{CniError, CniRequest, Code, NEWEST_VERSION, SUPPORTED_VERSIONS, parse_args, versions};

/// Where the agent listens when the configuration has no `socket`.
pub const DEFAULT_SOCKET: &str = "/run/weft/agent.sock";
/// Longer than any ADD takes, shorter than runtimes wait (containerd: minutes).
const PATIENCE: Duration = Duration::from_secs(60);

/// What goes to standard output, and the exit status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Printed {
    pub stdout: String,
    pub failed: bool,
}

/// The whole process: exit status 1 with an error object on standard output when the operation failed.
pub fn run() -> ExitCode {
    let mut stdin = Vec::new();
    // What cannot be read is no JSON either, and is reported as that.
    let _ = io::stdin().lock().read_to_end(&mut stdin);
    let printed = execute(&|name| std::env::var(name).ok(), &String::from_utf8_lossy(&stdin));
    let written = io::stdout().lock().write_all(printed.stdout.as_bytes());
    if printed.failed || written.is_err() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// Does what the environment asks for. `environment` looks a variable up.
pub fn execute(environment: &dyn Fn(&str) -> Option<String>, stdin: &str) -> Printed {
    let config: Result<Value, CniError> = match stdin.trim() {
        "" => Ok(Value::Null),
        text => serde_json::from_str(text).map_err(|error| {
            CniError::new(
                Code::Decode,
                format!("the network configuration on standard input is no JSON: {error}"),
            )
        }),
    };
    let asked = config.as_ref().ok().and_then(|config| config.get("cniVersion")).and_then(Value::as_str);
    let version =
        SUPPORTED_VERSIONS.into_iter().find(|version| Some(*version) == asked).unwrap_or(NEWEST_VERSION);
    match command(environment, config) {
        Ok(stdout) => Printed { stdout, failed: false },
        Err(Failure::Ours(error)) => {
            Printed { stdout: format!("{:#}\n", error.render(version)), failed: true }
        }
        Err(Failure::Agents(stdout)) => Printed { stdout, failed: true },
    }
}

enum Failure {
    Ours(CniError),
    /// Already the text to print.
    Agents(String),
}

impl From<CniError> for Failure {
    fn from(error: CniError) -> Self {
        Self::Ours(error)
    }
}

fn command(
    environment: &dyn Fn(&str) -> Option<String>,
    config: Result<Value, CniError>,
) -> Result<String, Failure> {
    let variable = |name: &str| environment(name).unwrap_or_default();
    let verb = variable("CNI_COMMAND");
    let (path, needed): (_, &[&str]) = match verb.as_str() {
        "VERSION" => return Ok(format!("{:#}\n", versions())),
        "ADD" => ("/cni/add", &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"]),
        "CHECK" => ("/cni/check", &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"]),
        "DEL" => ("/cni/del", &["CNI_CONTAINERID", "CNI_IFNAME"]),
        "STATUS" => ("/cni/status", &[]),
        "GC" => ("/cni/gc", &[]),
        other => {
            let msg = format!("CNI_COMMAND {other:?} is none of ADD, DEL, CHECK, STATUS, GC, VERSION");
            return Err(CniError::new(Code::InvalidEnvironment, msg).into());
        }
    };
    let missing: Vec<&str> = needed.iter().copied().filter(|name| variable(name).is_empty()).collect();
    if !missing.is_empty() {
        let msg = format!("{verb} needs {} in the environment", missing.join(", "));
        return Err(CniError::new(Code::InvalidEnvironment, msg).into());
    }
    let config = config?;
    if config.get("type").and_then(Value::as_str) == Some(loopback::PLUGIN) {
        return Ok(loopback::execute(&verb, &variable("CNI_NETNS"), &config)?);
    }
    let request = CniRequest {
        container_id: variable("CNI_CONTAINERID"),
        ifname: variable("CNI_IFNAME"),
        netns: variable("CNI_NETNS"),
        args: parse_args(&variable("CNI_ARGS"))?,
        config,
    };
    request.version()?;
    let socket = request.config.get("socket").and_then(Value::as_str).unwrap_or(DEFAULT_SOCKET);
    ask_agent(Path::new(socket), path, &request)
}

fn ask_agent(socket: &Path, path: &str, request: &CniRequest) -> Result<String, Failure> {
    let body = serde_json::to_vec(request).map_err(|error| CniError::new(Code::Decode, error.to_string()))?;
    let (status, answer) =
        exchange(socket, path, &body).map_err(|error| unreachable_agent(socket, &error))?;
    match status {
        200 => Ok(answer),
        409 => Err(Failure::Agents(answer)),
        other => Err(CniError::new(Code::TryAgainLater, format!("the agent answered HTTP {other}"))
            .details(answer)
            .into()),
    }
}

fn unreachable_agent(socket: &Path, error: &io::Error) -> CniError {
    let socket = PathBuf::from(socket);
    CniError::new(Code::TryAgainLater, format!("weft agent does not answer on {}: {error}", socket.display()))
        .details("start it (systemctl start weft-agent) or look why it ended (journalctl -u weft-agent)")
}

/// One HTTP/1.1 request (RFC 9112) on a connection of its own: status and body.
fn exchange(socket: &Path, path: &str, body: &[u8]) -> io::Result<(u16, String)> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: weft\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(&[head.as_bytes(), body].concat())?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    parse_answer(&answer).ok_or_else(|| io::Error::new(io::ErrorKind::UnexpectedEof, "the answer is cut off"))
}

/// `None` when the head is incomplete or the body shorter than announced. Our agent always announces it.
fn parse_answer(bytes: &[u8]) -> Option<(u16, String)> {
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&bytes[..end]).ok()?;
    let body = &bytes[end + 4..];
    let mut lines = head.split("\r\n");
    let status = lines.next()?.split(' ').nth(1)?.parse().ok()?;
    let length: usize = lines
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .map_or(Some(body.len()), |(_, value)| value.trim().parse().ok())?;
    let text = String::from_utf8_lossy(body.get(..length)?).into_owned();
    Some((status, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(variables: &[(&str, &str)], stdin: &str) -> (Value, bool) {
        let find = |name: &str| {
            variables.iter().find(|(variable, _)| *variable == name).map(|(_, value)| (*value).to_owned())
        };
        let printed = execute(&find, stdin);
        (serde_json::from_str(&printed.stdout).unwrap(), printed.failed)
    }

    const CONFIG: &str =
        r#"{"cniVersion":"1.0.0","name":"weft","type":"weft","socket":"/nowhere/agent.sock"}"#;
    const ADD: [(&str, &str); 4] = [
        ("CNI_COMMAND", "ADD"),
        ("CNI_CONTAINERID", "a"),
        ("CNI_NETNS", "/run/netns/a"),
        ("CNI_IFNAME", "eth0"),
    ];

    #[test]
    fn version_needs_no_agent() {
        let (answer, failed) = run(&[("CNI_COMMAND", "VERSION")], "");
        assert!(!failed);
        assert_eq!(answer["supportedVersions"], serde_json::json!(["0.4.0", "1.0.0", "1.1.0"]));
    }

    #[test]
    fn what_is_wrong_with_the_environment_is_error_4() {
        let (answer, failed) = run(&[("CNI_COMMAND", "ADD"), ("CNI_NETNS", "/n")], CONFIG);
        assert_eq!((&answer["code"], failed), (&Value::from(4), true));
        assert_eq!(answer["msg"], "ADD needs CNI_CONTAINERID, CNI_IFNAME in the environment");
        assert_eq!(run(&[("CNI_COMMAND", "EAT")], CONFIG).0["code"], 4);
        assert_eq!(run(&[], CONFIG).0["code"], 4);
    }

    #[test]
    fn a_configuration_that_is_no_json_is_error_6_and_a_foreign_version_error_1() {
        assert_eq!(run(&ADD, "{").0["code"], 6);
        assert_eq!(run(&ADD, r#"{"cniVersion":"9.9.9"}"#).0["code"], 1);
    }

    #[test]
    fn a_missing_agent_is_error_11_with_the_remedy_in_the_version_asked() {
        let (answer, failed) = run(&ADD, CONFIG);
        assert_eq!((&answer["code"], &answer["cniVersion"], failed), (&11.into(), &"1.0.0".into(), true));
        assert!(answer["msg"].as_str().unwrap().contains("/nowhere/agent.sock"));
        assert!(answer["details"].as_str().unwrap().contains("weft-agent"));
    }

    #[test]
    fn an_answer_that_is_cut_off_is_no_answer() {
        let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}";
        assert_eq!(parse_answer(answer), Some((200, "{}".to_owned())));
        assert_eq!(parse_answer(&answer[..answer.len() - 1]), None);
        assert_eq!(parse_answer(b"HTTP/1.1 200 OK\r\n"), None);
        assert_eq!(parse_answer(b"HTTP/1.1 409 X\r\n\r\n"), Some((409, String::new())));
    }
}
