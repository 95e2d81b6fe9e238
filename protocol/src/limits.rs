//! Every bound that more than one process relies on. A bound that an operator may move is a default
//! in a config file instead.

use std::time::Duration;

/// Longest object name, in bytes of UTF-8 after percent-decoding.
pub const OBJECT_NAME_BYTES_MAX: usize = 1024;

/// Longest class name, in bytes.
pub const CLASS_NAME_BYTES_MAX: usize = 64;

/// Longest method name of an RPC call, in bytes.
pub const METHOD_NAME_BYTES_MAX: usize = 64;

/// Largest body of an RPC call and largest RPC result, in bytes. Both are held in memory whole.
/// Cloudflare's limit for one RPC message is the same 32 MiB.
pub const RPC_BODY_BYTES_MAX: usize = 32 << 20;

/// Shards of a ring unless its config says otherwise, and the most a ring may have.
pub const SHARDS_DEFAULT: u16 = 128;
pub const SHARDS_MAX: u16 = 4096;

/// Heaviest node of a ring. Placing a shard draws once per unit of weight, so it bounds the cost.
pub const NODE_WEIGHT_MAX: u16 = 1024;

/// Most nodes in a ring, and most workers of one node.
pub const NODES_MAX: usize = 1024;
pub const WORKERS_PER_NODE_MAX: u16 = 256;

/// A client that was told `overloaded` or `unavailable` should wait this long before the next try.
pub const RETRY_AFTER: Duration = Duration::from_secs(1);

const _: () = assert!(
    SHARDS_DEFAULT <= SHARDS_MAX,
    "the default must be a legal ring"
);
const _: () = assert!(
    3 * OBJECT_NAME_BYTES_MAX < 8192,
    "a percent-encoded name must fit in a request line and in a header"
);
