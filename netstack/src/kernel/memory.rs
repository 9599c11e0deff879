//! The memory of a process, told to be frugal. The allocator is mimalloc (decision record 15).
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

/// How often a thread looks through its heap.
const LOOK: Duration = Duration::from_secs(1);

thread_local! {
    static LOOKED: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// For a thread that has nothing to do at the moment: what it has freed goes back, which it does by itself only after thousands of
/// further allocations.
pub fn tidy_up() {
    if LOOKED.get().is_none_or(|at| at.elapsed() > LOOK) {
        // SAFETY: as in `give_memory_back`.
        unsafe { libmimalloc_sys::mi_collect(false) };
        LOOKED.set(Some(Instant::now()));
    }
}

/// What is free goes back to the kernel at once, wherever it lies. After work that needed much for a moment; it takes some
/// milliseconds.
pub fn give_memory_back() {
    // SAFETY: mi_collect takes a flag and touches what is free only.
    unsafe { libmimalloc_sys::mi_collect(true) };
}
