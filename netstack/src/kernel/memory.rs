//! The allocator of the C library, told to be frugal.
#![allow(unsafe_code)]

/// One heap for all threads. Each further one keeps what its busiest moment took, such as the first list of a big cluster; threads that
/// wait for each other now and then cost the agent nothing that can be measured. To be called before there are threads.
#[cfg(target_env = "gnu")]
pub fn share_one_heap() {
    // SAFETY: mallopt(3) takes two numbers and reads no memory of ours. A refusal leaves more heaps, which is no error.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Other C libraries have one.
#[cfg(not(target_env = "gnu"))]
pub fn share_one_heap() {}

/// What is free goes back to the kernel, wherever it lies: the allocator does so at the end of its heap only. After work that needed
/// much for a moment; it takes some milliseconds.
#[cfg(target_env = "gnu")]
pub fn give_memory_back() {
    // SAFETY: malloc_trim(3) takes a number and touches what is free only.
    unsafe { libc::malloc_trim(0) };
}

/// Others do so themselves, or do not.
#[cfg(not(target_env = "gnu"))]
pub fn give_memory_back() {}
