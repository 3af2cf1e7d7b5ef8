// SPDX-License-Identifier: Apache-2.0

//! The store in one SQLite file, owned by one thread.
//!
//! A commit costs one sync of the disk, and that is nearly all of its time. So commits that wait
//! while one is under way share the next transaction.

use std::{
    collections::HashMap,
    fs::{DirBuilder, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
};

use rusqlite::{Connection, OptionalExtension, TransactionBehavior, params};
use tokio::sync::{oneshot, watch};
use uuid::Uuid;

use super::{
    BoxFuture, Change, Completion, Expect, Listing, Object, ObjectStore, Operation, StoreError, Watch,
    check_commit,
    schema::{self, APPLICATION_ID, MIGRATIONS, Migrated},
};

/// The number of changes that are kept for watches.
const CHANGES_KEPT: u64 = 10_000;

/// The number of changes that a watch reads at once.
const BATCH: u32 = 256;

type Reply<T> = oneshot::Sender<Result<T, StoreError>>;

enum Command {
    List { kind: String, reply: Reply<Listing> },
    Get { kind: String, id: Uuid, reply: Reply<Object> },
    Commit(Commit),
    Changes { after: u64, reply: Reply<Vec<Change>> },
}

struct Commit {
    operations: Vec<Operation>,
    done: Completion,
}

/// The most commits that share a transaction.
const TOGETHER: usize = 128;

/// The handle of a store. The store's thread ends with the last handle.
#[derive(Clone, Debug)]
pub struct SqliteStore {
    commands: mpsc::Sender<Command>,
    newest: watch::Receiver<u64>,
}

impl SqliteStore {
    /// Opens or creates the database (mode 0600, its directory 0700), migrates it and starts its
    /// thread.
    ///
    /// # Errors
    /// [`StoreError::Open`], [`StoreError::Corrupt`], [`StoreError::Newer`],
    /// [`StoreError::Failed`].
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let connection = open(path)?;
        let revision: u64 = newest(&connection)?;
        let (tell, newest) = watch::channel(revision);
        let (commands, inbox) = mpsc::channel();
        thread::Builder::new()
            .name("store".into())
            .spawn(move || run(connection, &inbox, &tell))
            .map_err(|source| StoreError::Open { path: path.to_path_buf(), source })?;
        Ok(Self { commands, newest })
    }

    async fn call<T>(&self, command: impl FnOnce(Reply<T>) -> Command + Send) -> Result<T, StoreError> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).map_err(|_| StoreError::Closed)?;
        answer.await.map_err(|_| StoreError::Closed)?
    }
}

impl ObjectStore for SqliteStore {
    fn list(&self, kind: &str) -> BoxFuture<'_, Result<Listing, StoreError>> {
        let kind = kind.to_owned();
        Box::pin(self.call(|reply| Command::List { kind, reply }))
    }

    fn get(&self, kind: &str, id: Uuid) -> BoxFuture<'_, Result<Object, StoreError>> {
        let kind = kind.to_owned();
        Box::pin(self.call(move |reply| Command::Get { kind, id, reply }))
    }

    fn submit(&self, operations: Vec<Operation>, done: Completion) {
        if let Err(mpsc::SendError(Command::Commit(commit))) =
            self.commands.send(Command::Commit(Commit { operations, done }))
        {
            (commit.done)(Err(StoreError::Closed));
        }
    }

    fn watch(&self, revision: u64) -> Box<dyn Watch> {
        Box::new(Changes {
            store: self.clone(),
            newest: self.newest.clone(),
            seen: revision,
            pending: Vec::new().into_iter(),
        })
    }
}

/// A watch: it reads the log of changes whenever the store has a newer revision.
#[derive(Debug)]
struct Changes {
    store: SqliteStore,
    newest: watch::Receiver<u64>,
    seen: u64,
    pending: std::vec::IntoIter<Change>,
}

impl Watch for Changes {
    fn next(&mut self) -> BoxFuture<'_, Result<Change, StoreError>> {
        Box::pin(async {
            loop {
                if let Some(change) = self.pending.next() {
                    self.seen = change.revision;
                    return Ok(change);
                }
                let seen = self.seen;
                self.newest.wait_for(|newest| *newest > seen).await.map_err(|_| StoreError::Closed)?;
                let batch = self.store.call(move |reply| Command::Changes { after: seen, reply }).await?;
                self.pending = batch.into_iter();
            }
        })
    }
}

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Failed(Box::new(error))
    }
}

fn open(path: &Path) -> Result<Connection, StoreError> {
    let cannot = |source| StoreError::Open { path: path.to_path_buf(), source };
    if let Some(dir) = path.parent() {
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(cannot)?;
    }
    // SQLite gives its journal files the mode of the database, which therefore must exist first.
    OpenOptions::new().append(true).create(true).mode(0o600).open(path).map_err(cannot)?;
    let mut connection = Connection::open(path).map_err(|error| cannot(io::Error::other(error)))?;
    prepare(&mut connection, path).map_err(|error| describe(error, path))?;
    Ok(connection)
}

fn prepare(connection: &mut Connection, path: &Path) -> Result<(), StoreError> {
    let corrupt = |detail: String| StoreError::Corrupt { path: path.to_path_buf(), detail };
    let version: u32 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    let owner: i32 = connection.pragma_query_value(None, "application_id", |row| row.get(0))?;
    if version == 0 && owner == 0 {
        let tables: u32 = connection.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
        if tables > 0 {
            return Err(corrupt("it is another program's database".into()));
        }
        connection.pragma_update(None, "application_id", APPLICATION_ID)?;
    } else if owner != APPLICATION_ID {
        return Err(corrupt("it is another program's database".into()));
    }
    connection.pragma_update_and_check(None, "journal_mode", "WAL", |_| Ok(()))?;
    // Claims must outlive a power cut: each commit is synced.
    connection.pragma_update(None, "synchronous", "FULL")?;
    let health: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
    if health != "ok" {
        return Err(corrupt(health));
    }
    match schema::migrate(connection, MIGRATIONS)? {
        Migrated::Newest => Ok(()),
        Migrated::Newer(found) => Err(StoreError::Newer {
            path: path.to_path_buf(),
            found,
            known: u32::try_from(MIGRATIONS.len()).unwrap_or(u32::MAX),
        }),
    }
}

/// Names the file in an error that is about the file.
fn describe(error: StoreError, path: &Path) -> StoreError {
    use rusqlite::ErrorCode::{CannotOpen, DatabaseCorrupt, NotADatabase, PermissionDenied, ReadOnly};
    let StoreError::Failed(source) = error else { return error };
    let code = source.downcast_ref().and_then(rusqlite::Error::sqlite_error_code);
    let path = PathBuf::from(path);
    match code {
        Some(DatabaseCorrupt | NotADatabase) => StoreError::Corrupt { path, detail: source.to_string() },
        Some(CannotOpen | PermissionDenied | ReadOnly) => {
            StoreError::Open { path, source: io::Error::other(source) }
        }
        _ => StoreError::Failed(source),
    }
}

fn run(mut connection: Connection, inbox: &mpsc::Receiver<Command>, tell: &watch::Sender<u64>) {
    let mut next = None;
    // A dropped receiver is no error: the command is carried out all the same.
    while let Some(command) = next.take().or_else(|| inbox.recv().ok()) {
        match command {
            Command::List { kind, reply } => drop(reply.send(list(&mut connection, &kind))),
            Command::Get { kind, id, reply } => drop(reply.send(get(&connection, &kind, id))),
            Command::Changes { after, reply } => drop(reply.send(changes(&connection, after))),
            Command::Commit(first) => {
                let mut group = vec![first];
                while group.len() < TOGETHER {
                    match inbox.try_recv() {
                        Ok(Command::Commit(commit)) => group.push(commit),
                        other => {
                            next = other.ok();
                            break;
                        }
                    }
                }
                let (commits, waiting): (Vec<_>, Vec<_>) =
                    group.into_iter().map(|commit| (commit.operations, commit.done)).unzip();
                let results = commit_all(&mut connection, &commits);
                let revision = results.iter().flatten().flatten().max().copied();
                if let Some(revision) = revision {
                    tell.send_if_modified(|newest| std::mem::replace(newest, revision) != revision);
                }
                for (done, result) in waiting.into_iter().zip(results) {
                    done(result);
                }
            }
        }
    }
}

/// Carries out commits in their order, in one durable step if that is possible.
fn commit_all(connection: &mut Connection, commits: &[Vec<Operation>]) -> Vec<Result<Vec<u64>, StoreError>> {
    if commits.len() > 1
        && let Ok(results) = commit_together(connection, commits)
    {
        return results;
    }
    // One by one, each commit gets its own result, even if the disk is full.
    commits.iter().map(|operations| commit(connection, operations)).collect()
}

/// Carries out commits in one transaction. An impossible one leaves the others alone.
///
/// # Errors
/// The database failed. Nothing was done.
fn commit_together(
    connection: &mut Connection,
    commits: &[Vec<Operation>],
) -> Result<Vec<Result<Vec<u64>, StoreError>>, StoreError> {
    let superseded = superseded(commits);
    let mut transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let mut results = Vec::with_capacity(commits.len());
    for (operations, superseded) in commits.iter().zip(&superseded) {
        if superseded.is_some() {
            results.push(Ok(Vec::new()));
            continue;
        }
        let step = transaction.savepoint()?;
        // Dropping the savepoint rolls it back.
        let result = apply(&step, operations);
        results.push(match result {
            Ok(revisions) => {
                step.commit()?;
                Ok(revisions)
            }
            Err(error @ StoreError::Failed(_)) => return Err(error),
            Err(error) => Err(error),
        });
    }
    for (commit, by) in superseded.into_iter().enumerate() {
        let Some(by) = by else { continue };
        // The later write failed, so this one counts: carry out the commits one by one.
        let Some(Ok(revisions)) = results.get(by) else { return Err(StoreError::Closed) };
        let revisions = Ok(revisions.clone());
        if let Some(result) = results.get_mut(commit) {
            *result = revisions;
        }
    }
    transaction.commit()?;
    Ok(results)
}

/// For each commit, the later one that replaces it; None if it must be carried out. A commit is replaced if it is a
/// single unconditional write, and the group touches this object only by such writes, all with the same name. No reader
/// can then see the difference.
fn superseded(commits: &[Vec<Operation>]) -> Vec<Option<usize>> {
    let alone = |operations: &[Operation]| match operations {
        [Operation::Put { kind, id, name, expect: Expect::Any, .. }] => Some((*kind, *id, name.clone())),
        _ => None,
    };
    let mut names: HashMap<(&str, Uuid), Option<String>> = HashMap::new();
    for operations in commits {
        let plain = alone(operations);
        for operation in operations {
            let name = plain.as_ref().map(|(_, _, name)| name.clone());
            let known = names.entry(operation.key()).or_insert_with(|| name.clone());
            if *known != name {
                *known = None;
            }
        }
    }
    let mut last: HashMap<(&str, Uuid), usize> = HashMap::new();
    let mut found = vec![None; commits.len()];
    for (index, operations) in commits.iter().enumerate().rev() {
        let Some((kind, id, _)) = alone(operations) else { continue };
        if names.get(&(kind, id)).is_some_and(Option::is_some) {
            let by = *last.entry((kind, id)).or_insert(index);
            if let Some(slot) = found.get_mut(index) {
                *slot = (by != index).then_some(by);
            }
        }
    }
    found
}

fn newest(connection: &Connection) -> Result<u64, StoreError> {
    // Not max(revision): the newest change may have been compacted away.
    let newest: Option<u64> = connection
        .query_row("SELECT seq FROM sqlite_sequence WHERE name = 'changes'", [], |row| row.get(0))
        .optional()?;
    Ok(newest.unwrap_or(0))
}

fn list(connection: &mut Connection, kind: &str) -> Result<Listing, StoreError> {
    let transaction = connection.transaction()?;
    let revision = newest(&transaction)?;
    let mut objects = Vec::new();
    let mut query = transaction
        .prepare_cached("SELECT id, name, revision, value FROM objects WHERE kind = ?1 ORDER BY name")?;
    let mut rows = query.query([kind])?;
    while let Some(row) = rows.next()? {
        let id: String = row.get(0)?;
        objects.push(object(kind, &id, row.get(1)?, row.get(2)?, &row.get::<_, String>(3)?)?);
    }
    Ok(Listing { revision, objects })
}

fn get(connection: &Connection, kind: &str, id: Uuid) -> Result<Object, StoreError> {
    let row: Option<(String, u64, String)> = connection
        .prepare_cached("SELECT name, revision, value FROM objects WHERE kind = ?1 AND id = ?2")?
        .query_row(params![kind, id.to_string()], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))
        .optional()?;
    let (name, revision, value) = row.ok_or_else(|| StoreError::NotFound { kind: kind.to_owned(), id })?;
    object(kind, &id.to_string(), name, revision, &value)
}

fn object(kind: &str, id: &str, name: String, revision: u64, value: &str) -> Result<Object, StoreError> {
    let id = Uuid::parse_str(id).unwrap_or_default();
    let value = serde_json::from_str(value).map_err(|source| StoreError::Malformed {
        kind: kind.to_owned(),
        id,
        source,
    })?;
    Ok(Object { kind: kind.to_owned(), id, name, revision, value })
}

fn check(connection: &Connection, kind: &str, id: Uuid, expect: Expect) -> Result<Option<u64>, StoreError> {
    let actual: Option<u64> = connection
        .query_row(
            "SELECT revision FROM objects WHERE kind = ?1 AND id = ?2",
            params![kind, id.to_string()],
            |row| row.get(0),
        )
        .optional()?;
    let expected = match expect {
        Expect::Any => return Ok(actual),
        Expect::Absent => None,
        Expect::Revision(revision) => Some(revision),
    };
    if actual == expected {
        return Ok(actual);
    }
    Err(StoreError::Conflict { kind: kind.to_owned(), id, expected: expected.unwrap_or(0), actual })
}

fn commit(connection: &mut Connection, operations: &[Operation]) -> Result<Vec<u64>, StoreError> {
    check_commit(operations)?;
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let revisions = apply(&transaction, operations)?;
    transaction.commit()?;
    Ok(revisions)
}

fn apply(connection: &Connection, operations: &[Operation]) -> Result<Vec<u64>, StoreError> {
    check_commit(operations)?;
    let mut revisions = Vec::with_capacity(operations.len());
    for operation in operations {
        revisions.push(match operation {
            Operation::Put { kind, id, name, value, expect } => {
                check(connection, kind, *id, *expect)?;
                put(connection, kind, *id, name, &value.to_string())?
            }
            Operation::Delete { kind, id, expect } => match check(connection, kind, *id, *expect)? {
                Some(_) => delete(connection, kind, *id)?,
                None => newest(connection)?,
            },
        });
    }
    Ok(revisions)
}

fn put(connection: &Connection, kind: &str, id: Uuid, name: &str, value: &str) -> Result<u64, StoreError> {
    let id = id.to_string();
    let taken: Option<String> = connection
        .prepare_cached("SELECT id FROM objects WHERE kind = ?1 AND name = ?2 AND id <> ?3")?
        .query_row(params![kind, name, id], |row| row.get(0))
        .optional()?;
    if taken.is_some() {
        return Err(StoreError::NameTaken { kind: kind.to_owned(), name: name.to_owned() });
    }
    let revision = log(connection, kind, &id, Some((name, value)))?;
    connection
        .prepare_cached(
            "INSERT INTO objects (kind, id, name, revision, value) VALUES (?1, ?2, ?3, ?4, ?5)
             ON CONFLICT (kind, id) DO UPDATE SET name = ?3, revision = ?4, value = ?5",
        )?
        .execute(params![kind, id, name, revision, value])?;
    Ok(revision)
}

fn delete(connection: &Connection, kind: &str, id: Uuid) -> Result<u64, StoreError> {
    let id = id.to_string();
    connection.execute("DELETE FROM objects WHERE kind = ?1 AND id = ?2", params![kind, id])?;
    log(connection, kind, &id, None)
}

/// Appends to the log of changes, forgets the oldest, and returns the new revision.
fn log(
    connection: &Connection,
    kind: &str,
    id: &str,
    object: Option<(&str, &str)>,
) -> Result<u64, StoreError> {
    let (name, value) = object.unzip();
    connection.execute(
        "INSERT INTO changes (kind, id, name, value) VALUES (?1, ?2, ?3, ?4)",
        params![kind, id, name, value],
    )?;
    let revision = u64::try_from(connection.last_insert_rowid()).unwrap_or(0);
    connection
        .execute("DELETE FROM changes WHERE revision <= ?1", [revision.saturating_sub(CHANGES_KEPT)])?;
    Ok(revision)
}

fn changes(connection: &Connection, after: u64) -> Result<Vec<Change>, StoreError> {
    let oldest: Option<u64> =
        connection.query_row("SELECT min(revision) FROM changes", [], |row| row.get(0))?;
    if let Some(oldest) = oldest.filter(|oldest| *oldest > after.saturating_add(1)) {
        return Err(StoreError::Compacted { from: after, oldest });
    }
    let mut query = connection.prepare_cached(
        "SELECT revision, kind, id, name, value FROM changes WHERE revision > ?1 ORDER BY revision LIMIT ?2",
    )?;
    let mut rows = query.query(params![after, BATCH])?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        let (revision, kind, id): (u64, String, String) = (row.get(0)?, row.get(1)?, row.get(2)?);
        let object = match (row.get::<_, Option<String>>(3)?, row.get::<_, Option<String>>(4)?) {
            (Some(name), Some(value)) => Some(object(&kind, &id, name, revision, &value)?),
            _ => None,
        };
        found.push(Change { revision, kind, id: Uuid::parse_str(&id).unwrap_or_default(), object });
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn put(id: Uuid, value: u32, expect: Expect) -> Vec<Operation> {
        vec![Operation::Put { kind: "vm", id, name: id.to_string(), value: json!(value), expect }]
    }

    fn written(connection: &Connection) -> Vec<String> {
        let mut query = connection.prepare("SELECT value FROM changes ORDER BY revision").unwrap();
        query.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect()
    }

    #[test]
    fn of_unconditional_writes_in_one_transaction_only_the_last_is_carried_out() {
        let dir = tempfile::tempdir().unwrap();
        let mut connection = open(&dir.path().join("test.db")).unwrap();
        let (one, other) = (Uuid::new_v4(), Uuid::new_v4());
        let commits = vec![
            put(one, 1, Expect::Any),
            put(other, 2, Expect::Any),
            put(one, 3, Expect::Any),
            put(other, 4, Expect::Absent),
            put(one, 5, Expect::Any),
        ];
        let results = commit_all(&mut connection, &commits);
        assert!(matches!(results[3], Err(StoreError::Conflict { .. })));
        assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 4);
        // A condition must see the writes before it.
        assert_eq!(written(&connection), ["2", "5"]);
    }

    #[test]
    fn a_write_counts_if_the_later_one_fails() {
        let dir = tempfile::tempdir().unwrap();
        let mut connection = open(&dir.path().join("test.db")).unwrap();
        let (one, other) = (Uuid::new_v4(), Uuid::new_v4());
        let put = |id, name: &str| {
            vec![Operation::Put {
                kind: "vm",
                id,
                name: name.into(),
                value: json!(name),
                expect: Expect::Any,
            }]
        };
        // The name is free at first, and the object between takes it.
        let commits = vec![put(one, "web1"), put(other, "web2"), put(other, "web1"), put(one, "web1")];
        let results = commit_all(&mut connection, &commits);
        let done: Vec<bool> = results.iter().map(Result::is_ok).collect();
        assert_eq!(done, [true, true, false, true], "{results:?}");
        // A name that an object in the database has.
        let commits = vec![put(Uuid::nil(), "web2"), put(Uuid::nil(), "web2")];
        let results = commit_all(&mut connection, &commits);
        assert!(
            results.iter().all(|result| matches!(result, Err(StoreError::NameTaken { .. }))),
            "{results:?}"
        );
    }

    #[test]
    fn a_database_that_fails_fails_each_commit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("test.db");
        let mut connection = open(&path).unwrap();
        connection.pragma_update(None, "query_only", true).unwrap();
        let commits =
            vec![put(Uuid::new_v4(), 1, Expect::Any), Vec::new(), put(Uuid::new_v4(), 2, Expect::Any)];
        let results = commit_all(&mut connection, &commits);
        assert!(
            matches!(
                results[..],
                [Err(StoreError::Failed(_)), Err(StoreError::Commit(_)), Err(StoreError::Failed(_))]
            ),
            "{results:?}"
        );
        connection.pragma_update(None, "query_only", false).unwrap();
        assert_eq!(written(&connection), [""; 0]);
        let results = commit_all(&mut connection, &commits);
        assert!(results[0].is_ok() && results[1].is_err() && results[2].is_ok(), "{results:?}");
    }
}
