use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
};

/// Appends whole lines to a file, which is made if it is not there, and returns when they are on the
/// disk.
///
/// A lock keeps others out meanwhile, in this process and in others. A last line without an end, which
/// a crash left there, gets one; what a failed write left is taken back, if the system allows.
pub(super) async fn append(path: &Path, lines: Vec<u8>) -> io::Result<()> {
    let path = PathBuf::from(path);
    // A thread of its own: once begun it goes to its end, so a call that is dropped cuts no line.
    let appended = tokio::task::spawn_blocking(move || append_now(&path, &lines));
    appended.await.map_err(io::Error::other)?
}

fn append_now(path: &Path, lines: &[u8]) -> io::Result<()> {
    // Opened anew each time: a file that was moved away or deleted takes no letter with it.
    let mut file = OpenOptions::new().read(true).append(true).create(true).open(path)?;
    file.lock()?;
    let length = file.metadata()?.len();
    let written = end_last_line(&mut file, length)
        .and_then(|()| file.write_all(lines))
        .and_then(|()| file.sync_data());
    if let Err(error) = written {
        if let Err(error) = file.set_len(length) {
            tracing::debug!("a piece of a line is left in {}: {error}", path.display());
        }
        return Err(error);
    }
    if length == 0 {
        sync_name(path)?;
    }
    Ok(())
}

fn end_last_line(file: &mut File, length: u64) -> io::Result<()> {
    if length == 0 {
        return Ok(());
    }
    let mut last = [0];
    file.seek(SeekFrom::Start(length - 1))?;
    file.read_exact(&mut last)?;
    if last == *b"\n" { Ok(()) } else { file.write_all(b"\n") }
}

/// Makes the name of a new file durable too.
pub(crate) fn sync_name(path: &Path) -> io::Result<()> {
    let dir = match path.parent() {
        Some(dir) if dir != Path::new("") => dir,
        _ => Path::new("."),
    };
    fs::File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::handler::{
        DeadLetter, DeadLetters, dead_letter::tests::letter, dead_letter_line::ReadLine,
    };

    async fn store(path: &Path, letters: &[DeadLetter]) {
        let config = aws_types::SdkConfig::builder().build();
        let store = DeadLetters::file(path).open(&config).await.expect("a file");
        store.store(letters).await.expect("stored");
    }

    fn read(path: &Path) -> Vec<Result<DeadLetter, String>> {
        let text = fs::read(path).expect("a file");
        let lines = text.strip_suffix(b"\n").expect("whole lines").split(|byte| *byte == b'\n');
        lines
            .map(|line| {
                ReadLine::parse(line).map(|read| read.letter).map_err(|error| error.to_string())
            })
            .collect()
    }

    #[tokio::test]
    async fn p9_shards_and_processes_that_share_a_file_tear_no_line_of_each_other() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("letters.jsonl");
        let letter_of = |writer: u8, n| letter(n, "k", vec![writer; 20_000]);
        // Each opens the file for itself, as another process would.
        let writers = (0..8).map(|writer| {
            let path = path.clone();
            tokio::spawn(async move {
                for n in 0..20 {
                    store(&path, &[letter_of(writer, 2 * n), letter_of(writer, 2 * n + 1)]).await;
                }
            })
        });
        for writer in writers.collect::<Vec<_>>() {
            writer.await.expect("a writer");
        }
        let letters: Vec<DeadLetter> =
            read(&path).into_iter().map(|letter| letter.expect("a letter")).collect();
        for writer in 0..8 {
            let of_writer: Vec<&DeadLetter> =
                letters.iter().filter(|letter| letter.data[0] == writer).collect();
            let expected: Vec<DeadLetter> = (0..40).map(|n| letter_of(writer, n)).collect();
            assert!(of_writer == expected.iter().collect::<Vec<_>>(), "writer {writer}");
        }
    }

    #[tokio::test]
    async fn p9_a_line_that_a_crash_cut_off_harms_no_other() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("letters.jsonl");
        store(&path, &[letter(1, "k", "a")]).await;
        let mut torn = fs::read(&path).expect("a file");
        torn.extend_from_slice(&letter(2, "k", "b").line()[..50]);
        fs::write(&path, torn).expect("a file");
        store(&path, &[letter(2, "k", "b")]).await;
        let letters = read(&path);
        assert_eq!(letters.len(), 3);
        assert_eq!(letters[0], Ok(letter(1, "k", "a")));
        assert!(letters[1].as_ref().is_err_and(|error| error.contains("cut short")));
        assert_eq!(letters[2], Ok(letter(2, "k", "b")));
    }

    #[tokio::test]
    async fn a_file_that_was_moved_away_is_made_again() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("letters.jsonl");
        let config = aws_types::SdkConfig::builder().build();
        let store = DeadLetters::file(&path).open(&config).await.expect("a file");
        store.store(&[letter(1, "k", "a")]).await.expect("stored");
        fs::rename(&path, dir.path().join("old")).expect("a move");
        store.store(&[letter(2, "k", "b")]).await.expect("stored");
        assert_eq!(read(&path), [Ok(letter(2, "k", "b"))]);
    }

    #[tokio::test]
    async fn what_never_worked_is_an_error_and_what_worked_once_is_tried_again() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("letters.jsonl");
        let config = aws_types::SdkConfig::builder().build();
        let opened = DeadLetters::file(dir.path().join("none/letters")).open(&config).await;
        let error = opened.err().expect("no such directory").to_string();
        assert!(error.contains("cannot be stored in file:///"), "{error}");
        assert!(error.contains("No such file"), "{error}");

        let store = DeadLetters::file(&path).open(&config).await.expect("a file");
        let block = || {
            fs::remove_file(&path).expect("a file");
            fs::create_dir(&path).expect("a directory in its place");
        };
        block();
        let error = store.store(&[letter(1, "k", "a")]).await.expect_err("a directory").to_string();
        assert!(
            error.starts_with(
                "1 dead letters, the first of stream s, shard shardId-0, sequence number 1, cannot \
                 be stored in file:///"
            ) && error.ends_with("; the checkpoint stays before them"),
            "{error}"
        );

        fs::remove_dir(&path).expect("a directory");
        store.store(&[letter(1, "k", "a")]).await.expect("stored");
        block();
        let letters = [letter(2, "k", "b")];
        let mut waiting = std::pin::pin!(store.store(&letters));
        let early = tokio::time::timeout(Duration::from_millis(500), &mut waiting).await;
        assert!(early.is_err(), "it waits: {early:?}");
        fs::remove_dir(&path).expect("a directory");
        waiting.await.expect("stored");
        assert_eq!(read(&path), [Ok(letter(2, "k", "b"))]);
    }
}
