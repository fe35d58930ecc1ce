//! What is logged is documented.

use std::{collections::BTreeSet, fs, path::Path};

/// The messages of a level in the code, each with its level.
fn logged(folder: &Path, found: &mut BTreeSet<(String, String)>) {
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        // Embedded servers, and the demo on them.
        if path.ends_with("src/local") || path.ends_with("cli/demo.rs") {
            continue;
        }
        if path.is_dir() {
            logged(&path, found);
            continue;
        }
        let text = fs::read_to_string(&path).expect("a file");
        let tests = ["\nmod tests {", "\nmod server_tests {", "\npub(crate) mod tests {"];
        let end = tests.iter().filter_map(|start| text.find(start)).min();
        let code = &text[..end.unwrap_or(text.len())];
        for level in ["error", "warn"] {
            for call in code.split(&format!("tracing::{level}!(")).skip(1) {
                let message = message(call);
                let message = message.unwrap_or_else(|| panic!("no message in {}", path.display()));
                found.insert((level.to_owned(), message));
            }
        }
    }
}

/// The first text that is no field's value, with its lines joined as the compiler does.
fn message(call: &str) -> Option<String> {
    let mut before = String::new();
    let mut rest = call;
    loop {
        let (head, tail) = rest.split_once('"')?;
        before.push_str(head);
        let mut text = String::new();
        let mut chars = tail.char_indices().peekable();
        let end = loop {
            match chars.next()? {
                (at, '"') => break at,
                (_, '\\') => match chars.next()?.1 {
                    '\n' => while chars.next_if(|(_, c)| c.is_whitespace()).is_some() {},
                    c => text.push(c),
                },
                (_, c) => text.push(c),
            }
        };
        if !before.trim_end().ends_with('=') {
            return Some(text);
        }
        rest = &tail[end + 1..];
    }
}

/// The messages of a table of docs/logs.md.
fn documented(docs: &str, level: &str, heading: &str) -> BTreeSet<(String, String)> {
    let (_, section) = docs.split_once(&format!("\n## {heading}\n")).expect("a section");
    let section = section.split("\n## ").next().unwrap_or_default();
    let rows = section.lines().filter_map(|line| line.strip_prefix("| `"));
    rows.map(|row| {
        let (message, meaning) = row.split_once("` | ").expect("a row");
        assert!(meaning.trim_end_matches(" |").len() > 4, "{message} has no meaning");
        (level.to_owned(), message.to_owned())
    })
    .collect()
}

#[test]
fn every_warning_and_error_of_the_log_is_documented() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut logged_ones = BTreeSet::new();
    logged(&root.join("src"), &mut logged_ones);
    let docs = fs::read_to_string(root.join("docs/logs.md")).expect("the document");
    let mut listed = documented(&docs, "error", "Errors");
    listed.append(&mut documented(&docs, "warn", "Warnings"));
    let undocumented: Vec<_> = logged_ones.difference(&listed).collect();
    let gone: Vec<_> = listed.difference(&logged_ones).collect();
    assert!(undocumented.is_empty(), "add these to docs/logs.md: {undocumented:#?}");
    assert!(gone.is_empty(), "nothing logs these any more: {gone:#?}");
}
