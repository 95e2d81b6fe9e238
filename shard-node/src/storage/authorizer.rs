//! What SQL of classes may do: SQLite asks at every prepare, and now and then while SQL runs.
//!
//! The rules follow Cloudflare's (<https://developers.cloudflare.com/durable-objects/api/sqlite-storage-api/>):
//! no transaction control, because every turn is a transaction already; nothing that reaches other
//! files; the harmless pragmas; and none of our own tables.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rusqlite::Connection;
use rusqlite::hooks::{AuthAction, AuthContext, Authorization};

use super::RESERVED_PREFIX;
use crate::clock;

/// Steps of SQLite's virtual machine between two looks at the clock: about a tenth of a millisecond.
const STEPS_PER_CHECK: i32 = 10_000;

/// Pragmas that may be used in any form: they change nothing, or only this transaction.
const PRAGMAS: [&str; 14] = [
    "data_version",
    "defer_foreign_keys",
    "foreign_key_check",
    "foreign_key_list",
    "function_list",
    "index_info",
    "index_list",
    "index_xinfo",
    "integrity_check",
    "optimize",
    "quick_check",
    "table_info",
    "table_list",
    "table_xinfo",
];

/// Pragmas that may be asked, but not set: some would do harm, the others would be forgotten when the
/// object sleeps.
const PRAGMAS_READ: [&str; 8] = [
    "foreign_keys",
    "freelist_count",
    "ignore_check_constraints",
    "legacy_alter_table",
    "page_count",
    "page_size",
    "recursive_triggers",
    "reverse_unordered_selects",
];

const MODULES: [&str; 7] = [
    "fts5",
    "fts5vocab",
    "rtree",
    "rtree_i32",
    "geopoly",
    "json_each",
    "json_tree",
];

const FUNCTIONS_DENIED: [&str; 3] = ["load_extension", "fts3_tokenizer", "sqlite_log"];

/// The rules of one connection, shared with the hooks that SQLite calls.
///
/// Only one thread ever touches it, but the hooks must be `Send`: hence atomics, all relaxed.
#[derive(Debug)]
pub(super) struct Guard {
    /// SQL of a class is being prepared or run, rather than our own.
    user: AtomicBool,
    /// That SQL has the reserved prefix in its text.
    names_reserved: AtomicBool,
    /// Why the last prepare was denied.
    denial: Mutex<Option<String>>,
    /// Nanoseconds on the monotonic clock; 0 until SQL runs long enough to look at the clock.
    deadline: AtomicU64,
    time_max: Duration,
}

/// Until dropped, the connection runs SQL of the class; afterwards, and before, it trusts its caller.
pub(super) struct UserSql<'a>(&'a Guard);

impl Drop for UserSql<'_> {
    fn drop(&mut self) {
        self.0.user.store(false, Ordering::Relaxed);
    }
}

/// Until dropped, the connection runs our own statements.
pub(super) struct Trusted<'a> {
    guard: &'a Guard,
    user_before: bool,
}

impl Drop for Trusted<'_> {
    fn drop(&mut self) {
        self.guard.user.store(self.user_before, Ordering::Relaxed);
    }
}

impl Guard {
    pub(super) fn new(time_max: Duration) -> Self {
        Self {
            user: AtomicBool::new(false),
            names_reserved: AtomicBool::new(false),
            denial: Mutex::new(None),
            deadline: AtomicU64::new(0),
            time_max,
        }
    }

    pub(super) fn user_sql(&self, sql: &str) -> UserSql<'_> {
        self.user.store(true, Ordering::Relaxed);
        self.names_reserved
            .store(mentions_reserved(sql), Ordering::Relaxed);
        self.take_denial();
        UserSql(self)
    }

    pub(super) fn trusted(&self) -> Trusted<'_> {
        Trusted {
            guard: self,
            user_before: self.user.swap(false, Ordering::Relaxed),
        }
    }

    pub(super) fn names_reserved(&self) -> bool {
        self.names_reserved.load(Ordering::Relaxed)
    }

    pub(super) fn restart_clock(&self) {
        self.deadline.store(0, Ordering::Relaxed);
    }

    pub(super) fn take_denial(&self) -> Option<String> {
        self.denial
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }

    pub(super) fn install(self: &Arc<Self>, connection: &mut Connection) -> rusqlite::Result<()> {
        let guard = Arc::clone(self);
        connection.authorizer(Some(move |context: AuthContext<'_>| {
            guard.authorize(&context.action)
        }))?;
        let guard = Arc::clone(self);
        connection.progress_handler(STEPS_PER_CHECK, Some(move || guard.out_of_time()))
    }

    fn authorize(&self, action: &AuthAction<'_>) -> Authorization {
        if !self.user.load(Ordering::Relaxed) {
            return Authorization::Allow;
        }
        match refuse(action, self.names_reserved()) {
            None => Authorization::Allow,
            Some(reason) => {
                *self.denial.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason);
                Authorization::Deny
            }
        }
    }

    /// Whether SQL has run for its time. The clock starts at the first look at it.
    fn out_of_time(&self) -> bool {
        let now = clock::monotonic_nanos();
        match self.deadline.load(Ordering::Relaxed) {
            0 => {
                let time_max = u64::try_from(self.time_max.as_nanos()).unwrap_or(u64::MAX);
                self.deadline
                    .store(now.saturating_add(time_max).max(1), Ordering::Relaxed);
                false
            }
            deadline => now >= deadline,
        }
    }
}

/// Why a class may not do this; `None` if it may.
fn refuse(action: &AuthAction<'_>, names_reserved: bool) -> Option<String> {
    match action {
        AuthAction::Select | AuthAction::Recursive | AuthAction::Reindex { .. } => None,
        AuthAction::Transaction { .. } | AuthAction::Savepoint { .. } => Some(
            "BEGIN, COMMIT, ROLLBACK and SAVEPOINT are not available: every turn of an object is one \
             transaction already"
                .to_owned(),
        ),
        AuthAction::Attach { .. } | AuthAction::Detach { .. } => Some(
            "ATTACH and DETACH are not available: an object has one database".to_owned(),
        ),
        AuthAction::Pragma {
            pragma_name,
            pragma_value,
        } => {
            let is = |allowed: &&str| allowed.eq_ignore_ascii_case(pragma_name);
            let known = PRAGMAS.iter().any(is)
                || (pragma_value.is_none() && PRAGMAS_READ.iter().any(is));
            (!known).then(|| format!("PRAGMA {pragma_name} is not available"))
        }
        AuthAction::Function { function_name } => FUNCTIONS_DENIED
            .iter()
            .any(|denied| denied.eq_ignore_ascii_case(function_name))
            .then(|| format!("the SQL function {function_name} is not available")),
        AuthAction::CreateVtable { module_name, table_name }
        | AuthAction::DropVtable { module_name, table_name } => {
            let known = MODULES
                .iter()
                .any(|allowed| allowed.eq_ignore_ascii_case(module_name));
            if known {
                reserved(table_name)
            } else {
                Some(format!("virtual tables of {module_name} are not available"))
            }
        }
        AuthAction::AlterTable { table_name, .. } => {
            // The new name of a renamed table is not told here.
            let hidden = names_reserved.then(|| reserved(RESERVED_PREFIX)).flatten();
            reserved(table_name).or(hidden)
        }
        AuthAction::CreateTempIndex { .. }
        | AuthAction::CreateTempTable { .. }
        | AuthAction::CreateTempTrigger { .. }
        | AuthAction::CreateTempView { .. } => Some(
            "temporary tables, views and triggers are not available: they would be gone when the \
             object sleeps"
                .to_owned(),
        ),
        AuthAction::CreateIndex {
            index_name: other,
            table_name,
        }
        | AuthAction::DropIndex {
            index_name: other,
            table_name,
        }
        | AuthAction::CreateTrigger {
            trigger_name: other,
            table_name,
        }
        | AuthAction::DropTrigger {
            trigger_name: other,
            table_name,
        } => reserved(other).or_else(|| reserved(table_name)),
        // ANALYZE and PRAGMA optimize look at every table, ours too, and tell nothing of them.
        AuthAction::Analyze { table_name } => names_reserved.then(|| reserved(table_name)).flatten(),
        AuthAction::Read { table_name, .. } if table_name.eq_ignore_ascii_case("dbstat") => {
            Some("the table dbstat is not available".to_owned())
        }
        AuthAction::CreateTable { table_name }
        | AuthAction::DropTable { table_name }
        | AuthAction::CreateView {
            view_name: table_name,
        }
        | AuthAction::DropView {
            view_name: table_name,
        }
        | AuthAction::Insert { table_name }
        | AuthAction::Delete { table_name }
        | AuthAction::Update { table_name, .. }
        | AuthAction::Read { table_name, .. } => reserved(table_name),
        AuthAction::Unknown { code, .. } => Some(format!("SQL action {code} is not available")),
        // The enum may grow with SQLite; what is not known to be harmless is not allowed.
        _ => Some("this SQL is not available".to_owned()),
    }
}

fn reserved(table: &str) -> Option<String> {
    let taken = table
        .get(..RESERVED_PREFIX.len())
        .is_some_and(|start| start.eq_ignore_ascii_case(RESERVED_PREFIX));
    taken.then(|| format!("names that begin with {RESERVED_PREFIX} are reserved"))
}

pub(super) fn mentions_reserved(sql: &str) -> bool {
    super::contains_ignore_case(sql, RESERVED_PREFIX)
}
