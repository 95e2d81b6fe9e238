//! Where files go that no object works on: a directory, or a bucket that speaks S3.
//!
//! All calls block. They may come from any thread: what a bucket needs of an async runtime is a thread of
//! its own.

use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::TryStreamExt;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{
    ClientConfigKey, MultipartUpload, ObjectStore, ObjectStoreExt, PutPayload, RetryConfig,
};
use tokio::runtime::Runtime;

/// Bytes that are sent or received at once of a file that may be large. S3 wants at least 5 MiB of all
/// parts but the last.
const PART_BYTES: usize = 8 << 20;

/// How long one part may take.
const PART_TIME_MAX: &str = "120 s";

/// How long one call tries again before it gives up.
const RETRY_TIME_MAX: Duration = Duration::from_secs(20);

/// What locations of buckets begin with.
pub const S3_SCHEME: &str = "s3://";

/// Why a store did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("{0:?} cannot be used to store files")]
    Location(String, #[source] Box<dyn std::error::Error + Send + Sync>),
    #[error(transparent)]
    Store(#[from] object_store::Error),
    #[error("a copy on its way to or from the store")]
    File(#[from] io::Error),
}

impl StoreError {
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Store(object_store::Error::NotFound { .. }))
    }
}

/// A store of files with names like paths. Clones share it.
#[derive(Clone)]
pub struct Store {
    files: Arc<dyn ObjectStore>,
    /// Names begin with this.
    prefix: Path,
    runtime: Option<Arc<Background>>,
}

impl Store {
    /// A directory, which is created if it is not there, or `s3://bucket/prefix`. Access to a bucket is as the
    /// environment says: `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, and for servers other than
    /// Amazon's `AWS_ENDPOINT` and perhaps `AWS_ALLOW_HTTP`
    /// (<https://docs.rs/object_store/latest/object_store/aws/struct.AmazonS3Builder.html>).
    ///
    /// # Errors
    /// The location is not valid or the directory cannot be made. A bucket is not looked for.
    pub fn open(location: &str) -> Result<Self, StoreError> {
        let wrong = |error: Box<dyn std::error::Error + Send + Sync>| {
            StoreError::Location(location.to_owned(), error)
        };
        let Some(place) = location.strip_prefix(S3_SCHEME) else {
            std::fs::create_dir_all(location).map_err(|error| wrong(error.into()))?;
            let files = LocalFileSystem::new_with_prefix(location)?.with_fsync(true);
            return Ok(Self::new(Arc::new(files)));
        };
        let (bucket, prefix) = place.split_once('/').unwrap_or((place, ""));
        if bucket.is_empty() {
            return Err(wrong("s3://bucket/prefix names the bucket".into()));
        }
        // Several crates bring cryptography along; whoever was first is good enough.
        drop(rustls::crypto::ring::default_provider().install_default());
        let files = AmazonS3Builder::from_env()
            .with_bucket_name(bucket)
            .with_config(
                AmazonS3ConfigKey::Client(ClientConfigKey::Timeout),
                PART_TIME_MAX,
            )
            .with_retry(RetryConfig {
                retry_timeout: RETRY_TIME_MAX,
                ..RetryConfig::default()
            })
            .build()
            .map_err(|error| wrong(error.into()))?;
        Ok(Self {
            files: Arc::new(files),
            prefix: Path::parse(prefix).map_err(|error| wrong(error.into()))?,
            runtime: Some(Arc::new(Background::new()?)),
        })
    }

    /// One that needs no runtime of tokio's.
    pub fn new(files: Arc<dyn ObjectStore>) -> Self {
        Self {
            files,
            prefix: Path::default(),
            runtime: None,
        }
    }

    /// Stores bytes durably, in the place of what has the name.
    pub fn put(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        self.put_file(name, &mut io::Cursor::new(bytes))
    }

    /// Stores what follows in a file, durably; it is there whole or not at all.
    pub fn put_file(&self, name: &str, file: &mut impl Read) -> Result<(), StoreError> {
        let name = self.path(name);
        let mut part = vec![0; PART_BYTES];
        let mut filled = fill(file, &mut part)?;
        if filled < PART_BYTES {
            part.truncate(filled);
            self.wait(self.files.put(&name, PutPayload::from(part)))?;
            return Ok(());
        }
        let mut upload = self.wait(self.files.put_multipart(&name))?;
        // One after the other: several at once would be tasks of a runtime, and whoever waits here may
        // be the thread of one.
        let sent = loop {
            let payload = PutPayload::from(part[..filled].to_vec());
            if let Err(error) = self.wait(upload.put_part(payload)) {
                break Err(error.into());
            }
            match fill(file, &mut part) {
                Ok(0) => break Ok(()),
                Ok(bytes) => filled = bytes,
                Err(error) => break Err(StoreError::from(error)),
            }
        };
        match sent {
            Ok(()) => {
                self.wait(upload.complete())?;
                Ok(())
            }
            Err(error) => {
                // What is left of it is nobody's; buckets have rules for that.
                drop(self.wait(upload.abort()));
                Err(error)
            }
        }
    }

    /// All of a file that is small.
    pub fn get(&self, name: &str) -> Result<Bytes, StoreError> {
        let name = self.path(name);
        Ok(self.wait(async { self.files.get(&name).await?.bytes().await })?)
    }

    pub fn get_range(&self, name: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let name = self.path(name);
        Ok(self.wait(self.files.get_range(&name, range))?)
    }

    /// Copies `bytes` bytes, from the first on, to where a file is now.
    pub fn get_to_file(&self, name: &str, bytes: u64, file: &mut File) -> Result<(), StoreError> {
        for from in (0..bytes).step_by(PART_BYTES) {
            let to = bytes.min(from + PART_BYTES as u64);
            file.write_all(&self.get_range(name, from..to)?)?;
        }
        Ok(())
    }

    /// Names that begin with a directory, and their bytes, in no order.
    pub fn list(&self, directory: &str) -> Result<Vec<(String, u64)>, StoreError> {
        let below = self.path(directory);
        let found: Vec<_> = self.wait(self.files.list(Some(&below)).try_collect())?;
        let skip = match self.prefix.as_ref() {
            "" => 0,
            prefix => prefix.len() + 1,
        };
        let found = found.into_iter();
        Ok(found
            .map(|meta| (meta.location.as_ref()[skip..].to_owned(), meta.size))
            .collect())
    }

    /// How many bytes a file has; `None` if there is none of that name.
    pub fn size(&self, name: &str) -> Result<Option<u64>, StoreError> {
        let name = self.path(name);
        match self.wait(self.files.head(&name)) {
            Ok(meta) => Ok(Some(meta.size)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    pub fn delete(&self, name: &str) -> Result<(), StoreError> {
        let name = self.path(name);
        match self.wait(self.files.delete(&name)) {
            // Somebody was faster.
            Err(object_store::Error::NotFound { .. }) => Ok(()),
            deleted => Ok(deleted?),
        }
    }

    fn path(&self, name: &str) -> Path {
        let parts = name.split('/').filter(|part| !part.is_empty());
        self.prefix.parts().chain(parts.map(Into::into)).collect()
    }

    fn wait<T: Send>(&self, call: impl Future<Output = T> + Send) -> T {
        let Some(runtime) = &self.runtime else {
            return pollster::block_on(call);
        };
        // A runtime cannot be waited for on a thread that is in another one.
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| runtime.handle().block_on(call));
            match waiting.join() {
                Ok(value) => value,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }
}

/// Reads until a buffer is full or the file ends.
fn fill(file: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(bytes) => filled += bytes,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// A runtime for connections to a bucket. It may be dropped anywhere.
struct Background(Option<Runtime>);

impl Background {
    fn new() -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("store")
            .enable_all()
            .build()?;
        Ok(Self(Some(runtime)))
    }

    fn handle(&self) -> &tokio::runtime::Handle {
        let runtime = self.0.as_ref();
        runtime.expect("it is there until the drop").handle()
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}
