//! The service manager of this host: found, and told what to do.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use anyhow::{Context as _, bail, ensure};

use super::plan::{Call, ServiceManager};

/// Where the programs of any host's service manager are; a container's environment says nothing about that.
const HOST_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// sd_booted(3), and what OpenRC makes at boot.
pub(crate) fn find() -> Option<ServiceManager> {
    let runs = |folder: &str| Path::new(folder).is_dir();
    match (runs("/run/systemd/system"), runs("/run/openrc")) {
        (true, _) => Some(ServiceManager::Systemd),
        (false, true) => Some(ServiceManager::Openrc),
        (false, false) => None,
    }
}

/// What was asked for, else what runs here.
pub(super) fn choose(asked: Option<ServiceManager>) -> anyhow::Result<ServiceManager> {
    asked.or_else(find).context(
        "no service manager was found: neither /run/systemd/system nor /run/openrc exists; give --service-manager, \
         'none' to start the services yourself",
    )
}

/// Runs a service manager's programs.
#[derive(Clone, Copy)]
pub(crate) struct Services {
    pub(crate) manager: ServiceManager,
    /// This process belongs to a pod, and what it starts must not.
    pub(crate) in_pod: bool,
}

impl Services {
    /// Fails with what the program said.
    pub(crate) fn run(self, call: &Call) -> anyhow::Result<()> {
        let output = self.output(call)?;
        if output.status.success() {
            return Ok(());
        }
        let said = [output.stderr, output.stdout].concat();
        let said = String::from_utf8_lossy(&said);
        let lines: Vec<&str> = said.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        bail!("'{}' failed ({}): {}", call.join(" "), output.status, lines.join("; "))
    }

    pub(crate) fn succeeds(self, call: &Call) -> anyhow::Result<bool> {
        self.output(call).map(|output| output.status.success())
    }

    fn output(self, call: &Call) -> anyhow::Result<Output> {
        ensure!(!call.is_empty(), "an empty command");
        let words = if self.in_pod { outside_the_pod(self.manager, call) } else { call.clone() };
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).stdin(Stdio::null());
        if self.in_pod {
            command.env_clear().env("PATH", HOST_PATH);
        }
        command.output().with_context(|| format!("run '{}'", call.join(" ")))
    }
}

/// systemd starts services itself; OpenRC's are children of the one who asks, and would end with the pod's cgroup. Where
/// cgroups are of version 1 OpenRC leaves them by itself.
fn outside_the_pod(manager: ServiceManager, call: &Call) -> Call {
    const LEAVE: &str =
        "[ ! -w /sys/fs/cgroup/cgroup.procs ] || printf 0 > /sys/fs/cgroup/cgroup.procs; exec \"$@\"";
    match manager {
        ServiceManager::Openrc => {
            let shell = ["sh", "-c", LEAVE, "sh"].map(str::to_owned);
            shell.into_iter().chain(call.iter().cloned()).collect()
        }
        ServiceManager::Systemd | ServiceManager::None => call.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_out_of_the_pod_is_the_same_call() {
        let call: Call = ["printf", "%s|", "a b", "c"].map(str::to_owned).to_vec();
        assert_eq!(outside_the_pod(ServiceManager::Systemd, &call), call);
        let words = outside_the_pod(ServiceManager::Openrc, &call);
        assert_eq!(words[..2], ["sh", "-c"]);
        let output = Command::new(&words[0]).args(&words[1..]).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), "a b|c|");
    }

    #[test]
    fn a_call_that_fails_says_what_the_program_said() {
        let services = Services { manager: ServiceManager::Systemd, in_pod: true };
        let call: Call = ["sh", "-c", "echo Unit not found. >&2; exit 5"].map(str::to_owned).to_vec();
        let said = services.run(&call).unwrap_err().to_string();
        assert!(said.contains("exit status: 5") && said.ends_with("Unit not found."), "{said}");
        let missing = services.run(&vec!["weft-no-such-program".to_owned()]).unwrap_err().to_string();
        assert_eq!(missing, "run 'weft-no-such-program'");
    }
}
