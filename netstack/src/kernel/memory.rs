//! The memory of a process, told to be frugal. The allocator is mimalloc (decision record 16).
#![allow(unsafe_code)]

use std::cell::Cell;
use std::ops::Range;
use std::time::{Duration, Instant};

use nix::sys::prctl::set_thp_disable;

/// Where segments begin at least; on a machine with larger pages the kernel refuses a range that begins within one.
const PAGE_BYTES: usize = 4096;
/// When the start of a process is over, and how often is looked again afterwards.
const AFTER_START: Duration = Duration::from_secs(3);
const LOOK: Duration = Duration::from_secs(60);

/// For processes that stay. Pages of 4 KiB only, where the host would give larger ones: of 2 MiB all stays as long as some of it is
/// in use (those that they start have it from them). And a thread that lets go of what the start needed of the program itself.
///
/// Not before the rights that a process gives up are given up: they are a thread's.
pub fn be_frugal() {
    // A kernel without huge pages has nothing to switch off.
    let _ = set_thp_disable(true);
    let thread = std::thread::Builder::new().name("frugal".to_owned());
    // Without it only memory is lost.
    let _ = thread.spawn(|| {
        std::thread::sleep(AFTER_START);
        loop {
            let_go_of_program();
            std::thread::sleep(LOOK);
        }
    });
}

/// Pages of the program that are read only are no longer this process's until it looks at them again; they stay in the page cache, from
/// where one comes back within a microsecond, with its neighbours. The kernel would do so only when memory is short.
fn let_go_of_program() {
    for pages in program_pages() {
        // SAFETY: the range is one of the program's own segments that can only be read or run: nothing but what its file holds.
        let _ = unsafe {
            libc::madvise(
                std::ptr::with_exposed_provenance_mut(pages.start),
                pages.len(),
                libc::MADV_DONTNEED,
            )
        };
    }
}

/// Addresses of the program's segments that are never written to; source: elf(5), `PT_LOAD` without `PF_W`.
fn program_pages() -> Vec<Range<usize>> {
    /// The program comes first: one call is enough.
    unsafe extern "C" fn of_program(
        object: *mut libc::dl_phdr_info,
        _: libc::size_t,
        found: *mut libc::c_void,
    ) -> libc::c_int {
        // SAFETY: dl_iterate_phdr(3) calls back with a valid object, and with the pointer to `found` below, which nobody else uses.
        let (object, found) = unsafe { (&*object, &mut *found.cast::<Vec<Range<usize>>>()) };
        if object.dlpi_phdr.is_null() {
            return 1;
        }
        // SAFETY: the object says where its program headers stand, and how many.
        let headers = unsafe { std::slice::from_raw_parts(object.dlpi_phdr, object.dlpi_phnum.into()) };
        let fixed = headers.iter().filter(|header| {
            header.p_type == libc::PT_LOAD && header.p_flags & libc::PF_W == 0 && header.p_memsz > 0
        });
        found.extend(fixed.filter_map(|header| {
            let first = usize::try_from(object.dlpi_addr + header.p_vaddr).ok()?;
            let end = first + usize::try_from(header.p_memsz).ok()?;
            Some(first / PAGE_BYTES * PAGE_BYTES..end)
        }));
        1
    }
    let mut found = Vec::new();
    // SAFETY: the function may be called as often as one likes, and calls back before it returns.
    unsafe { libc::dl_iterate_phdr(Some(of_program), (&raw mut found).cast()) };
    found
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Of the program's read-only pages that this process has, in KiB.
    fn resident_kib() -> u64 {
        let text = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let own = program_pages();
        let mut is_own = false;
        let mut sum = 0;
        for line in text.lines() {
            let first = line.split(['-', ' ']).next().unwrap();
            if let Ok(start) = usize::from_str_radix(first, 16) {
                is_own = own.iter().any(|pages| pages.contains(&start));
            } else if let Some(kib) = line.strip_prefix("Rss:").filter(|_| is_own) {
                sum += kib.trim().trim_end_matches(" kB").parse::<u64>().unwrap();
            }
        }
        sum
    }

    #[test]
    fn what_was_looked_at_once_of_the_program_does_not_stay() {
        let pages = program_pages();
        assert!(!pages.is_empty());
        for page in pages.into_iter().flat_map(|pages| pages.step_by(PAGE_BYTES)) {
            // SAFETY: within a segment of the program, all of which can be read.
            unsafe { std::ptr::with_exposed_provenance::<u8>(page).read_volatile() };
        }
        let all = resident_kib();
        let_go_of_program();
        let left = resident_kib();
        // Other tests run meanwhile.
        assert!(all > 4096 && left < all / 2, "{left} of {all} KiB");
    }
}
