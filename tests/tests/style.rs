//! The structure that ARCHITECTURE.md promises, held by reading the source tree.

#![allow(clippy::unwrap_used, reason = "a test's set-up fails the test")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Every `.rs` file of the workspace below the folders of its crates, as a path from the root.
fn sources() -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders: Vec<PathBuf> = ["cmd", "netstack", "dns", "lb", "embedded-manifests", "tests"]
        .iter()
        .map(|name| root().join(name))
        .collect();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path.strip_prefix(root()).unwrap().to_owned());
            }
        }
    }
    found.sort();
    assert!(found.len() > 40, "the source tree was not found: {found:?}");
    found
}

fn text(path: &Path) -> String {
    std::fs::read_to_string(root().join(path)).unwrap()
}

#[test]
fn every_file_begins_by_saying_what_it_is() {
    let silent: Vec<_> = sources()
        .into_iter()
        .filter(|path| !text(path).starts_with("//!"))
        .filter(|path| !path.ends_with("tests.rs"))
        .collect();
    assert!(silent.is_empty(), "files without a //! header: {silent:#?}");
}

#[test]
fn every_file_is_reached_by_a_mod_declaration() {
    let all = sources();
    let mut orphans = Vec::new();
    for path in &all {
        let stem = path.file_stem().unwrap().to_str().unwrap();
        let folder = path.parent().unwrap();
        if ["lib", "main", "build"].contains(&stem) || is_test_root(path) {
            continue;
        }
        let (name, parents) = if stem == "mod" {
            let outer = folder.parent().unwrap();
            (folder.file_name().unwrap().to_str().unwrap(), modules_owning(outer))
        } else {
            (stem, modules_owning(folder))
        };
        let declared = parents
            .iter()
            .filter(|parent| all.contains(parent))
            .chain(
                all.iter().filter(|other| is_test_root(other) && path.starts_with(other.parent().unwrap())),
            )
            .any(|parent| text(parent).lines().any(|line| declares(line, name)));
        if !declared {
            orphans.push(path);
        }
    }
    assert!(orphans.is_empty(), "files no module declares: {orphans:#?}");
}

/// An integration test: cargo finds it by its place, and it may declare modules of folders below it.
fn is_test_root(path: &Path) -> bool {
    let folder = path.parent().unwrap();
    folder.ends_with("tests")
        && folder.parent().is_some_and(|crate_folder| root().join(crate_folder).join("Cargo.toml").exists())
}

/// Files that may declare the modules lying in `folder`.
fn modules_owning(folder: &Path) -> Vec<PathBuf> {
    let mut owners: Vec<PathBuf> =
        ["mod.rs", "lib.rs", "main.rs"].iter().map(|name| folder.join(name)).collect();
    owners.push(folder.with_extension("rs"));
    owners
}

fn declares(line: &str, name: &str) -> bool {
    let line = line.trim_start();
    let line = line.strip_prefix("pub(crate) ").or_else(|| line.strip_prefix("pub ")).unwrap_or(line);
    let line = line.strip_prefix("pub(super) ").unwrap_or(line);
    line.strip_prefix("mod ").is_some_and(|rest| rest.trim_end_matches([';', '{', ' ']) == name)
}

#[test]
fn unsafe_stands_only_in_the_kernel_room() {
    let words = ["unsafe {", "unsafe fn", "unsafe impl", "allow(unsafe_code"];
    let outside: Vec<_> = sources()
        .into_iter()
        .filter(|path| !path.starts_with("netstack/src/kernel") && !path.ends_with("style.rs"))
        .filter(|path| words.iter().any(|word| text(path).contains(word)))
        .collect();
    assert!(outside.is_empty(), "unsafe outside netstack/src/kernel: {outside:#?}");
}

#[test]
fn planners_touch_nothing_outside() {
    let forbidden = [
        "tokio::",
        "std::fs",
        "std::net::TcpStream",
        "std::net::UdpSocket",
        "Instant::now",
        "SystemTime",
        "crate::kernel",
    ];
    let impure: Vec<_> = sources()
        .into_iter()
        .filter(|path| path.file_name().is_some_and(|name| name == "plan.rs" || name == "diff.rs"))
        .filter(|path| forbidden.iter().any(|word| production(&text(path)).contains(word)))
        .collect();
    assert!(impure.is_empty(), "planners that do IO or read a clock: {impure:#?}");
}

/// A file without its inline test module.
fn production(text: &str) -> &str {
    text.split("#[cfg(test)]").next().unwrap()
}

#[test]
fn the_model_depends_on_nothing_that_can_touch_the_world() {
    let manifest = text(Path::new("netstack/model/Cargo.toml"));
    let dependencies: BTreeSet<&str> = manifest
        .split("[dependencies]")
        .nth(1)
        .unwrap()
        .lines()
        .take_while(|line| !line.starts_with('['))
        .filter_map(|line| line.split(['.', ' ', '=']).next())
        .filter(|name| !name.is_empty() && !name.starts_with('#'))
        .collect();
    assert_eq!(dependencies, BTreeSet::from(["base64", "ipnet", "serde", "smallvec", "thiserror"]));
}
