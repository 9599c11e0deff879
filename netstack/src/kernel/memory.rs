//! The memory of a process, told to be frugal. The allocator is mimalloc (decision record 16).
#![allow(unsafe_code)]

use std::cell::Cell;
use std::time::{Duration, Instant};

use nix::sys::prctl::set_thp_disable;

/// Pages of 4 KiB only, where the host would give larger ones: of 2 MiB all stays as long as some of it is in use. For processes
/// that stay; those that they start have it from them.
pub fn use_small_pages() {
    // A kernel without huge pages has nothing to switch off.
    let _ = set_thp_disable(true);
}

/// How often a thread gives back what it has freed.
const PAUSE: Duration = Duration::from_secs(1);

thread_local! {
    static GAVE_BACK: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// For a thread that has nothing to do at the moment: each keeps what it has freed for itself, until thousands of further
/// allocations.
pub fn give_memory_back_now_and_then() {
    if GAVE_BACK.get().is_none_or(|at| at.elapsed() > PAUSE) {
        give_memory_back();
        GAVE_BACK.set(Some(Instant::now()));
    }
}

/// What is free goes back to the kernel at once, wherever it lies; of other threads what they have given up. After work that needed
/// much for a moment; it takes some milliseconds.
pub fn give_memory_back() {
    // SAFETY: mi_collect takes a flag and touches what is free only.
    unsafe { libmimalloc_sys::mi_collect(true) };
}
