//! `weft install` and `weft uninstall` on a host of their own: private /etc, /run, /opt, /var/lib and /usr/local, the
//! stand-in `systemctl` beside this file, and real processes of the real binary.
#![allow(clippy::unwrap_used, reason = "tests may fail by panic")]

mod by_hand;
mod host;
mod in_pod;
mod refusals;
mod units;
