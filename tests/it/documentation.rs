//! The documentation is true: its links lead somewhere, its commands run, its tests and files exist.
//!
//! A block of the language `sh` is run by bash, as it stands, in a shell of its own. The blocks of a page share
//! a folder and embedded servers, on which there are the stream and the buckets that the page names. What
//! differs for a reader is said in a comment before the block, which pages do not show:
//!
//! - `<!-- run: no, REASON -->`: it is not run. Its `tramline` commands are parsed all the same, by
//!   `src/cli/documentation.rs`, as are those of every block. The same holds for blocks that only call `cargo`,
//!   which these tests are part of, and for the pages of `terraform`, which need an account.
//! - `<!-- run: until TEXT -->`: it goes on until the page ends; the next block starts when TEXT was written.
//!   Variables that it exports on stdout are those of the blocks that follow, as a reader would paste them.
//! - `<!-- run: after a stop of TEXT -->`: a block that goes on and has TEXT in it is stopped first, as by
//!   Ctrl-C.
//! - `<!-- run:`, lines, `-->`: these lines are run, unseen: what a page takes for granted.
//!
//! Ports are replaced by free ones, and `/var/lib/tramline` by the page's folder, so that pages run beside each
//! other and on any machine. Blocks of `toml` are settings, and are read as such (`src/cli/documentation.rs`);
//! of `json`, each line or the whole is JSON. `rust` is compiled as documentation tests, `hcl` is Terraform's, `text` is for people.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::TcpListener,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
    thread,
};

use sha2::{Digest as _, Sha256};

use crate::{
    markdown::{Block, Page, pages},
    support::{Running, Servers, lines, wait_for},
};

const LANGUAGES: [&str; 7] = ["sh", "toml", "json", "hcl", "text", "rust", "rust,no_run"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn every_link_inside_the_repository_leads_somewhere() {
    let pages = pages();
    let anchors: BTreeMap<&Path, BTreeSet<String>> =
        pages.iter().map(|page| (page.path.as_path(), anchors(page))).collect();
    let mut wrong = Vec::new();
    let mut looked_at = 0;
    for page in &pages {
        for (line, link) in links(page) {
            if link.contains("://") || link.starts_with("mailto:") {
                continue;
            }
            looked_at += 1;
            let (file, anchor) = link.split_once('#').unwrap_or((&link, ""));
            let target = match file {
                "" => page.path.clone(),
                file => normal(&page.path.parent().expect("a folder").join(file)),
            };
            let is_there = root().join(&target).exists();
            let has_anchor = anchor.is_empty()
                || anchors.get(target.as_path()).is_some_and(|anchors| anchors.contains(anchor));
            if !is_there || !has_anchor {
                wrong.push(format!("{}:{line}: {link}", page.path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "these lead nowhere: {wrong:#?}");
    assert!(looked_at > 50, "{looked_at}");
}

/// The targets of a page's links, each with its line.
fn links(page: &Page) -> Vec<(usize, String)> {
    let prose = page.prose();
    let mut links = Vec::new();
    for (line, text) in (1..).zip(prose.lines()) {
        let text = without_code(text);
        for rest in text.split("](").skip(1) {
            let target = rest.split(')').next().unwrap_or_default();
            links.push((line, target.to_owned()));
        }
        for rest in text.split(" src=\"").skip(1) {
            links.push((line, rest.split('"').next().unwrap_or_default().to_owned()));
        }
    }
    links
}

/// What a page's headings are linked by.
fn anchors(page: &Page) -> BTreeSet<String> {
    let prose = page.prose();
    let headings = prose.lines().filter(|line| line.starts_with('#'));
    let mut anchors = BTreeSet::new();
    for heading in headings {
        let heading = heading.trim_start_matches('#').trim().to_lowercase();
        let kept = heading.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
        let anchor: String = kept.map(|c| if c == ' ' { '-' } else { c }).collect();
        let again = (1..).map(|n| format!("{anchor}-{n}"));
        let mut names = std::iter::once(anchor.clone()).chain(again);
        let free = names.find(|name| !anchors.contains(name)).expect("a name");
        anchors.insert(free);
    }
    anchors
}

fn without_code(line: &str) -> String {
    line.split('`').step_by(2).collect::<Vec<_>>().join("`")
}

/// A path without `..`.
fn normal(path: &Path) -> PathBuf {
    let mut parts: Vec<&std::ffi::OsStr> = Vec::new();
    for part in path {
        match part == ".." {
            true => drop(parts.pop()),
            false => parts.push(part),
        }
    }
    parts.iter().collect()
}

#[test]
fn every_page_is_in_the_index_of_the_readme() {
    let pages = pages();
    let readme = pages.iter().find(|page| page.path == Path::new("README.md")).expect("it");
    let linked: BTreeSet<String> = links(readme).into_iter().map(|(_, link)| link).collect();
    let missing: Vec<_> = pages
        .iter()
        .map(|page| page.path.to_string_lossy().into_owned())
        .filter(|path| path.starts_with("docs/") && !linked.contains(path))
        .collect();
    assert!(missing.is_empty(), "link these in README.md: {missing:#?}");
}

#[test]
fn every_file_and_every_test_that_a_page_names_exists() {
    let mut wrong = Vec::new();
    let mut tests = 0;
    for page in pages() {
        let code = page.code();
        let mut told = |line: usize, what: &str| {
            wrong.push(format!("{}:{line}: {what}", page.path.display()));
        };
        let folders = ["src/", "tests/", "docs/", "examples/", "systemd/", "terraform/", ".ci/"];
        let is_path = |text: &str| folders.iter().any(|folder| text.starts_with(folder));
        let mut file = None;
        for (line, text) in &code {
            if is_path(text) && !text.contains(['*', ' ', '<']) {
                let beside = page.path.parent().expect("a folder").join(text);
                if !root().join(text).exists() && !root().join(beside).exists() {
                    told(*line, text);
                }
                file = text.ends_with(".rs").then(|| fs::read_to_string(root().join(text)).ok());
                continue;
            }
            // `file::name` is below tests/it, a name alone is in the file that was named last.
            let (source, name) = match text.split_once("::") {
                Some((file, name)) => {
                    let path = root().join("tests/it").join(format!("{file}.rs"));
                    (fs::read_to_string(path).ok(), name)
                }
                None => (file.clone().flatten(), text.as_str()),
            };
            let Some(source) = source.filter(|_| is_test_name(name)) else { continue };
            tests += 1;
            let wanted = match name.strip_suffix('…') {
                Some(beginning) => format!("fn {beginning}"),
                None => format!("fn {name}("),
            };
            if !source.contains(&wanted) {
                told(*line, text);
            }
        }
    }
    assert!(wrong.is_empty(), "these do not exist: {wrong:#?}");
    assert!(tests > 80, "{tests}");
}

fn is_test_name(text: &str) -> bool {
    let is_letter = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "_…".contains(c);
    text.matches('_').count() >= 3 && text.chars().all(is_letter)
}

#[test]
fn every_metric_that_a_page_names_exists() {
    // It is compared with the code where the metrics are made.
    let listed = fs::read_to_string(root().join("docs/metrics.md")).expect("the page");
    let mut named = 0;
    for page in pages() {
        for (line, code) in page.code() {
            let name = code.split('{').next().unwrap_or_default();
            if name.starts_with("tramline_") && name.len() > "tramline_".len() {
                named += 1;
                let is_listed = listed.contains(&format!("\n| `{name}` |"));
                assert!(is_listed, "{}:{line}: there is no {name}", page.path.display());
            }
        }
    }
    assert!(named > 60, "{named}");
}

#[test]
fn each_promise_names_the_tests_that_guard_it() {
    let text = fs::read_to_string(root().join("docs/promises.md")).expect("the page");
    let sections: Vec<&str> = text.split("\n## P").skip(1).collect();
    assert_eq!(sections.len(), 9);
    for (n, section) in (1..).zip(sections) {
        assert!(section.starts_with(&format!("{n} ")), "{section}");
        let guards = section.matches(&format!("p{n}_")).count();
        assert!(guards >= 3, "P{n} names {guards} tests");
    }
}

#[test]
fn the_rust_of_every_page_is_compiled() {
    let library = fs::read_to_string(root().join("src/lib.rs")).expect("the library");
    for page in pages() {
        let has_rust = page.blocks().iter().any(|block| block.language.starts_with("rust"));
        let path = page.path.display().to_string();
        if has_rust && !path.starts_with("examples/") {
            let compiled = format!("#[doc = include_str!(\"../{path}\")]");
            assert!(
                library.contains(&compiled),
                "{path} is not in the documentation tests of src/lib.rs"
            );
        }
    }
}

#[test]
fn pictures_are_made_from_their_text() {
    let folder = root().join("docs/pictures");
    let mut pictures = 0;
    for entry in fs::read_dir(&folder).expect("the folder") {
        let path = entry.expect("an entry").path();
        if path.extension().is_none_or(|ending| ending != "dot") {
            continue;
        }
        pictures += 1;
        let source = fs::read(&path).expect("the text");
        let svg = fs::read_to_string(path.with_extension("svg")).expect("the picture");
        let svg = svg.replace("&#160;", " ").replace("&#45;", "-");
        let hash: String = Sha256::digest(&source).iter().map(|b| format!("{b:02x}")).collect();
        let name = path.file_name().expect("a name").to_string_lossy();
        assert!(
            svg.contains(&format!("made from {name}, SHA-256 {hash}")),
            "{name} has changed: run docs/pictures/make"
        );
        assert!(svg.contains("<title>") && svg.contains("<desc>"), "{name}");
        for label in labels(&String::from_utf8(source).expect("text")) {
            assert!(svg.contains(&label), "{name}: {label:?} is not in the picture");
        }
    }
    assert_eq!(pictures, 2);
}

/// The lines of every label in a text for Graphviz, as they stand in an SVG.
fn labels(dot: &str) -> Vec<String> {
    let labels = dot.split("label=\"").skip(1).map(|rest| rest.split('"').next().unwrap_or(""));
    let lines = labels.flat_map(|label| label.split("\\n").flat_map(|line| line.split("\\l")));
    let shown =
        |line: &str| line.trim().replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    lines.map(shown).filter(|line| !line.is_empty()).collect()
}

#[test]
fn every_block_has_a_language_that_is_checked_and_json_is_json() {
    for page in pages() {
        for block in page.blocks() {
            let at = format!("{}:{}", page.path.display(), block.line);
            assert!(
                LANGUAGES.contains(&block.language.as_str()),
                "{at}: the language {:?}",
                block.language
            );
            let value = |text: &str| serde_json::from_str::<serde_json::Value>(text);
            if block.language == "json"
                && value(&block.code).is_err()
                && let Some(Err(error)) = block.code.lines().map(value).find(Result::is_err)
            {
                panic!("{at}: {error}");
            }
        }
    }
}

#[test]
fn every_command_of_the_documentation_runs() {
    let pages = Mutex::new(pages().into_iter());
    let failures = Mutex::new(Vec::new());
    let ran = Mutex::new(0);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                loop {
                    let Some(page) = pages.lock().expect("a lock").next() else { return };
                    let blocks = page.blocks().into_iter();
                    let to_run: Vec<Block> = blocks.filter(|block| is_run(&page, block)).collect();
                    if to_run.is_empty() {
                        continue;
                    }
                    *ran.lock().expect("a lock") += to_run.len();
                    if let Err(failure) = Reader::new(&page).follow(&to_run) {
                        failures.lock().expect("a lock").push(failure);
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().expect("a lock");
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
    let ran = ran.into_inner().expect("a lock");
    assert!(ran > 20, "{ran} blocks");
}

fn is_run(page: &Page, block: &Block) -> bool {
    let builds = |line: &str| {
        let line = line.trim();
        line.is_empty() || line.starts_with('#') || line.starts_with("cargo ")
    };
    block.language == "sh"
        && block.reason_not_to_run().is_none()
        && !block.code.lines().all(builds)
        && !page.path.starts_with("terraform")
}

/// Someone who does what a page says.
struct Reader {
    _servers: Servers,
    page: String,
    folder: tempfile::TempDir,
    variables: BTreeMap<String, String>,
    ports: BTreeMap<String, u16>,
    /// What goes on, with its block.
    running: Vec<(String, Shell)>,
}

/// A block that runs, with all that it started.
struct Shell(Running);

impl Reader {
    fn new(page: &Page) -> Self {
        let servers = Servers::start();
        for place in ["s3://", "s3-archive://"] {
            for bucket in named(&page.text, place) {
                servers.wait(servers.local.create_bucket(&bucket)).expect("a bucket");
            }
        }
        let mut streams = named(&page.text, "kinesis://");
        streams.insert("ctd-ocs-raw-messages".to_owned());
        for stream in streams {
            servers.create_stream(&stream, 2);
        }
        for (n, key) in [(0, "a"), (10, "d")] {
            servers.put_lines("ctd-ocs-raw-messages", key, &lines(n, n + 10));
        }
        let variables = servers.local.environment();
        let variables = variables.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        let folder = tempfile::tempdir().expect("a folder");
        let page = page.path.display().to_string();
        let (ports, running) = (BTreeMap::new(), Vec::new());
        Self { _servers: servers, page, folder, variables, ports, running }
    }

    fn follow(&mut self, blocks: &[Block]) -> Result<(), String> {
        for block in blocks {
            self.run(block).map_err(|failure| {
                format!("{}:{}: {failure}\n{}", self.page, block.line, block.code.trim_end())
            })?;
        }
        Ok(())
    }

    fn run(&mut self, block: &Block) -> Result<(), String> {
        let note = block.note.as_deref().unwrap_or_default();
        if let Some(stopped) = note.strip_prefix("after a stop of ") {
            self.stop(stopped)?;
        } else if !note.is_empty() && !note.starts_with("until ") {
            return Err(format!("what is {note:?}?"));
        }
        let script = self.here(&block.code);
        let mut shell = self.shell(&script);
        let Some(until) = note.strip_prefix("until ") else {
            let status =
                wait_for(format!("the end of {}:\n{script}", self.page), || shell.0.ended());
            return match status.success() {
                true => Ok(()),
                false => Err(format!("{status}\n{}", shell.told())),
            };
        };
        let ended = wait_for(format!("{until:?} in {}:\n{script}", self.page), || {
            let told = shell.told();
            match told.contains(until) {
                true => Some(None),
                false => shell.0.ended().map(|status| Some(format!("{status}\n{told}"))),
            }
        });
        if let Some(ended) = ended {
            return Err(format!("it ended before it wrote {until:?}, with {ended}"));
        }
        for line in shell.0.stdout() {
            if let Some((name, value)) =
                line.strip_prefix("export ").and_then(|l| l.split_once('='))
            {
                self.variables.insert(name.to_owned(), value.to_owned());
            }
        }
        self.running.push((block.code.clone(), shell));
        Ok(())
    }

    fn stop(&mut self, named: &str) -> Result<(), String> {
        let at = self.running.iter().position(|(code, _)| code.contains(named));
        let (code, mut shell) = self.running.remove(at.ok_or(format!("{named:?} does not run"))?);
        shell.signal("INT");
        wait_for(format!("the stop of {}:\n{code}", self.page), || shell.0.ended());
        Ok(())
    }

    fn shell(&self, script: &str) -> Shell {
        let binary = Path::new(env!("CARGO_BIN_EXE_tramline")).parent().expect("a folder");
        let path = std::env::var("PATH").unwrap_or_default();
        let mut command = Command::new("bash");
        command
            .args(["-euo", "pipefail", "-c", script])
            .current_dir(self.folder.path())
            .process_group(0)
            .env_clear()
            .env("HOME", self.folder.path())
            .env("PATH", format!("{}:{path}", binary.display()))
            .env("AWS_EC2_METADATA_DISABLED", "true")
            .envs(&self.variables);
        Shell(Running::start(command))
    }

    /// The script with ports that are free here, and the page's folder.
    fn here(&mut self, script: &str) -> String {
        let folder = self.folder.path().display().to_string();
        let script = script.replace("/var/lib/tramline", &folder);
        let mut parts = script.split(':');
        let mut here = parts.next().unwrap_or_default().to_owned();
        for part in parts {
            let digits = part.bytes().take_while(u8::is_ascii_digit).count();
            let (port, rest) = part.split_at(digits);
            let is_port =
                (4..=5).contains(&digits) && here.ends_with(|c: char| c.is_alphanumeric());
            here.push(':');
            match is_port {
                true => here.push_str(&self.port(port).to_string()),
                false => here.push_str(port),
            }
            here.push_str(rest);
        }
        here
    }

    fn port(&mut self, port: &str) -> u16 {
        let free = || {
            let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
            listener.local_addr().expect("its address").port()
        };
        *self.ports.entry(port.to_owned()).or_insert_with(free)
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        // Those that came last first: servers are stopped after what uses them.
        while self.running.pop().is_some() {}
    }
}

impl Shell {
    fn told(&self) -> String {
        format!("{}\n{}", self.0.stdout().join("\n"), self.0.stderr())
    }

    /// Signals all that it started.
    fn signal(&self, name: &str) {
        let group = format!("-{}", self.0.id());
        // What has ended is told as not there.
        let _ = Command::new("kill").args(["-s", name, "--", &group]).output();
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        self.signal("KILL");
    }
}

/// What a page names with this scheme.
fn named(text: &str, scheme: &str) -> BTreeSet<String> {
    let names = text.split(scheme).skip(1).map(|rest| {
        let is_name = |c: &char| c.is_ascii_lowercase() || c.is_ascii_digit() || ".-".contains(*c);
        rest.chars().take_while(is_name).collect::<String>()
    });
    names.map(|name| name.trim_end_matches('.').to_owned()).filter(|name| name.len() > 2).collect()
}
