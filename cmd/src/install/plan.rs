//! What an installation consists of, as values: files, units, the service manager's commands, who is restarted why.
//!
//! In: the service manager, the text of the environment file, whether Ingresses are served. Out: [`InstalledFile`]s and command lines. No IO.

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use weft_manifests::units;

pub(crate) const BINARY: &str = "/usr/local/bin/weft";
pub(crate) const ENVIRONMENT: &str = "/etc/weft/agent.env";
/// Folders that an installation made, one a line: an uninstallation removes those, and only if they are empty.
pub(crate) const CREATED_FOLDERS: &str = "/etc/weft/created-folders";
/// The services' own folders; `weft status`, the tunnel and the plugin expect them there.
pub(crate) const RUN_DIR: &str = "/run/weft";
pub(crate) const STATE_DIR: &str = "/var/lib/weft";

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ServiceManager {
    Systemd,
    Openrc,
    /// Units are the reader's business
    None,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    Agent,
    Tunnel,
    Ingress,
}

/// All that an installation may have.
pub(crate) const UNITS: [Unit; 3] = [Unit::Agent, Unit::Tunnel, Unit::Ingress];

/// Those of an installation with these flags.
pub(crate) fn units(ingress: bool) -> &'static [Unit] {
    if ingress { &UNITS } else { &[Unit::Agent, Unit::Tunnel] }
}

impl Unit {
    /// As both service managers know it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Unit::Agent => "weft-agent",
            Unit::Tunnel => "weft-tunnel",
            Unit::Ingress => "weft-ingress",
        }
    }

    /// Exists from the first change of what the unit runs until its restart, and not across a reboot, which restarts all.
    pub(crate) fn restart_marker(self) -> PathBuf {
        Path::new(RUN_DIR).join(format!("{}.restart", self.name()))
    }
}

/// A command line.
pub(crate) type Call = Vec<String>;

fn call(words: &[&str]) -> Call {
    words.iter().map(|word| (*word).to_owned()).collect()
}

impl ServiceManager {
    /// Where the unit's file is; `None` has no units.
    pub(crate) fn unit_file(self, unit: Unit) -> Option<PathBuf> {
        match self {
            Self::Systemd => Some(format!("/etc/systemd/system/{}.service", unit.name()).into()),
            Self::Openrc => Some(format!("/etc/init.d/{}", unit.name()).into()),
            Self::None => None,
        }
    }

    /// What the unit writes by itself beside its file.
    pub(crate) fn unit_log(self, unit: Unit) -> Option<PathBuf> {
        (self == Self::Openrc).then(|| format!("/var/log/{}.log", unit.name()).into())
    }

    /// Makes new unit files known.
    pub(crate) fn reload(self) -> Option<Call> {
        (self == Self::Systemd).then(|| call(&["systemctl", "daemon-reload"]))
    }

    /// Starts the units at every boot.
    pub(crate) fn enable(self, units: &[Unit]) -> Vec<Call> {
        match self {
            Self::Systemd => {
                let mut enable = call(&["systemctl", "enable"]);
                enable.extend(units.iter().copied().map(service));
                vec![enable]
            }
            Self::Openrc => {
                units.iter().map(|unit| call(&["rc-update", "add", unit.name(), "default"])).collect()
            }
            Self::None => Vec::new(),
        }
    }

    /// Succeeds when the unit is up.
    pub(crate) fn is_active(self, unit: Unit) -> Option<Call> {
        match self {
            Self::Systemd => Some(call(&["systemctl", "is-active", "--quiet", &service(unit)])),
            Self::Openrc => Some(call(&["rc-service", unit.name(), "status"])),
            Self::None => None,
        }
    }

    pub(crate) fn restart(self, unit: Unit) -> Option<Call> {
        match self {
            Self::Systemd => Some(call(&["systemctl", "restart", &service(unit)])),
            Self::Openrc => Some(call(&["rc-service", unit.name(), "restart"])),
            Self::None => None,
        }
    }

    /// Ends the unit now and keeps it from starting at boot.
    pub(crate) fn stop_and_disable(self, unit: Unit) -> Vec<Call> {
        match self {
            Self::Systemd => vec![call(&["systemctl", "disable", "--now", &service(unit)])],
            Self::Openrc => vec![
                call(&["rc-service", unit.name(), "stop"]),
                call(&["rc-update", "del", unit.name(), "default"]),
            ],
            Self::None => Vec::new(),
        }
    }
}

fn service(unit: Unit) -> String {
    format!("{}.service", unit.name())
}

/// A file to be in place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct InstalledFile {
    pub(crate) path: PathBuf,
    pub(crate) mode: u32,
    pub(crate) content: Content,
    /// Units that run what the file holds.
    pub(crate) units: Vec<Unit>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// The binary that runs.
    OwnBinary,
    Text(String),
}

/// Every file of an installation, in the order in which they are written.
pub(crate) fn files(manager: ServiceManager, environment: &str, units: &[Unit]) -> Vec<InstalledFile> {
    let text = |path: PathBuf, mode: u32, text: &str, unit: Unit| InstalledFile {
        path,
        mode,
        content: Content::Text(text.to_owned()),
        units: vec![unit],
    };
    let binary = InstalledFile {
        path: BINARY.into(),
        mode: 0o755,
        content: Content::OwnBinary,
        units: units.to_vec(),
    };
    let mut files = vec![binary, text(ENVIRONMENT.into(), 0o600, environment, Unit::Agent)];
    for &unit in units {
        let (Some(path), Some((mode, content))) = (manager.unit_file(unit), unit_text(manager, unit)) else {
            continue;
        };
        files.push(text(path, mode, content, unit));
    }
    files
}

fn unit_text(manager: ServiceManager, unit: Unit) -> Option<(u32, &'static str)> {
    match (manager, unit) {
        (ServiceManager::Systemd, Unit::Agent) => Some((0o644, units::SYSTEMD_AGENT)),
        (ServiceManager::Systemd, Unit::Tunnel) => Some((0o644, units::SYSTEMD_TUNNEL)),
        (ServiceManager::Systemd, Unit::Ingress) => Some((0o644, units::SYSTEMD_INGRESS)),
        (ServiceManager::Openrc, Unit::Agent) => Some((0o755, units::OPENRC_AGENT)),
        (ServiceManager::Openrc, Unit::Tunnel) => Some((0o755, units::OPENRC_TUNNEL)),
        (ServiceManager::Openrc, Unit::Ingress) => Some((0o755, units::OPENRC_INGRESS)),
        (ServiceManager::None, _) => None,
    }
}

/// Why a unit is restarted; `None` when it goes on as it is.
pub(crate) fn restart_reason(changed: bool, active: bool) -> Option<&'static str> {
    match (changed, active) {
        (true, _) => Some("what it runs has changed"),
        (false, false) => Some("it did not run"),
        (false, true) => None,
    }
}

/// What a person runs where no service manager is used.
pub(crate) fn by_hand(words: &[String], units: &[Unit]) -> String {
    let line = |unit: &Unit| match unit {
        Unit::Agent => format!("  {BINARY} agent {}\n", words.join(" ")),
        Unit::Tunnel => format!("  {BINARY} tunnel --unless-kernel\n"),
        Unit::Ingress => format!("  {BINARY} ingress serve\n"),
    };
    let lines: String = units.iter().map(line).collect();
    format!("run these as root, the agent first, each started again when it ends:\n{lines}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(manager: ServiceManager) -> Vec<(String, u32, Vec<Unit>)> {
        files(manager, "text", units(true))
            .into_iter()
            .map(|file| (file.path.display().to_string(), file.mode, file.units))
            .collect()
    }

    #[test]
    fn each_service_manager_has_its_files_and_each_file_its_units() {
        let common =
            [(BINARY.to_owned(), 0o755, UNITS.to_vec()), (ENVIRONMENT.to_owned(), 0o600, vec![Unit::Agent])];
        assert_eq!(paths(ServiceManager::None), common);
        let systemd = [
            ("/etc/systemd/system/weft-agent.service".to_owned(), 0o644, vec![Unit::Agent]),
            ("/etc/systemd/system/weft-tunnel.service".to_owned(), 0o644, vec![Unit::Tunnel]),
            ("/etc/systemd/system/weft-ingress.service".to_owned(), 0o644, vec![Unit::Ingress]),
        ];
        assert_eq!(paths(ServiceManager::Systemd), [&common[..], &systemd].concat());
        let openrc = [
            ("/etc/init.d/weft-agent".to_owned(), 0o755, vec![Unit::Agent]),
            ("/etc/init.d/weft-tunnel".to_owned(), 0o755, vec![Unit::Tunnel]),
            ("/etc/init.d/weft-ingress".to_owned(), 0o755, vec![Unit::Ingress]),
        ];
        assert_eq!(paths(ServiceManager::Openrc), [&common[..], &openrc].concat());
    }

    #[test]
    fn units_run_the_installed_binary_with_the_environment_file() {
        for manager in [ServiceManager::Systemd, ServiceManager::Openrc] {
            for unit in UNITS {
                let (_, text) = unit_text(manager, unit).unwrap();
                assert!(text.contains(BINARY), "{text}");
            }
        }
        assert!(units::SYSTEMD_AGENT.contains(&format!("\nEnvironmentFile={ENVIRONMENT}\n")));
        assert!(units::SYSTEMD_AGENT.contains(&format!("\nExecStart={BINARY} agent $WEFT_AGENT_ARGS\n")));
        assert!(units::OPENRC_AGENT.contains(&format!("\n. {ENVIRONMENT}\n")));
    }

    #[test]
    fn the_service_managers_commands_are_these() {
        let spoken = |manager: ServiceManager| {
            let mut calls = Vec::from_iter(manager.reload());
            calls.extend(manager.enable(units(false)));
            calls.extend(manager.is_active(Unit::Agent));
            calls.extend(manager.restart(Unit::Tunnel));
            calls.extend(manager.stop_and_disable(Unit::Agent));
            calls.iter().map(|call| call.join(" ")).collect::<Vec<_>>()
        };
        assert_eq!(
            spoken(ServiceManager::Systemd),
            [
                "systemctl daemon-reload",
                "systemctl enable weft-agent.service weft-tunnel.service",
                "systemctl is-active --quiet weft-agent.service",
                "systemctl restart weft-tunnel.service",
                "systemctl disable --now weft-agent.service",
            ]
        );
        assert_eq!(
            spoken(ServiceManager::Openrc),
            [
                "rc-update add weft-agent default",
                "rc-update add weft-tunnel default",
                "rc-service weft-agent status",
                "rc-service weft-tunnel restart",
                "rc-service weft-agent stop",
                "rc-update del weft-agent default",
            ]
        );
        assert_eq!(spoken(ServiceManager::None), [""; 0]);
    }

    #[test]
    fn a_node_without_ingress_has_nothing_of_it() {
        let named = |files: Vec<InstalledFile>| {
            files.iter().any(|file| file.path.display().to_string().contains("ingress"))
        };
        assert!(!named(files(ServiceManager::Systemd, "text", units(false))));
        assert!(named(files(ServiceManager::Systemd, "text", units(true))));
        let words = vec!["--ingress".to_owned(), "on".to_owned()];
        assert!(!by_hand(&words, units(false)).contains("ingress serve"));
        assert!(by_hand(&words, units(true)).contains("\n  /usr/local/bin/weft ingress serve\n"));
    }

    #[test]
    fn only_a_change_or_a_stopped_unit_is_a_reason_to_restart() {
        assert_eq!(restart_reason(false, true), None);
        assert_eq!(restart_reason(false, false), Some("it did not run"));
        assert_eq!(restart_reason(true, true), restart_reason(true, false));
    }
}
