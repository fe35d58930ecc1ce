//! The documentation as tests read it, here and in `src/cli/documentation.rs`: pages, fenced blocks, and code
//! in the text.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// A file in Markdown, by its path in the repository.
pub struct Page {
    pub path: PathBuf,
    pub text: String,
}

/// A fenced block, or a script in a comment, which readers do not see.
pub struct Block {
    pub line: usize,
    pub language: String,
    pub code: String,
    /// What the comment before it says, `<!-- run: … -->`.
    pub note: Option<String>,
}

impl Block {
    /// Why it is not run, if so.
    pub fn reason_not_to_run(&self) -> Option<&str> {
        self.note.as_deref()?.strip_prefix("no, ")
    }
}

/// The pages that are written for users.
pub fn pages() -> Vec<Page> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut paths = vec![root.join("README.md"), root.join("CHANGELOG.md")];
    for folder in ["docs", "examples", "systemd", "terraform"] {
        collect(&root.join(folder), &mut paths);
    }
    paths.sort();
    let page = |path: PathBuf| Page {
        text: fs::read_to_string(&path).expect("a page"),
        path: path.strip_prefix(root).expect("below the root").to_owned(),
    };
    paths.into_iter().map(page).collect()
}

fn collect(folder: &Path, found: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            collect(&path, found);
        } else if path.extension().is_some_and(|ending| ending == "md") {
            found.push(path);
        }
    }
}

impl Page {
    pub fn blocks(&self) -> Vec<Block> {
        let mut blocks = Vec::new();
        let mut note = None;
        let mut lines = self.text.lines().zip(1..);
        while let Some((text, line)) = lines.next() {
            let text = text.trim_start();
            if let Some(info) = text.strip_prefix("```") {
                let inside = lines.by_ref().map(|(line, _)| line.trim_end());
                let code: Vec<&str> = inside.take_while(|line| line.trim() != "```").collect();
                let (language, code) = (info.trim().to_owned(), code.join("\n"));
                blocks.push(Block { line, language, code, note: note.take() });
            } else if let Some(said) = text.strip_prefix("<!-- run:") {
                match said.strip_suffix("-->") {
                    Some(said) => note = Some(said.trim().to_owned()),
                    None => {
                        let inside = lines.by_ref().map(|(line, _)| line);
                        let code: Vec<&str> =
                            inside.take_while(|line| line.trim() != "-->").collect();
                        let (language, code) = ("sh".to_owned(), code.join("\n"));
                        blocks.push(Block { line, language, code, note: None });
                    }
                }
            } else if !text.is_empty() {
                assert_eq!(note, None, "{}:{line}: no block after it", self.path.display());
            }
        }
        blocks
    }

    /// The text without blocks and comments, each line in its place.
    pub fn prose(&self) -> String {
        let (mut fenced, mut hidden) = (false, false);
        let line = |line: &str| {
            let is_fence = line.trim_start().starts_with("```");
            fenced ^= is_fence;
            hidden |= line.trim_start().starts_with("<!--");
            let shown = !fenced && !is_fence && !hidden;
            hidden &= !line.trim_end().ends_with("-->");
            if shown { format!("{line}\n") } else { "\n".to_owned() }
        };
        self.text.lines().map(line).collect()
    }

    /// What stands between backquotes in the text, each with its line.
    pub fn code(&self) -> Vec<(usize, String)> {
        // A piece of code may be wrapped, but does not go beyond its paragraph.
        let prose = self.prose();
        let mut codes = Vec::new();
        let mut first = 1;
        for paragraph in prose.split_inclusive("\n\n") {
            for (n, piece) in paragraph.split('`').enumerate() {
                if n % 2 == 1 {
                    let words: Vec<&str> = piece.split_whitespace().collect();
                    codes.push((first, words.join(" ")));
                }
                first += piece.matches('\n').count();
            }
        }
        codes
    }
}
