//! SQLite's files, as calls of a safe trait: with [`heap`](super::heap) the only `unsafe` code of the node.
//!
//! One VFS (<https://www.sqlite.org/vfs.html>) is registered per process. It opens main databases
//! only, and only the one that [`connect`] holds ready on the same thread; journals and temporary
//! files stay in SQLite's memory (`journal_mode=MEMORY`, `temp_store=MEMORY`), so none is ever asked for.
//! A panic in a callback aborts the process, as any panic in an `extern "C"` function does: a broken
//! invariant of ours stops the node.
#![expect(unsafe_code, reason = "SQLite calls back through C function pointers")]

use std::cell::RefCell;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr;
use std::rc::Rc;
use std::sync::OnceLock;

use rusqlite::{Connection, OpenFlags, ffi};

/// The file of one database. Called on the thread of its connection alone.
pub(crate) trait DatabaseFile {
    /// Reads from `at`. What lies beyond the end of the database is zeros, and the answer says so.
    fn read(&self, buffer: &mut [u8], at: u64) -> Result<Read, Failed>;

    /// Writes one page. Nothing of it counts before [`commit`](Self::commit).
    fn write(&self, page: &[u8], at: u64) -> Result<(), Failed>;

    fn truncate(&self, bytes: u64) -> Result<(), Failed>;

    fn bytes(&self) -> u64;

    /// The transaction is complete: what was written and truncated since the last commit is the
    /// database now. Cannot fail.
    fn commit(&self);
}

/// How much of a read there was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Read {
    All,
    BeyondTheEnd,
}

/// Why SQLite does not get what it asked of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Failed {
    Io,
    /// The transaction is larger than allowed.
    Full,
}

impl Failed {
    fn code(self, io: c_int) -> c_int {
        match self {
            Self::Io => io,
            Self::Full => ffi::SQLITE_FULL,
        }
    }
}

const NAME: &CStr = c"dormouse";

/// What SQLite allocates for an open file. `base` comes first: SQLite sees only that.
#[repr(C)]
struct File {
    base: ffi::sqlite3_file,
    /// From `Box::into_raw`; freed by `close`.
    target: *mut Rc<dyn DatabaseFile>,
}

thread_local! {
    /// What the next `open` on this thread gets.
    static NEXT: RefCell<Option<Rc<dyn DatabaseFile>>> = const { RefCell::new(None) };
}

/// Opens a connection onto `file`. The connection and `file` stay on this thread.
pub(crate) fn connect(file: Rc<dyn DatabaseFile>) -> rusqlite::Result<Connection> {
    static REGISTERED: OnceLock<c_int> = OnceLock::new();
    let code = *REGISTERED.get_or_init(register);
    if code != ffi::SQLITE_OK {
        let error = ffi::Error::new(code);
        return Err(rusqlite::Error::SqliteFailure(error, None));
    }
    NEXT.set(Some(file));
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
        | OpenFlags::SQLITE_OPEN_CREATE
        | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags_and_vfs("object", flags, NAME);
    NEXT.set(None);
    connection
}

/// Bytes of memory that a connection holds: cached pages, schema and prepared statements.
pub(crate) fn memory(connection: &Connection) -> usize {
    let used = [
        ffi::SQLITE_DBSTATUS_CACHE_USED,
        ffi::SQLITE_DBSTATUS_SCHEMA_USED,
        ffi::SQLITE_DBSTATUS_STMT_USED,
    ]
    .map(|what| usize::try_from(status(connection, what)).unwrap_or(0));
    used.iter().sum()
}

/// Whether the open transaction has left a foreign key unsatisfied
/// (<https://www.sqlite.org/c3ref/c_dbstatus_options.html#sqlitedbstatusdeferredfks>).
pub(crate) fn has_violations(connection: &Connection) -> bool {
    status(connection, ffi::SQLITE_DBSTATUS_DEFERRED_FKS) != 0
}

fn status(connection: &Connection, what: c_int) -> c_int {
    let (mut now, mut highest) = (0, 0);
    // SAFETY: the handle is valid while the connection is borrowed, and used on its own thread; both
    // out-pointers are to live integers.
    unsafe { ffi::sqlite3_db_status(connection.handle(), what, &mut now, &mut highest, 0) };
    now
}

/// A statement of ours that most turns run: prepared once, kept beside its connection, and looked up nowhere.
pub(crate) struct Kept(*mut ffi::sqlite3_stmt);

impl Kept {
    pub(crate) fn prepare(connection: &Connection, sql: &CStr) -> rusqlite::Result<Self> {
        let mut statement = ptr::null_mut();
        // SAFETY: the handle is valid while the connection is borrowed, the text ends with a zero, and the
        // out-pointer is to a live pointer.
        let code = unsafe {
            ffi::sqlite3_prepare_v3(
                connection.handle(),
                sql.as_ptr(),
                -1,
                ffi::SQLITE_PREPARE_PERSISTENT,
                &raw mut statement,
                ptr::null_mut(),
            )
        };
        match code {
            ffi::SQLITE_OK => Ok(Self(statement)),
            code => Err(failure(connection, code)),
        }
    }

    /// Runs it to its end. The connection is the one that it was prepared for.
    pub(crate) fn run(&self, connection: &Connection) -> rusqlite::Result<()> {
        // SAFETY: the statement lives until it is dropped, and is used on its connection's thread. SQLite keeps
        // a connection for as long as it has statements, even if it is asked to close it.
        let code = unsafe { ffi::sqlite3_step(self.0) };
        let ran = match code {
            ffi::SQLITE_DONE => Ok(()),
            code => Err(failure(connection, code)),
        };
        // SAFETY: the same. What it returns is what `step` returned.
        unsafe { ffi::sqlite3_reset(self.0) };
        ran
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        // SAFETY: the same; it is not used again.
        unsafe { ffi::sqlite3_finalize(self.0) };
    }
}

/// What SQLite says of the call that failed last.
fn failure(connection: &Connection, code: c_int) -> rusqlite::Error {
    // SAFETY: the handle is valid while the connection is borrowed; the text is until the next call, and is
    // copied before.
    let message = unsafe { CStr::from_ptr(ffi::sqlite3_errmsg(connection.handle())) };
    let message = message.to_string_lossy().into_owned();
    rusqlite::Error::SqliteFailure(ffi::Error::new(code), Some(message))
}

fn register() -> c_int {
    // SAFETY: a null name asks for the default VFS, which SQLite has initialised and never frees.
    let default = unsafe { ffi::sqlite3_vfs_find(ptr::null()) };
    if default.is_null() {
        return ffi::SQLITE_ERROR;
    }
    let vfs = Box::new(ffi::sqlite3_vfs {
        iVersion: 2,
        szOsFile: c_int::try_from(size_of::<File>()).expect("two pointers"),
        mxPathname: 512,
        pNext: ptr::null_mut(),
        zName: NAME.as_ptr(),
        pAppData: default.cast(),
        xOpen: Some(open),
        xDelete: Some(delete),
        xAccess: Some(access),
        xFullPathname: Some(full_pathname),
        xDlOpen: Some(dl_open),
        xDlError: Some(dl_error),
        xDlSym: None,
        xDlClose: None,
        xRandomness: Some(randomness),
        xSleep: Some(sleep),
        xCurrentTime: Some(current_time),
        xGetLastError: Some(last_error),
        xCurrentTimeInt64: Some(current_time_int64),
        xSetSystemCall: None,
        xGetSystemCall: None,
        xNextSystemCall: None,
    });
    // SAFETY: the structure is leaked, so it lives as long as the registration: for ever.
    unsafe { ffi::sqlite3_vfs_register(Box::leak(vfs), 0) }
}

static METHODS: ffi::sqlite3_io_methods = ffi::sqlite3_io_methods {
    iVersion: 1,
    xClose: Some(close),
    xRead: Some(read),
    xWrite: Some(write),
    xTruncate: Some(truncate),
    xSync: Some(sync),
    xFileSize: Some(file_size),
    xLock: Some(lock),
    xUnlock: Some(lock),
    xCheckReservedLock: Some(check_reserved_lock),
    xFileControl: Some(file_control),
    xSectorSize: Some(sector_size),
    xDeviceCharacteristics: Some(device_characteristics),
    xShmMap: None,
    xShmLock: None,
    xShmBarrier: None,
    xShmUnmap: None,
    xFetch: None,
    xUnfetch: None,
};

/// The file behind SQLite's pointer.
///
/// # Safety
/// `file` must come from SQLite, between a successful [`open`] and [`close`].
unsafe fn target<'a>(file: *mut ffi::sqlite3_file) -> &'a dyn DatabaseFile {
    // SAFETY: by the caller's promise this is a `File` that `open` has filled; the box is freed by `close`
    // alone, after which SQLite does not use the file any more.
    unsafe { (*(*file.cast::<File>()).target).as_ref() }
}

unsafe extern "C" fn open(
    _vfs: *mut ffi::sqlite3_vfs,
    _name: ffi::sqlite3_filename,
    file: *mut ffi::sqlite3_file,
    flags: c_int,
    out_flags: *mut c_int,
) -> c_int {
    let wanted = flags & ffi::SQLITE_OPEN_MAIN_DB != 0;
    let next = if wanted { NEXT.take() } else { None };
    // SAFETY: SQLite gives `szOsFile` bytes for the file. Null methods say that it is not open.
    unsafe { (*file).pMethods = ptr::null() };
    let Some(next) = next else {
        return ffi::SQLITE_CANTOPEN;
    };
    let opened = File {
        base: ffi::sqlite3_file { pMethods: &METHODS },
        target: Box::into_raw(Box::new(next)),
    };
    // SAFETY: the memory is as large as `szOsFile` says, and aligned for any type as all that SQLite
    // allocates; `out_flags` is null or valid.
    unsafe {
        ptr::write(file.cast::<File>(), opened);
        if !out_flags.is_null() {
            *out_flags = flags;
        }
    }
    ffi::SQLITE_OK
}

unsafe extern "C" fn close(file: *mut ffi::sqlite3_file) -> c_int {
    // SAFETY: SQLite closes a file once, after a successful `open`, which made `target` with
    // `Box::into_raw`.
    drop(unsafe { Box::from_raw((*file.cast::<File>()).target) });
    ffi::SQLITE_OK
}

unsafe extern "C" fn read(
    file: *mut ffi::sqlite3_file,
    buffer: *mut c_void,
    bytes: c_int,
    at: ffi::sqlite3_int64,
) -> c_int {
    let (Ok(bytes), Ok(at)) = (usize::try_from(bytes), u64::try_from(at)) else {
        return ffi::SQLITE_IOERR_READ;
    };
    // SAFETY: SQLite gives a buffer of `bytes` bytes that nobody else uses during the call. It may not
    // be initialised: it is, byte by byte, before a reference to it is made.
    let buffer = unsafe {
        ptr::write_bytes(buffer.cast::<u8>(), 0, bytes);
        std::slice::from_raw_parts_mut(buffer.cast::<u8>(), bytes)
    };
    // SAFETY: the file is open.
    match unsafe { target(file) }.read(buffer, at) {
        Ok(Read::All) => ffi::SQLITE_OK,
        Ok(Read::BeyondTheEnd) => ffi::SQLITE_IOERR_SHORT_READ,
        Err(failed) => failed.code(ffi::SQLITE_IOERR_READ),
    }
}

unsafe extern "C" fn write(
    file: *mut ffi::sqlite3_file,
    page: *const c_void,
    bytes: c_int,
    at: ffi::sqlite3_int64,
) -> c_int {
    let (Ok(bytes), Ok(at)) = (usize::try_from(bytes), u64::try_from(at)) else {
        return ffi::SQLITE_IOERR_WRITE;
    };
    // SAFETY: SQLite gives `bytes` initialised bytes that do not change during the call.
    let page = unsafe { std::slice::from_raw_parts(page.cast::<u8>(), bytes) };
    // SAFETY: the file is open.
    match unsafe { target(file) }.write(page, at) {
        Ok(()) => ffi::SQLITE_OK,
        Err(failed) => failed.code(ffi::SQLITE_IOERR_WRITE),
    }
}

unsafe extern "C" fn truncate(file: *mut ffi::sqlite3_file, bytes: ffi::sqlite3_int64) -> c_int {
    let Ok(bytes) = u64::try_from(bytes) else {
        return ffi::SQLITE_IOERR_TRUNCATE;
    };
    // SAFETY: the file is open.
    match unsafe { target(file) }.truncate(bytes) {
        Ok(()) => ffi::SQLITE_OK,
        Err(failed) => failed.code(ffi::SQLITE_IOERR_TRUNCATE),
    }
}

/// Durability is the log's business.
unsafe extern "C" fn sync(_file: *mut ffi::sqlite3_file, _flags: c_int) -> c_int {
    ffi::SQLITE_OK
}

unsafe extern "C" fn file_size(
    file: *mut ffi::sqlite3_file,
    bytes: *mut ffi::sqlite3_int64,
) -> c_int {
    // SAFETY: the file is open, and `bytes` points to a live integer of SQLite's.
    unsafe { *bytes = i64::try_from(target(file).bytes()).unwrap_or(i64::MAX) };
    ffi::SQLITE_OK
}

/// A database has one connection, and the data directory one process: nothing to lock against.
unsafe extern "C" fn lock(_file: *mut ffi::sqlite3_file, _level: c_int) -> c_int {
    ffi::SQLITE_OK
}

unsafe extern "C" fn check_reserved_lock(
    _file: *mut ffi::sqlite3_file,
    reserved: *mut c_int,
) -> c_int {
    // SAFETY: `reserved` points to a live integer of SQLite's.
    unsafe { *reserved = 0 };
    ffi::SQLITE_OK
}

unsafe extern "C" fn file_control(
    file: *mut ffi::sqlite3_file,
    operation: c_int,
    _argument: *mut c_void,
) -> c_int {
    if operation == ffi::SQLITE_FCNTL_COMMIT_PHASETWO {
        // SAFETY: the file is open.
        unsafe { target(file) }.commit();
        return ffi::SQLITE_OK;
    }
    ffi::SQLITE_NOTFOUND
}

unsafe extern "C" fn sector_size(_file: *mut ffi::sqlite3_file) -> c_int {
    512
}

/// A page that is written changes no other; nobody else deletes the file.
unsafe extern "C" fn device_characteristics(_file: *mut ffi::sqlite3_file) -> c_int {
    ffi::SQLITE_IOCAP_POWERSAFE_OVERWRITE | ffi::SQLITE_IOCAP_UNDELETABLE_WHEN_OPEN
}

unsafe extern "C" fn delete(
    _vfs: *mut ffi::sqlite3_vfs,
    _name: *const c_char,
    _sync_dir: c_int,
) -> c_int {
    ffi::SQLITE_OK
}

/// There is never a journal or a write-ahead log beside a database.
unsafe extern "C" fn access(
    _vfs: *mut ffi::sqlite3_vfs,
    _name: *const c_char,
    _flags: c_int,
    exists: *mut c_int,
) -> c_int {
    // SAFETY: `exists` points to a live integer of SQLite's.
    unsafe { *exists = 0 };
    ffi::SQLITE_OK
}

unsafe extern "C" fn full_pathname(
    _vfs: *mut ffi::sqlite3_vfs,
    name: *const c_char,
    room: c_int,
    full: *mut c_char,
) -> c_int {
    // SAFETY: `name` is a C string, and `full` has `room` bytes, which do not overlap it.
    unsafe {
        let name = CStr::from_ptr(name).to_bytes_with_nul();
        if name.len() > usize::try_from(room).unwrap_or(0) {
            return ffi::SQLITE_CANTOPEN;
        }
        ptr::copy_nonoverlapping(name.as_ptr().cast(), full, name.len());
    }
    ffi::SQLITE_OK
}

/// No extensions are ever loaded.
unsafe extern "C" fn dl_open(_vfs: *mut ffi::sqlite3_vfs, _name: *const c_char) -> *mut c_void {
    ptr::null_mut()
}

unsafe extern "C" fn dl_error(_vfs: *mut ffi::sqlite3_vfs, _room: c_int, _message: *mut c_char) {}

/// The default VFS, for what has nothing to do with files.
///
/// # Safety
/// `vfs` must be the one that [`register`] made.
unsafe fn default_vfs(vfs: *mut ffi::sqlite3_vfs) -> *mut ffi::sqlite3_vfs {
    // SAFETY: by the caller's promise; `register` stored the default there, which is never freed.
    unsafe { (*vfs).pAppData.cast() }
}

unsafe extern "C" fn randomness(
    vfs: *mut ffi::sqlite3_vfs,
    bytes: c_int,
    buffer: *mut c_char,
) -> c_int {
    // SAFETY: SQLite calls with our VFS; the arguments are handed on as they came.
    unsafe {
        let default = default_vfs(vfs);
        (*default)
            .xRandomness
            .map_or(0, |call| call(default, bytes, buffer))
    }
}

unsafe extern "C" fn sleep(_vfs: *mut ffi::sqlite3_vfs, _micros: c_int) -> c_int {
    // Only for locks, and there are none.
    0
}

unsafe extern "C" fn current_time(vfs: *mut ffi::sqlite3_vfs, days: *mut f64) -> c_int {
    // SAFETY: as in `randomness`.
    unsafe {
        let default = default_vfs(vfs);
        (*default)
            .xCurrentTime
            .map_or(ffi::SQLITE_ERROR, |call| call(default, days))
    }
}

unsafe extern "C" fn current_time_int64(
    vfs: *mut ffi::sqlite3_vfs,
    millis: *mut ffi::sqlite3_int64,
) -> c_int {
    // SAFETY: as in `randomness`. The default VFS of every platform has version 2 or later.
    unsafe {
        let default = default_vfs(vfs);
        (*default)
            .xCurrentTimeInt64
            .map_or(ffi::SQLITE_ERROR, |call| call(default, millis))
    }
}

unsafe extern "C" fn last_error(
    _vfs: *mut ffi::sqlite3_vfs,
    _room: c_int,
    _message: *mut c_char,
) -> c_int {
    0
}
