//! The plugin as a program, for `/opt/cni/bin/weft`.

use std::process::ExitCode;

fn main() -> ExitCode {
    weft_plugin::run()
}
