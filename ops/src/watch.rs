//! Notices when files change.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::Duration;

/// Looks at files again and again.
///
/// Asking the file system each time is as cheap as it is reliable: it notices a file that is replaced,
/// also behind a symbolic link (as containers get their files), on any file system. Links are followed.
#[derive(Debug)]
pub struct Watch {
    files: Vec<PathBuf>,
    every: Duration,
    /// As last reported.
    known: Vec<Option<Look>>,
}

/// What changes when a file does: device, inode, length, and time of change in seconds and nanoseconds.
type Look = (u64, u64, u64, i64, i64);

impl Watch {
    /// Changes from now on. `every` of 0 sees none.
    pub fn new(files: Vec<PathBuf>, every: Duration) -> Self {
        let known = look(&files);
        Self {
            files,
            every,
            known,
        }
    }

    /// Looks at these files instead. Changes count from now on, unless they are the same files.
    pub fn look_at(&mut self, files: Vec<PathBuf>) {
        if files != self.files {
            self.known = look(&files);
            self.files = files;
        }
    }

    /// Waits until a file changed and then stayed the same for one period: half of a file is not worth
    /// reading, and an empty one is not seen as a change. Whoever must be sure replaces it by renaming
    /// another. Nothing is lost if this is dropped and called again.
    pub async fn changed(&mut self) {
        if self.every.is_zero() || self.files.is_empty() {
            return std::future::pending().await;
        }
        let mut before = look(&self.files);
        loop {
            tokio::time::sleep(self.every).await;
            let now = look(&self.files);
            // Most programs that write a file empty it first, and an empty config is a legal one.
            let emptied = now
                .iter()
                .flatten()
                .any(|(_, _, length, _, _)| *length == 0);
            if now == before && now != self.known && !emptied {
                self.known = now;
                return;
            }
            before = now;
        }
    }
}

fn look(files: &[PathBuf]) -> Vec<Option<Look>> {
    let one = |file: &PathBuf| {
        let seen = std::fs::metadata(file).ok()?;
        Some((
            seen.dev(),
            seen.ino(),
            seen.len(),
            seen.mtime(),
            seen.mtime_nsec(),
        ))
    };
    files.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVERY: Duration = Duration::from_millis(5);

    async fn changes(watch: &mut Watch) -> bool {
        tokio::time::timeout(20 * EVERY, watch.changed())
            .await
            .is_ok()
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_written_replaced_or_removed_is_noticed_once() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a");
        let link = dir.path().join("link");
        std::fs::write(&file, "1").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        let mut watch = Watch::new(vec![link.clone()], EVERY);
        assert!(!changes(&mut watch).await);
        std::fs::write(&file, "22").unwrap();
        assert!(changes(&mut watch).await);
        assert!(!changes(&mut watch).await, "once");
        let other = dir.path().join("b");
        std::fs::write(&other, "33").unwrap();
        std::fs::remove_file(&link).unwrap();
        std::os::unix::fs::symlink(&other, &link).unwrap();
        assert!(changes(&mut watch).await);
        std::fs::remove_file(&other).unwrap();
        assert!(changes(&mut watch).await);
        let mut never = Watch::new(vec![file.clone()], Duration::ZERO);
        std::fs::write(&file, "4").unwrap();
        assert!(!changes(&mut never).await);
    }

    #[tokio::test(start_paused = true)]
    async fn a_file_that_is_still_written_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a");
        std::fs::write(&file, "").unwrap();
        let mut watch = Watch::new(vec![file.clone()], EVERY);
        std::fs::write(&file, "1").unwrap();
        std::fs::write(&file, "").unwrap();
        assert!(!changes(&mut watch).await, "emptied only");
        for length in 1..40 {
            std::fs::write(&file, "x".repeat(length)).unwrap();
            let waited = tokio::time::timeout(EVERY / 2, watch.changed()).await;
            assert!(waited.is_err(), "after {length}");
        }
        assert!(changes(&mut watch).await);
    }
}
