//! How much memory one statement may take: SQLite's allocator, counted per thread.
//!
//! SQLite's own heap limit needs statistics under a lock that all workers would share. A worker runs one
//! statement at a time on its own thread, so counting there costs nothing, and what a runaway sort takes
//! ends with SQLITE_NOMEM in that statement alone (<https://www.sqlite.org/malloc.html>).
#![expect(unsafe_code, reason = "SQLite's allocator is a table of C functions")]

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::sync::OnceLock;

use rusqlite::ffi;

thread_local! {
    /// Bytes that may still be allocated; `None` without a limit.
    static LEFT: Cell<Option<i64>> = const { Cell::new(None) };
}

/// Counts from here on. Must come before the first use of SQLite in the process; `false` if it did not,
/// and then there is no limit.
pub(crate) fn install() -> bool {
    static INSTALLED: OnceLock<bool> = OnceLock::new();
    *INSTALLED.get_or_init(|| {
        let methods = ffi::sqlite3_mem_methods {
            xMalloc: Some(allocate),
            xFree: Some(release),
            xRealloc: Some(reallocate),
            xSize: Some(size),
            xRoundup: Some(round_up),
            xInit: Some(init),
            xShutdown: Some(shut_down),
            pAppData: std::ptr::null_mut(),
        };
        // SAFETY: SQLite copies the table; once it is initialised it refuses with SQLITE_MISUSE instead.
        unsafe {
            ffi::sqlite3_config(ffi::SQLITE_CONFIG_MALLOC, &raw const methods) == ffi::SQLITE_OK
        }
    })
}

/// Until dropped, SQLite on this thread may allocate so many bytes more than it frees.
pub(crate) struct Limited(Option<i64>);

pub(crate) fn limit(bytes: u64) -> Limited {
    Limited(LEFT.replace(Some(i64::try_from(bytes).unwrap_or(i64::MAX))))
}

impl Drop for Limited {
    fn drop(&mut self) {
        LEFT.set(self.0);
    }
}

/// `false` if there are not so many bytes left.
fn take(bytes: i64) -> bool {
    match LEFT.get() {
        Some(left) if left < bytes => false,
        Some(left) => {
            LEFT.set(Some(left - bytes));
            true
        }
        None => true,
    }
}

fn give_back(bytes: i64) {
    if let Some(left) = LEFT.get() {
        LEFT.set(Some(left.saturating_add(bytes)));
    }
}

fn usable(memory: *mut c_void) -> i64 {
    // SAFETY: `memory` came from malloc and was not freed.
    let bytes = unsafe { libc::malloc_usable_size(memory) };
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

unsafe extern "C" fn allocate(bytes: c_int) -> *mut c_void {
    if !take(i64::from(bytes)) {
        return std::ptr::null_mut();
    }
    // SAFETY: SQLite asks for more than 0 bytes; null is an answer it knows.
    let memory = unsafe { libc::malloc(usize::try_from(bytes).unwrap_or(0)) };
    if memory.is_null() {
        give_back(i64::from(bytes));
    } else {
        // As `release` will count it.
        give_back(i64::from(bytes) - usable(memory));
    }
    memory
}

unsafe extern "C" fn release(memory: *mut c_void) {
    if !memory.is_null() {
        give_back(usable(memory));
        // SAFETY: SQLite frees once what `allocate` or `reallocate` gave.
        unsafe { libc::free(memory) };
    }
}

unsafe extern "C" fn reallocate(memory: *mut c_void, bytes: c_int) -> *mut c_void {
    let before = usable(memory);
    if !take(i64::from(bytes) - before) {
        return std::ptr::null_mut();
    }
    // SAFETY: SQLite gives what `allocate` gave, and more than 0 bytes; null leaves it as it was.
    let grown = unsafe { libc::realloc(memory, usize::try_from(bytes).unwrap_or(0)) };
    if grown.is_null() {
        give_back(i64::from(bytes) - before);
    } else {
        give_back(i64::from(bytes) - usable(grown));
    }
    grown
}

unsafe extern "C" fn size(memory: *mut c_void) -> c_int {
    if memory.is_null() {
        return 0;
    }
    c_int::try_from(usable(memory)).unwrap_or(c_int::MAX)
}

unsafe extern "C" fn round_up(bytes: c_int) -> c_int {
    bytes.checked_add(7).map_or(bytes, |sum| sum & !7)
}

unsafe extern "C" fn init(_data: *mut c_void) -> c_int {
    ffi::SQLITE_OK
}

unsafe extern "C" fn shut_down(_data: *mut c_void) {}
