//! `weft cni`: what a container runtime runs. The environment and standard input in, CNI's JSON out; everything
//! else happens in the agent.

use std::io::{Read as _, Write as _};
use std::process::ExitCode;

use weft_netstack::cni::plugin;

/// Exit status 1 with an error object on standard output when the operation failed (CNI specification, section 2).
pub(crate) fn run() -> ExitCode {
    let mut stdin = Vec::new();
    // What cannot be read is no JSON either, and is reported as that.
    let _ = std::io::stdin().lock().read_to_end(&mut stdin);
    let printed = plugin::execute(&|name| std::env::var(name).ok(), &String::from_utf8_lossy(&stdin));
    let written = std::io::stdout().lock().write_all(printed.stdout.as_bytes());
    if printed.failed || written.is_err() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
