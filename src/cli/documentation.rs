//! The documentation says what this command line is: its commands and settings are parsed, and the reference
//! of the configuration is made from it.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use clap::{ArgAction, Command, CommandFactory as _};

use super::{Cli, config};

#[path = "../../tests/it/markdown.rs"]
mod markdown;

#[test]
fn every_command_line_of_the_documentation_is_valid() {
    let mut parsed = 0;
    for page in markdown::pages() {
        for block in page.blocks().iter().filter(|block| block.language == "sh") {
            for line in command_lines(&block.code) {
                parsed += 1;
                if let Err(error) = line.parse() {
                    panic!("{}:{}: {error}", page.path.display(), block.line);
                }
            }
        }
    }
    assert!(parsed > 25, "{parsed}");
}

/// A command in which `tramline` is run.
struct CommandLine {
    /// What is set for it.
    variables: BTreeMap<String, String>,
    words: Vec<String>,
}

impl CommandLine {
    fn parse(&self) -> Result<(), String> {
        let (mut variables, mut words) = (self.variables.clone(), self.words.clone());
        // The config file is not here: it has what is required.
        if let Some(at) = words.iter().position(|word| word == "--config") {
            words.drain(at..at + 2);
            let settings = [("TRAMLINE_STREAM", "s"), ("TRAMLINE_APP", "a")];
            variables.extend(settings.map(|(k, v)| (k.to_owned(), v.to_owned())));
        }
        match config::parse(words.iter().map(OsString::from), &variables) {
            // As for --version.
            Err(error) if error.exit_code() == 0 => Ok(()),
            Err(error) => Err(format!("{}: {error}", self.words.join(" "))),
            Ok(_) => Ok(()),
        }
    }
}

/// It knows as much of the shell as the documentation uses.
fn command_lines(script: &str) -> Vec<CommandLine> {
    let script = script.replace("\\\n", " ");
    let mut lines = Vec::new();
    for words in script.lines().flat_map(commands_of) {
        let set = words.iter().take_while(|word| is_assignment(word)).count();
        let variables = words[..set].iter().filter_map(|word| word.split_once('='));
        let variables = variables.map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
        if words.get(set).is_some_and(|word| word == "tramline") {
            lines.push(CommandLine { variables, words: words[set..].to_vec() });
        }
    }
    lines
}

fn is_assignment(word: &str) -> bool {
    let name = word.split_once('=').map_or("", |(name, _)| name);
    !name.is_empty() && name.bytes().all(|b| b.is_ascii_uppercase() || b == b'_')
}

/// The words of each command of a line, without what is redirected.
fn commands_of(line: &str) -> Vec<Vec<String>> {
    let mut commands = vec![Vec::new()];
    let (mut word, mut quote) = (None::<String>, None);
    let mut redirected = false;
    let mut end_word = |word: &mut Option<String>, commands: &mut Vec<Vec<String>>, next: bool| {
        if let Some(word) = word.take()
            && !std::mem::take(&mut redirected)
        {
            commands.last_mut().expect("one").push(word);
        }
        redirected |= next;
    };
    for c in line.chars() {
        match (c, quote) {
            (c, Some(open)) if c == open => quote = None,
            (c, Some(_)) => word.get_or_insert_default().push(c),
            ('\'' | '"', None) => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            ('#', None) if word.is_none() => break,
            ('|' | ';' | '&' | '(' | ')', None) => {
                end_word(&mut word, &mut commands, false);
                commands.push(Vec::new());
            }
            ('>' | '<', None) => end_word(&mut word, &mut commands, true),
            (c, None) if c.is_whitespace() => end_word(&mut word, &mut commands, false),
            (c, None) => word.get_or_insert_default().push(c),
        }
    }
    end_word(&mut word, &mut commands, false);
    commands.retain(|words| !words.is_empty());
    commands
}

#[test]
fn the_units_of_systemd_start_what_is_there() {
    for unit in ["tramline-consume.service", "tramline-produce.service"] {
        let text = fs::read_to_string(root().join("systemd").join(unit)).expect("the unit");
        let started = text.lines().find_map(|line| line.strip_prefix("ExecStart=/usr/local/bin/"));
        let lines = command_lines(started.expect("what it starts"));
        let [line] = lines.as_slice() else { panic!("{unit}: {started:?}") };
        if let Err(error) = line.parse() {
            panic!("{unit}: {error}");
        }
    }
}

#[test]
fn every_flag_and_key_that_a_page_names_exists() {
    let mut command = Cli::command();
    command.build();
    let mut flags: BTreeSet<String> = BTreeSet::new();
    collect_flags(&command, &mut flags);
    let mut wrong = Vec::new();
    for page in markdown::pages() {
        // What others call their flags.
        let others = ["cargo ", "systemctl ", "terraform ", "dot ", "aws ", "kill ", "journalctl "];
        for (line, code) in page.code() {
            if others.iter().any(|other| code.contains(other)) || code.contains(" -- ") {
                continue;
            }
            let words = code.split([' ', '=', '|', ',']);
            let named = words.filter_map(|word| word.strip_prefix("--"));
            for flag in named.filter(|flag| !flag.is_empty() && !flags.contains(*flag)) {
                wrong.push(format!("{}:{line}: --{flag}", page.path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "no command has these: {wrong:#?}");
}

fn collect_flags(command: &Command, found: &mut BTreeSet<String>) {
    found.extend(command.get_arguments().filter_map(|arg| arg.get_long()).map(str::to_owned));
    for command in command.get_subcommands() {
        collect_flags(command, found);
    }
}

#[test]
fn every_block_of_settings_in_the_documentation_is_read() {
    let mut command = Cli::command();
    command.build();
    let mut read = 0;
    for page in markdown::pages() {
        for block in page.blocks() {
            if block.language != "toml" || block.reason_not_to_run().is_some() {
                continue;
            }
            read += 1;
            let file = tempfile::Builder::new().suffix(".toml").tempfile().expect("a file");
            fs::write(file.path(), &block.code).expect("a write");
            for table in ["consume", "produce"] {
                let at = format!("{}:{}", page.path.display(), block.line);
                let settings = config::from_file(&command, &[table], file.path());
                let settings = settings.unwrap_or_else(|error| panic!("{at}: {error}"));
                // Values too, where all that is required is there.
                let is_whole = ["stream", "app"].iter().all(|key| settings.contains_key(*key));
                if is_whole || (table == "produce" && block.code.contains("[produce]")) {
                    let args = ["tramline", table, "--config"].map(OsString::from);
                    let args = args.into_iter().chain([file.path().into()]);
                    if let Err(error) = config::parse(args, &Default::default()) {
                        panic!("{at}: {table}: {error}");
                    }
                }
            }
        }
    }
    assert!(read >= 2, "{read}");
}

const MADE: &str =
    "<!-- What follows is made from the program: UPDATE=1 cargo test --lib reference -->\n";

#[test]
fn the_reference_of_the_configuration_is_that_of_the_program() {
    let path = root().join("docs/configuration.md");
    let text = fs::read_to_string(&path).expect("the page");
    let (by_hand, made) = text.split_once(MADE).expect("the line before what is made");
    let wanted = reference();
    if std::env::var_os("UPDATE").is_some() {
        fs::write(&path, format!("{by_hand}{MADE}{wanted}")).expect("a write");
    } else {
        assert!(made == wanted, "run UPDATE=1 cargo test --lib reference");
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}

/// A section for each command, with a table of its settings.
fn reference() -> String {
    let mut command = Cli::command();
    command.build();
    let mut text = String::from("\n## Every command\n\n");
    let global: Vec<&clap::Arg> = command.get_arguments().filter(|arg| is_shown(arg)).collect();
    table(&global, &mut text);
    for below in command.get_subcommands().filter(|below| below.get_name() != "help") {
        section(below, "tramline", &mut text);
    }
    text
}

fn section(command: &Command, path: &str, text: &mut String) {
    let path = format!("{path} {}", command.get_name());
    let about = command.get_about().map(ToString::to_string).unwrap_or_default();
    write!(text, "\n## {path}\n\n{about}.\n").expect("a string");
    let own: Vec<&clap::Arg> =
        command.get_arguments().filter(|arg| is_shown(arg) && !arg.is_global_set()).collect();
    if !own.is_empty() {
        text.push('\n');
        table(&own, text);
    }
    for below in command.get_subcommands().filter(|below| below.get_name() != "help") {
        section(below, &path, text);
    }
}

fn is_shown(arg: &clap::Arg) -> bool {
    !matches!(arg.get_id().as_str(), "help" | "version")
}

fn table(args: &[&clap::Arg], text: &mut String) {
    text.push_str("| flag | variable | key | default | meaning |\n|---|---|---|---|---|\n");
    for arg in args {
        let names = arg.get_value_names().unwrap_or_default().join(" ");
        let takes_value = matches!(arg.get_action(), ArgAction::Set | ArgAction::Append);
        let flag = match (arg.get_long(), takes_value) {
            (Some(long), true) => format!("`--{long} {names}`"),
            (Some(long), false) => match arg.get_short() {
                Some(short) => format!("`-{short}`, `--{long}`"),
                None => format!("`--{long}`"),
            },
            (None, _) => format!("`{names}`"),
        };
        let long = arg.get_long().filter(|long| config::is_set(long));
        let variable = match arg.get_long() {
            Some("config") => "`TRAMLINE_CONFIG`".to_owned(),
            _ => long.map_or(String::new(), |long| format!("`{}`", config::variable(long))),
        };
        let key = long.map_or(String::new(), |long| format!("`{long}`"));
        let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
        let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
        let (help, told) = match help.split_once(" [default: ") {
            Some((help, told)) => (help.to_owned(), told.trim_end_matches(']').to_owned()),
            None => (help, String::new()),
        };
        let values = arg.get_default_values().iter().map(|value| value.to_string_lossy());
        let values = values.map(|value| format!("`{value}`")).collect::<Vec<_>>().join(", ");
        let default = match (arg.is_required_set(), values.is_empty(), takes_value) {
            (true, ..) => "required".to_owned(),
            (_, false, true) => values,
            _ => told,
        };
        let mut meaning = help;
        let possible = arg.get_possible_values();
        if takes_value && !possible.is_empty() {
            let word = |value: &clap::builder::PossibleValue| match value.get_help() {
                Some(help) => format!("`{}` ({help})", value.get_name()),
                None => format!("`{}`", value.get_name()),
            };
            let words: Vec<String> = possible.iter().map(word).collect();
            write!(meaning, ": {}", words.join(", ")).expect("a string");
        }
        let meaning = meaning.replace('|', "\\|").replace('<', "&lt;");
        let flag = flag.replace('|', "\\|");
        writeln!(text, "| {flag} | {variable} | {key} | {default} | {meaning} |")
            .expect("a string");
    }
}
