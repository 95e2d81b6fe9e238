//! After a run: is everything there that was acknowledged, and nothing else?

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use serde_json::{Value, json};

use tokio::time::Instant;

use crate::client::{Call, Client, Outcome, Target};
use crate::ledger::{Counts, Ledger};
use crate::operation::Store;
use crate::report::Verification;
use crate::visitor::{held, key};

/// How long the verification waits for one object to answer.
const PATIENCE: Duration = Duration::from_secs(20);

/// Keys that a map gives in one call.
const KEYS_MAX: usize = 128;

/// The writers of an object, by number.
type Writers = BTreeMap<u64, Counts>;

/// One object and what it must hold.
#[derive(Clone)]
enum Account {
    Counter(u32, Counts),
    Sharded(u32, Counts),
    Sql(u32, Writers),
    Kv(u32, Writers),
}

/// Reads every object that was touched, over so many connections.
pub(crate) async fn verify(
    target: &Target,
    ledger: Ledger,
    connections: u32,
) -> anyhow::Result<Verification> {
    let mut sum = Verification {
        wrong_answers: ledger.wrong_answers,
        wrong_answer: ledger.wrong_answer.clone(),
        ..Verification::default()
    };
    let all = accounts(ledger);
    let share = all.len().div_ceil(connections as usize).max(1);
    let mut readers = tokio::task::JoinSet::new();
    for part in all.chunks(share) {
        let (part, mut client) = (part.to_vec(), Client::new(target.clone()));
        readers.spawn_local(async move {
            let mut found = Verification::default();
            for account in part {
                account.audit(&mut client, &mut found).await;
            }
            found
        });
    }
    while let Some(part) = readers.join_next().await {
        sum.merge(&part.context("a reader's task panicked")?);
    }
    Ok(sum)
}

fn accounts(ledger: Ledger) -> Vec<Account> {
    let mut writers: BTreeMap<(Store, u32), Writers> = BTreeMap::new();
    let written = ledger.cells.into_iter().filter(|(_, one)| !one.is_empty());
    for (cell, counts) in written {
        let of_object = writers.entry((cell.store, cell.object)).or_default();
        of_object.insert(cell.writer, counts);
    }
    let counters = ledger.counters.into_iter();
    let counters = counters.map(|(number, counts)| Account::Counter(number, counts));
    let sharded = ledger.sharded.into_iter();
    let sharded = sharded.map(|(number, counts)| Account::Sharded(number, counts));
    let cells = writers
        .into_iter()
        .map(|((store, number), writers)| match store {
            Store::Sql => Account::Sql(number, writers),
            Store::Kv | Store::Counter | Store::Sharded => Account::Kv(number, writers),
        });
    counters.chain(sharded).chain(cells).collect()
}

impl Account {
    async fn audit(self, client: &mut Client, found: &mut Verification) {
        found.objects += 1;
        let read = match &self {
            Self::Counter(number, counts) => {
                let value = ask(client, Store::Counter, *number, "value", None).await;
                let total = value.as_ref().and_then(Value::as_u64);
                found.add(*counts, total);
                total.is_some()
            }
            Self::Sharded(number, counts) => {
                let answer = ask(client, Store::Sharded, *number, "value", None).await;
                let total = answer.as_ref().and_then(|answer| answer["value"].as_u64());
                found.add(*counts, total);
                total.is_some()
            }
            Self::Sql(number, writers) => {
                let select = json!(["SELECT writer, n FROM load"]);
                let answer = ask(client, Store::Sql, *number, "exec", Some(&select)).await;
                let totals = answer.as_ref().and_then(totals);
                for (writer, counts) in writers {
                    let total = totals.as_ref().map(|totals| totals.get(writer));
                    found.add(*counts, total.map(|total| total.copied().unwrap_or(0)));
                }
                totals.is_some()
            }
            Self::Kv(number, writers) => audit_map(client, found, *number, writers).await,
        };
        found.unread += u64::from(!read);
    }
}

async fn audit_map(
    client: &mut Client,
    found: &mut Verification,
    number: u32,
    writers: &Writers,
) -> bool {
    let writers: Vec<_> = writers.iter().collect();
    let mut all_read = true;
    for batch in writers.chunks(KEYS_MAX) {
        let keys: Vec<String> = batch.iter().map(|(writer, _)| key(**writer)).collect();
        let answer = ask(client, Store::Kv, number, "get", Some(&json!([keys]))).await;
        for ((_, counts), key) in batch.iter().zip(&keys) {
            let total = answer.as_ref().and_then(|answer| held(&answer[key]));
            all_read &= total.is_some();
            found.add(**counts, total);
        }
    }
    all_read
}

/// The rows of a table of writers.
fn totals(answer: &Value) -> Option<BTreeMap<u64, u64>> {
    let rows = answer.get("rows")?.as_array()?;
    let pair = |row: &Value| Some((row.get(0)?.as_u64()?, row.get(1)?.as_u64()?));
    rows.iter().map(pair).collect()
}

async fn ask(
    client: &mut Client,
    store: Store,
    number: u32,
    method: &'static str,
    arguments: Option<&Value>,
) -> Option<Value> {
    let call = Call {
        store,
        number,
        method,
        arguments: arguments.map_or_else(Bytes::new, |arguments| arguments.to_string().into()),
    };
    match client
        .call_patiently(&call, Instant::now() + PATIENCE)
        .await
    {
        Outcome::Answered(value) => Some(value),
        Outcome::Refused(_) | Outcome::Unknown(_) => None,
    }
}
