//! One connection: what it writes, what it may read, and whether the answers are right.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::client::{Call, Client, Outcome};
use crate::ledger::{Cell, Counts, Ledger};
use crate::operation::{Operation, Store};

/// The table of `sql-write` and `sql-read`.
const TABLE: &str =
    "CREATE TABLE IF NOT EXISTS load (writer INTEGER PRIMARY KEY, n INTEGER NOT NULL); ";
const UPSERT: &str =
    "INSERT INTO load VALUES (?, 1) ON CONFLICT (writer) DO UPDATE SET n = n + 1 RETURNING n";
const LOOK_UP: &str = "SELECT n FROM load WHERE writer = ?";

/// What all connections of a process share.
pub(crate) struct Shared {
    pub(crate) ledger: RefCell<Ledger>,
    /// Numbers of writers; those of another process begin 2³² further on.
    next_writer: RefCell<u64>,
    /// No other process writes the same counters, so that a value can also be too high.
    alone: bool,
    value_bytes: usize,
}

impl Shared {
    pub(crate) fn new(part: u32, alone: bool, value_bytes: usize) -> Rc<Self> {
        Rc::new(Self {
            ledger: RefCell::default(),
            next_writer: RefCell::new(u64::from(part) << 32),
            alone,
            value_bytes,
        })
    }

    fn new_writer(&self) -> u64 {
        let mut next = self.next_writer.borrow_mut();
        *next += 1;
        *next
    }
}

/// Sends requests one after the other, and keeps the books.
pub(crate) struct Visitor {
    client: Client,
    shared: Rc<Shared>,
    patience: Duration,
    /// Until when the present request is sent again.
    until: Instant,
    /// The cell of this connection in each database or map.
    cells: HashMap<(Store, u32), Cell>,
}

impl Visitor {
    pub(crate) fn new(client: Client, shared: Rc<Shared>, patience: Duration) -> Self {
        Self {
            client,
            shared,
            patience,
            until: Instant::now(),
            cells: HashMap::new(),
        }
    }

    /// Sends one request, which was meant to be sent so long ago, and checks its answer. An error is why it
    /// was refused, or why its outcome is unknown.
    pub(crate) async fn visit(
        &mut self,
        operation: Operation,
        number: u32,
        late: Duration,
    ) -> Result<(), String> {
        // Whoever was kept waiting behind others has waited.
        self.until = Instant::now() + self.patience.saturating_sub(late);
        match operation.store() {
            Store::Counter => self.visit_counter(operation, number).await,
            Store::Sql | Store::Kv => self.visit_cell(operation, number).await,
            Store::Sharded => self.visit_sharded(number).await,
        }
    }

    async fn visit_counter(&mut self, operation: Operation, number: u32) -> Result<(), String> {
        let increment = operation == Operation::Increment;
        let least = {
            let mut ledger = self.shared.ledger.borrow_mut();
            if increment {
                ledger.begin_increment(number) + 1
            } else {
                ledger.acknowledged(number)
            }
        };
        let call = Call {
            store: Store::Counter,
            number,
            method: if increment { "increment" } else { "value" },
            arguments: Bytes::new(),
        };
        let outcome = self.client.call_patiently(&call, self.until).await;
        let mut ledger = self.shared.ledger.borrow_mut();
        let most = if self.shared.alone {
            ledger.possible(number)
        } else {
            u64::MAX
        };
        if increment {
            ledger.end_increment(number);
            let counts = ledger.counters.entry(number).or_default();
            match outcome {
                Outcome::Answered(_) => counts.acknowledged += 1,
                Outcome::Unknown(_) => counts.unknown += 1,
                Outcome::Refused(_) => {}
            }
        }
        let value = answered(outcome)?;
        if !value
            .as_u64()
            .is_some_and(|value| (least..=most).contains(&value))
        {
            let name = operation.name();
            ledger.wrong(format!(
                "{name} of object {number} answered {value}, and {least} to {most} were possible"
            ));
        }
        Ok(())
    }

    /// The total is only known in the end.
    async fn visit_sharded(&mut self, number: u32) -> Result<(), String> {
        let call = Call {
            store: Store::Sharded,
            number,
            method: "increment",
            arguments: Bytes::new(),
        };
        let outcome = self.client.call_patiently(&call, self.until).await;
        let mut ledger = self.shared.ledger.borrow_mut();
        let counts = ledger.sharded.entry(number).or_default();
        match outcome {
            Outcome::Answered(_) => counts.acknowledged += 1,
            Outcome::Unknown(_) => counts.unknown += 1,
            Outcome::Refused(_) => {}
        }
        let answer = answered(outcome)?;
        if answer["by"] != 1 || answer.get("repeated").is_some() {
            ledger.wrong(format!(
                "an increment of counter {number} answered {answer:.200}"
            ));
        }
        Ok(())
    }

    async fn visit_cell(&mut self, operation: Operation, number: u32) -> Result<(), String> {
        let store = operation.store();
        let cell = *self.cells.entry((store, number)).or_insert_with(|| Cell {
            store,
            object: number,
            writer: self.shared.new_writer(),
        });
        let before = {
            let mut ledger = self.shared.ledger.borrow_mut();
            ledger.cells.entry(cell).or_default().acknowledged
        };
        let call = self.cell_call(operation, cell, before);
        let outcome = self.client.call_patiently(&call, self.until).await;
        let mut ledger = self.shared.ledger.borrow_mut();
        let counts = ledger.cells.entry(cell).or_default();
        if operation.writes() {
            match outcome {
                Outcome::Answered(_) => counts.acknowledged += 1,
                Outcome::Unknown(_) => {
                    counts.unknown += 1;
                    self.cells.remove(&(store, number));
                }
                Outcome::Refused(_) => {}
            }
        }
        let value = answered(outcome)?;
        let right = match operation {
            Operation::SqlWrite => rows(&value) == Some(&json!([[before + 1]])),
            Operation::SqlRead if before == 0 => rows(&value) == Some(&json!([])),
            Operation::SqlRead => rows(&value) == Some(&json!([[before]])),
            Operation::KvGet => held(&value) == Some(before),
            _ => value.is_null(),
        };
        if !right {
            let (name, writer) = (operation.name(), cell.writer);
            ledger.wrong(format!(
                "{name} of writer {writer} in object {number} answered {value:.200}, after {before} writes"
            ));
        }
        Ok(())
    }

    fn cell_call(&self, operation: Operation, cell: Cell, before: u64) -> Call {
        let table = if before == 0 { TABLE } else { "" };
        let key = key(cell.writer);
        let (method, arguments) = match operation {
            Operation::SqlWrite => ("exec", json!([format!("{table}{UPSERT}"), cell.writer])),
            Operation::SqlRead => ("exec", json!([format!("{table}{LOOK_UP}"), cell.writer])),
            Operation::KvGet => ("get", json!([key])),
            _ => {
                let width = self.shared.value_bytes;
                ("put", json!([key, format!("{:<width$}", before + 1)]))
            }
        };
        Call {
            store: cell.store,
            number: cell.object,
            method,
            arguments: arguments.to_string().into(),
        }
    }
}

/// The key of a writer in a map.
pub(crate) fn key(writer: u64) -> String {
    format!("writer-{writer}")
}

/// The count that a map holds under a key.
pub(crate) fn held(value: &Value) -> Option<u64> {
    match value {
        Value::Null => Some(0),
        Value::String(text) => text.trim_end().parse().ok(),
        _ => None,
    }
}

fn rows(value: &Value) -> Option<&Value> {
    value.get("rows")
}

fn answered(outcome: Outcome) -> Result<Value, String> {
    match outcome {
        Outcome::Answered(value) => Ok(value),
        Outcome::Refused(why) | Outcome::Unknown(why) => Err(why),
    }
}

impl Counts {
    /// Nothing was written, as far as anybody knows.
    pub(crate) fn is_empty(self) -> bool {
        self == Self::default()
    }
}
