//! Stands in for the crate of the same name, which builds a C library with cmake.
//!
//! pingora asks for flate2 with the zlib-ng backend. flate2 needs only the zlib interface from it,
//! and `libz-rs-sys` has that interface in Rust, so Dormouse builds with a C compiler alone.
//!
//! The one difference: here the allocator fields of [`z_stream`] are plain function pointers, there
//! they are optional ones. Both have one layout, so the functions below only cast the pointer.
#![allow(
    non_camel_case_types,
    non_snake_case,
    reason = "zlib's names, which flate2 asks for"
)]
#![expect(
    clippy::missing_safety_doc,
    reason = "the contract of each function is zlib's manual"
)]

use core::ffi::{c_char, c_int, c_uint, c_ulong, c_void};

pub use libz_rs_sys::{
    Z_BEST_COMPRESSION, Z_BEST_SPEED, Z_BLOCK, Z_BUF_ERROR, Z_DATA_ERROR, Z_DEFAULT_COMPRESSION,
    Z_DEFAULT_STRATEGY, Z_DEFLATED, Z_FINISH, Z_FULL_FLUSH, Z_MEM_ERROR, Z_NEED_DICT,
    Z_NO_COMPRESSION, Z_NO_FLUSH, Z_OK, Z_PARTIAL_FLUSH, Z_STREAM_END, Z_STREAM_ERROR,
    Z_SYNC_FLUSH, Z_VERSION_ERROR, zlibVersion,
};

pub type uInt = c_uint;
pub type uLong = c_ulong;
pub type Bytef = u8;
pub type voidpf = *mut c_void;
pub type alloc_func = unsafe extern "C" fn(voidpf, uInt, uInt) -> voidpf;
pub type free_func = unsafe extern "C" fn(voidpf, voidpf);

/// zlib's state of one stream, with the fields and the order of `zlib.h`.
#[repr(C)]
pub struct z_stream {
    pub next_in: *mut Bytef,
    pub avail_in: uInt,
    pub total_in: uLong,
    pub next_out: *mut Bytef,
    pub avail_out: uInt,
    pub total_out: uLong,
    pub msg: *mut c_char,
    pub state: *mut internal_state,
    pub zalloc: alloc_func,
    pub zfree: free_func,
    pub opaque: voidpf,
    pub data_type: c_int,
    pub adler: uLong,
    pub reserved: uLong,
}
pub type z_streamp = *mut z_stream;

/// Opaque to callers.
pub enum internal_state {}

const _: () = assert!(size_of::<z_stream>() == size_of::<libz_rs_sys::z_stream>());
const _: () = assert!(align_of::<z_stream>() == align_of::<libz_rs_sys::z_stream>());

macro_rules! forward {
    ($($name:ident($($argument:ident: $type:ty),*);)*) => {$(
        pub unsafe extern "C" fn $name(stream: z_streamp $(, $argument: $type)*) -> c_int {
            // SAFETY: the two stream types have one layout (asserted above; `Option` of a function
            // pointer is a nullable pointer), and the caller keeps zlib's contract.
            unsafe { libz_rs_sys::$name(stream.cast::<libz_rs_sys::z_stream>() $(, $argument)*) }
        }
    )*};
}

forward! {
    deflate(flush: c_int);
    deflateEnd();
    deflateReset();
    deflateParams(level: c_int, strategy: c_int);
    deflateSetDictionary(dictionary: *const Bytef, length: uInt);
    deflateInit2_(level: c_int, method: c_int, window_bits: c_int, mem_level: c_int,
                  strategy: c_int, version: *const c_char, stream_size: c_int);
    inflate(flush: c_int);
    inflateEnd();
    inflateReset2(window_bits: c_int);
    inflateSetDictionary(dictionary: *const Bytef, length: uInt);
    inflateInit2_(window_bits: c_int, version: *const c_char, stream_size: c_int);
}
