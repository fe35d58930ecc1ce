//! What is logged and every error are documented.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// The code without tests, each file with its path.
fn sources(folder: &Path, found: &mut Vec<(PathBuf, String)>) {
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        // Embedded servers, and the demo on them.
        if path.ends_with("src/local") || path.ends_with("cli/demo.rs") {
            continue;
        }
        if path.is_dir() {
            sources(&path, found);
            continue;
        }
        let text = fs::read_to_string(&path).expect("a file");
        let tests = ["\nmod tests {", "\nmod server_tests {", "\npub(crate) mod tests {"];
        let end = tests.iter().filter_map(|start| text.find(start)).min();
        let code = text[..end.unwrap_or(text.len())].to_owned();
        found.push((path, code));
    }
}

/// The messages in the code after each `call`.
fn messages(call: &str) -> BTreeSet<String> {
    let mut files = Vec::new();
    sources(&root().join("src"), &mut files);
    let mut found = BTreeSet::new();
    for (path, code) in files {
        for call in code.split(call).skip(1).filter(|call| !call.starts_with("transparent")) {
            let message = message(call);
            found.insert(message.unwrap_or_else(|| panic!("no message in {}", path.display())));
        }
    }
    found
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The first text that is no field's value and no argument, with its lines joined as the compiler does.
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
        if !before.trim_end().ends_with(['=', '(']) {
            return Some(text);
        }
        rest = &tail[end + 1..];
    }
}

/// The messages of the tables of a page, or of one of its sections.
fn documented(page: &str, heading: Option<&str>) -> BTreeSet<String> {
    let docs = fs::read_to_string(root().join(page)).expect("the page");
    let section = match heading {
        Some(heading) => {
            let (_, section) = docs.split_once(&format!("\n## {heading}\n")).expect("a section");
            section.split("\n## ").next().unwrap_or_default()
        }
        None => &docs,
    };
    let rows = section.lines().filter_map(|line| line.strip_prefix("| `"));
    rows.map(|row| {
        let row = row.replace("\\|", "¦");
        let (message, meaning) = row.split_once("` | ").expect("a row");
        assert!(meaning.trim_end_matches(" |").len() > 4, "{message} has no meaning");
        // Double backquotes are around a text that has one.
        let double = message.strip_prefix("` ").and_then(|message| message.strip_suffix(" `"));
        let message = double.unwrap_or(message);
        message.replace('¦', "|")
    })
    .collect()
}

fn compare(page: &str, told: &BTreeSet<String>, documented: &BTreeSet<String>) {
    let undocumented: Vec<_> = told.difference(documented).collect();
    let gone: Vec<_> = documented.difference(told).collect();
    assert!(undocumented.is_empty(), "add these to {page}: {undocumented:#?}");
    assert!(gone.is_empty(), "nothing says these any more, see {page}: {gone:#?}");
}

#[test]
fn every_line_of_the_log_but_details_is_documented() {
    let page = "docs/logs.md";
    for (level, heading) in [("error", "Errors"), ("warn", "Warnings"), ("info", "Information")] {
        let told = messages(&format!("tracing::{level}!("));
        assert!(told.len() > 10, "{level}");
        compare(page, &told, &documented(page, Some(heading)));
    }
}

#[test]
fn every_error_is_documented() {
    let page = "docs/errors.md";
    let shown = |text: String| text.replace("{{", "{").replace("}}", "}");
    let told: BTreeSet<String> = messages("#[error(").into_iter().map(shown).collect();
    assert!(told.len() > 50);
    compare(page, &told, &documented(page, None));
}
