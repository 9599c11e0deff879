//! `WEFT_PLUGIN`: the CNI plugin as a program (crate `weft-plugin`), to be carried along; without it the whole binary is the plugin.
//!
//! Functions that are the same instructions are kept once (identical code folding), which the linker of rustc can and GNU ld cannot.
//! Rust promises no addresses of functions. Not in builds for debugging, where each function has its name. The index of the tables for
//! unwinding is left out: a panic ends the process.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-check-cfg=cfg(carries_plugin)");
    println!("cargo::rerun-if-env-changed=WEFT_PLUGIN");
    if let Ok(plugin) = std::env::var("WEFT_PLUGIN") {
        println!("cargo::rustc-cfg=carries_plugin");
        println!("cargo::rerun-if-changed={plugin}");
    }
    let is = |name: &str, value: &str| std::env::var(name).is_ok_and(|set| set == value);
    // The targets for which rustc brings its own linker (1.90 and newer).
    let own_linker = is("TARGET", "x86_64-unknown-linux-gnu");
    if own_linker && is("PROFILE", "release") {
        println!("cargo::rustc-link-arg-bins=-Wl,--icf=all,--no-eh-frame-hdr");
    }
}
