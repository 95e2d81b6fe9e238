//! `/hot` and `/advisor`: the objects that do most, and what this worker has seen of classes and objects.

use std::collections::HashMap;

use ops::advisor::{ClassSeen, ObjectSeen, Seen};
use ops::hot::{HotObject, HotPage, SHOWN};
use protocol::{ObjectId, Problem, ShardId};
use tokio::time::Instant;

use super::{Answer, CATALOGS_AT_ONCE, Operator, answer};
use crate::catalog::{Order, Query};
use crate::hot::{Habits, Measure};
use crate::usage::{ClassUsage, Of};

/// Objects that the advisor looks at of each kind, on each worker.
const LOOKED_AT: u32 = 20;

/// What is known of some objects.
type Objects = HashMap<ObjectId, ObjectSeen>;

impl Operator {
    /// `GET /hot`.
    pub(super) async fn hot(&self) -> Answer {
        let mut page = HotPage::default();
        let hottest = self.host.hot();
        for measure in Measure::ALL {
            let mut objects = Vec::new();
            for hot in hottest.top(measure, SHOWN) {
                if let Some((class, name)) = self.called(hot.id) {
                    objects.push(HotObject {
                        class,
                        id: hot.id.to_string(),
                        name,
                        value: hot.per_second,
                        too_high_by: hot.too_high_by,
                    });
                }
            }
            page.0.insert(measure.name().to_owned(), objects);
            tokio::task::yield_now().await;
        }
        let largest = self.largest(LOOKED_AT).await?.into_iter();
        let largest = largest.map(|row| HotObject {
            class: row.class,
            id: row.id,
            name: row.name,
            value: row.bytes as f64,
            too_high_by: 0.0,
        });
        page.0.insert("bytes".to_owned(), largest.collect());
        Ok(answer(&page))
    }

    /// `GET /advisor`: what this worker has seen; whoever asks adds up and judges.
    pub(super) async fn advisor(&self) -> Answer {
        Ok(answer(&self.seen().await?))
    }

    pub(crate) async fn seen(&self) -> Result<Seen, Problem> {
        let mut objects = Objects::new();
        self.add_busy(&mut objects);
        self.add_large(&mut objects).await?;
        self.add_awake(&mut objects);
        let mut seen = Seen {
            thresholds: (*self.advisor).clone(),
            ..Seen::default()
        };
        // How counters and limits are built of objects is nobody's design but ours.
        let is_judged = |class: &str| self.classes.offers(class);
        self.host
            .metrics()
            .each_class(|usage| seen.classes.push(class_seen(usage)));
        seen.classes.retain(|seen| is_judged(&seen.class));
        for (id, object) in objects {
            if let Some((class, name)) = self.called(id)
                && is_judged(&class)
            {
                seen.objects.push(ObjectSeen {
                    class,
                    id: id.to_string(),
                    name,
                    ..object
                });
            }
        }
        Ok(seen)
    }

    /// The class of an object, and its name as far as it is known here.
    fn called(&self, id: ObjectId) -> Option<(String, Option<String>)> {
        let class = self.classes.of(id)?.name().to_string();
        let awake = self.host.awake_object(id);
        let name = awake.and_then(|object| object.context.storage().known_name());
        let name = name.map(|name| name.to_string()).or_else(|| {
            let found = self.engine.find(id, self.ring.shard_of(id));
            found.ok().flatten()?.name
        });
        Some((class, name))
    }

    fn add_busy(&self, objects: &mut Objects) {
        let now = Instant::now();
        let hottest = self.host.hot();
        for measure in Measure::ALL {
            for hot in hottest.top(measure, LOOKED_AT as usize) {
                let seen = objects.entry(hot.id).or_default();
                // What surely is its own.
                let rate = hot.per_second - hot.too_high_by;
                add_habits(seen, measure, rate, &hot.habits, now);
            }
        }
    }

    async fn add_large(&self, objects: &mut Objects) -> Result<(), Problem> {
        for row in self.largest(LOOKED_AT).await? {
            if let Ok(id) = row.id.parse() {
                objects.entry(id).or_default().bytes = Some(row.bytes);
            }
        }
        let mut most = Vec::new();
        for some in self.catalogs.chunks(CATALOGS_AT_ONCE) {
            for (home, shard) in some {
                let found = self.engine.most_keys(*home, *shard, LOOKED_AT);
                most.extend(found.map_err(|error| unreadable(*shard, &error))?);
            }
            tokio::task::yield_now().await;
        }
        most.sort_by_key(|(id, keys)| (std::cmp::Reverse(*keys), *id));
        for (id, keys) in most.into_iter().take(LOOKED_AT as usize) {
            objects.entry(id).or_default().keys = Some(keys.into());
        }
        Ok(())
    }

    fn add_awake(&self, objects: &mut Objects) {
        let now = Instant::now();
        for object in self.host.longest_awake(LOOKED_AT as usize) {
            let seconds = now.saturating_duration_since(object.woke).as_secs();
            objects.entry(object.id()).or_default().awake_seconds = Some(seconds);
        }
    }

    /// The largest objects of this worker.
    async fn largest(&self, most: u32) -> Result<Vec<crate::catalog::Row>, Problem> {
        let query = Query {
            order: Order::Bytes,
            descending: true,
            limit: most,
            ..Query::default()
        };
        self.refresh().await;
        let mut rows = Vec::new();
        for some in self.catalogs.chunks(CATALOGS_AT_ONCE) {
            for (home, shard) in some {
                let found = self.engine.search(*home, *shard, &query);
                rows.extend(found.map_err(|error| unreadable(*shard, &error))?);
            }
            query.merge(&mut rows);
            tokio::task::yield_now().await;
        }
        Ok(rows)
    }
}

fn unreadable(shard: ShardId, error: &rusqlite::Error) -> Problem {
    Problem::unavailable(format!(
        "the catalog of shard {shard} cannot be read: {error}"
    ))
}

/// What one sketch knows of an object.
fn add_habits(seen: &mut ObjectSeen, measure: Measure, rate: f64, habits: &Habits, now: Instant) {
    match measure {
        Measure::Requests => {
            seen.requests_per_second = Some(rate);
            let besides = habits.besides_alarms().map(|part| part * rate);
            seen.requests_besides_alarms_per_second = besides;
        }
        Measure::RowsRead => {
            seen.rows_read_per_row = habits.rows_read_per_row();
            seen.rows_read_per_request = habits.rows_read_per_request();
        }
        Measure::Alarms => {
            seen.alarm_every_seconds = habits.alarm_every_seconds();
            seen.idle_alarms_in_a_row = Some(habits.idle_alarms);
        }
        Measure::ObjectCalls => {
            seen.object_calls_per_second = Some(rate);
            seen.calls_per_request = habits.calls_per_request();
            seen.fan_out = habits.fan_out(now);
        }
        Measure::TurnSeconds | Measure::RowsWritten => {}
    }
}

fn class_seen(usage: &ClassUsage) -> ClassSeen {
    let stock = usage.stock();
    let (constructed, constructing) = usage.constructors();
    ClassSeen {
        class: usage.class.to_string(),
        objects: stock.objects,
        unnamed: stock.unnamed,
        bytes: stock.bytes,
        objects_by_bytes: stock.by_bytes,
        objects_by_keys: stock.by_keys,
        awake: usage.awake.get(),
        fetches_per_second: usage.per_second(Of::Fetches),
        calls_per_second: usage.per_second(Of::Calls),
        alarms_per_second: usage.per_second(Of::Alarms),
        idle_alarms_per_second: usage.per_second(Of::IdleAlarms),
        wakes_per_second: usage.per_second(Of::Wakes),
        turn_seconds_per_second: usage.per_second(Of::TurnNanos) / 1e9,
        rows_read_per_second: usage.per_second(Of::RowsRead),
        rows_returned_per_second: usage.per_second(Of::RowsReturned),
        rows_written_per_second: usage.per_second(Of::RowsWritten),
        object_calls_per_second: usage.per_second(Of::ObjectCalls),
        constructed,
        constructor_seconds: constructing.as_secs_f64(),
    }
}
