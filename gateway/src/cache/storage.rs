//! The store, as pingora's cache wants one.

use std::any::Any;
use std::ops::Range;

use async_trait::async_trait;
use bytes::Bytes;
use http::StatusCode;
use http::header::{CONTENT_LENGTH, TRANSFER_ENCODING};
use pingora_cache::key::{CacheHashKey, CacheKey};
use pingora_cache::predictor::CacheablePredictor;
use pingora_cache::storage::{
    HandleHit, HandleMiss, HitHandler, MissFinishType, MissHandler, PurgeOutcome, PurgeTarget,
    PurgeType, Storage,
};
use pingora_cache::trace::SpanHandle;
use pingora_cache::{CacheMeta, NoCacheReason};
use pingora_core::{Error, ErrorType, OrErr, Result};
use pingora_http::ResponseHeader;

use super::head::Head;
use super::store::{Entry, Times};
use super::{Cache, Fill};

/// Which entry was found, in the extensions of its meta data.
#[derive(Debug, Clone, Copy)]
struct EntryId(u64);

fn times(meta: &CacheMeta) -> Times {
    Times {
        created: meta.created(),
        epoch: meta.epoch(),
        fresh_until: meta.fresh_until(),
        stale_while_revalidate: meta.stale_while_revalidate_sec(),
        stale_if_error: meta.stale_if_error_sec(),
    }
}

fn meta(entry: &Entry) -> Result<CacheMeta> {
    let Times {
        created,
        epoch,
        fresh_until,
        stale_while_revalidate,
        stale_if_error,
    } = entry.times;
    let lines = entry.head.lines();
    let lines = lines.or_err(ErrorType::InternalError, "the head of a kept answer")?;
    let mut head = ResponseHeader::build_no_case(entry.head.status(), Some(lines.len()))?;
    for (name, value) in lines {
        head.append_header(name, value)?;
    }
    let mut meta = CacheMeta::new(
        fresh_until,
        created,
        stale_while_revalidate,
        stale_if_error,
        head,
    );
    meta.set_epoch_override(epoch);
    if let Some(variance) = entry.variance {
        meta.set_variance(variance);
    }
    meta.extensions_mut().insert(EntryId(entry.id));
    Ok(meta)
}

#[async_trait]
impl Storage for Cache {
    async fn lookup(
        &'static self,
        key: &CacheKey,
        _trace: &SpanHandle,
    ) -> Result<Option<(CacheMeta, HitHandler)>> {
        let Some(entry) = self.store.find(&key.combined_bin()) else {
            return Ok(None);
        };
        let hit: HitHandler = Box::new(Hit::new(entry.body.clone()));
        Ok(Some((meta(&entry)?, hit)))
    }

    async fn get_miss_handler(
        &'static self,
        key: &CacheKey,
        meta: &CacheMeta,
        _trace: &SpanHandle,
    ) -> Result<MissHandler> {
        let Some(fill) = meta.extensions().get::<Fill>().cloned() else {
            return Error::e_explain(ErrorType::InternalError, "an answer without its moment");
        };
        Ok(Box::new(Miss {
            cache: self,
            key: key.clone(),
            head: whole(meta.response_header_copy()),
            times: times(meta),
            variance: meta.variance(),
            fill,
            body: Vec::new(),
            reserved: 0,
        }))
    }

    async fn purge(
        &'static self,
        _target: PurgeTarget<'_>,
        _type: PurgeType,
        _trace: &SpanHandle,
    ) -> Result<PurgeOutcome> {
        // Purges and evictions are the store's own business.
        Ok(PurgeOutcome::NotFound)
    }

    async fn update_meta(
        &'static self,
        key: &CacheKey,
        meta: &CacheMeta,
        _trace: &SpanHandle,
    ) -> Result<bool> {
        let Some(EntryId(id)) = meta.extensions().get::<EntryId>() else {
            return Ok(false);
        };
        let fill = meta.extensions().get::<Fill>();
        let tags = fill.map_or(&[][..], |fill| &fill.tags);
        let head = Head::of(&whole(meta.response_header_copy()));
        Ok(self
            .store
            .renew(&key.combined_bin(), *id, head, times(meta), tags))
    }

    fn as_any(&self) -> &(dyn Any + Send + Sync) {
        self
    }
}

/// The body of an entry on its way to a client.
struct Hit {
    body: Bytes,
    rest: Range<usize>,
}

impl Hit {
    fn new(body: Bytes) -> Self {
        let rest = 0..body.len();
        Self { body, rest }
    }
}

#[async_trait]
impl HandleHit for Hit {
    async fn read_body(&mut self) -> Result<Option<Bytes>> {
        let rest = std::mem::take(&mut self.rest);
        Ok((!rest.is_empty()).then(|| self.body.slice(rest)))
    }

    async fn finish(
        self: Box<Self>,
        _storage: &'static (dyn Storage + Sync),
        _key: &CacheKey,
        _trace: &SpanHandle,
    ) -> Result<()> {
        Ok(())
    }

    fn can_seek(&self) -> bool {
        true
    }

    fn seek(&mut self, start: usize, end: Option<usize>) -> Result<()> {
        let end = end.map_or(self.body.len(), |end| end.min(self.body.len()));
        if start > end {
            return Error::e_explain(ErrorType::InternalError, "a range beyond the body");
        }
        self.rest = start..end;
        Ok(())
    }

    fn as_any(&self) -> &(dyn Any + Send + Sync) {
        self
    }

    fn as_any_mut(&mut self) -> &mut (dyn Any + Send + Sync) {
        self
    }
}

/// An answer that is being received.
struct Miss {
    cache: &'static Cache,
    key: CacheKey,
    head: ResponseHeader,
    times: Times,
    variance: Option<[u8; 16]>,
    fill: Fill,
    body: Vec<u8>,
    /// Of the room for such answers.
    reserved: usize,
}

#[async_trait]
impl HandleMiss for Miss {
    async fn write_body(&mut self, data: Bytes, _eof: bool) -> Result<()> {
        if self.body.len() + data.len() > self.cache.entry_bytes_max {
            let reason = NoCacheReason::ResponseTooLarge;
            self.cache.unkept.mark_uncacheable(&self.key, reason);
            return Error::e_explain(ErrorType::InternalError, "the answer is too large to keep");
        }
        self.body.reserve(data.len());
        let more = self.body.capacity().saturating_sub(self.reserved);
        if !self.cache.store.reserve(more) {
            return Error::e_explain(ErrorType::InternalError, "too many answers come at once");
        }
        self.reserved += more;
        self.body.extend_from_slice(&data);
        Ok(())
    }

    async fn finish(mut self: Box<Self>) -> Result<MissFinishType> {
        let body = std::mem::take(&mut self.body).into_boxed_slice();
        // Chunks and their end are the connection's; the entry has its length.
        if self.head.status != StatusCode::NO_CONTENT {
            self.head.insert_header(CONTENT_LENGTH, body.len())?;
        }
        let entry = Entry {
            id: 0,
            head: Head::of(&self.head),
            body: Bytes::from(body),
            tags: self.fill.tags.clone(),
            variance: self.variance,
            times: self.times,
        };
        let bytes = entry.body.len();
        let key = self.key.combined_bin();
        self.cache.store.insert(key, entry, self.fill.asked);
        Ok(MissFinishType::Created(bytes))
    }
}

/// A head without what concerns one connection.
fn whole(mut head: ResponseHeader) -> ResponseHeader {
    head.remove_header(&TRANSFER_ENCODING);
    head
}

impl Drop for Miss {
    fn drop(&mut self) {
        self.cache.store.release(self.reserved);
    }
}
