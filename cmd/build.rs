//! Functions that are the same instructions are kept once (identical code folding), which the linker of rustc can and GNU ld cannot.
//! Rust promises no addresses of functions. Not in builds for debugging, where each function has its name.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let is = |name: &str, value: &str| std::env::var(name).is_ok_and(|set| set == value);
    // The targets for which rustc brings its own linker (1.90 and newer).
    let own_linker = is("TARGET", "x86_64-unknown-linux-gnu");
    if own_linker && is("PROFILE", "release") {
        println!("cargo::rustc-link-arg-bins=-Wl,--icf=all");
    }
}
