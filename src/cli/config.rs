//! One model of settings: the flags. The environment and the config file name the same ones.
//!
//! The flags are defined once, for clap. From their long names follow the variables (`--lease-table`:
//! `TRAMLINE_LEASE_TABLE`) and the keys (`lease-table`). Clap knows flags and environment; the file's
//! values go in as defaults, so they are parsed, checked and overridden like any other.

use std::{collections::BTreeMap, ffi::OsString, path::Path};

use clap::{
    ArgAction, ArgMatches, Command, CommandFactory as _, Error, FromArgMatches as _,
    error::{ContextKind, ContextValue, ErrorKind},
};
use serde_json::{Map, Value};

use super::{Cli, check::For};

const PREFIX: &str = "TRAMLINE_";

/// Variables that the RFC's producer read: the flag each one sets.
const RFC_VARIABLES: [(&str, &str); 2] = [("LISTEN_PORT", "listen"), ("KINESIS_STREAM", "stream")];

pub(super) struct Parsed {
    pub cli: Cli,
    pub warnings: Vec<String>,
}

/// The environment as text. A variable that is set to nothing is not set; one that is not UTF-8 is no
/// valid setting, and is told as such when it is read.
pub(super) fn process_environment() -> BTreeMap<String, String> {
    std::env::vars_os()
        .filter(|(_, value)| !value.is_empty())
        .filter_map(|(name, value)| {
            Some((name.into_string().ok()?, value.to_string_lossy().into_owned()))
        })
        .collect()
}

/// Reads the command line, the environment and the config file that one of them names.
pub(super) fn parse(
    args: impl IntoIterator<Item = OsString>,
    environment: &BTreeMap<String, String>,
) -> Result<Parsed, Error> {
    let args: Vec<OsString> = args.into_iter().collect();
    let mut command = Cli::command();
    command.build();

    // A first pass, for the command and the config file only; the second one tells what is wrong.
    let first = Cli::command().ignore_errors(true).try_get_matches_from(&args);
    let named = first.as_ref().ok().and_then(|matches| {
        // Of `lease reset` only the first word counts: its settings are those of `lease`.
        let subcommand = matches.subcommand_name().map(str::to_owned);
        let file = matches.get_one::<std::path::PathBuf>("config").cloned();
        let checked = matches.subcommand_matches("check").map(checked);
        Some((
            subcommand?,
            checked,
            file.or_else(|| environment.get("TRAMLINE_CONFIG").map(Into::into)),
        ))
    });
    let mut settings = BTreeMap::new();
    if let Some((subcommand, checked, file)) = named {
        if let Some(file) = file {
            let tables: Vec<&str> = checked.into_iter().chain([subcommand.as_str()]).collect();
            settings = from_file(&command, &tables, &file)
                .map_err(|message| command.error(ErrorKind::InvalidValue, message))?;
        }
        settings.extend(from_environment(environment));
        command = with_defaults(Cli::command(), &subcommand, &settings);
    }

    let matches =
        command.try_get_matches_from(&args).map_err(|error| tell_origin(error, &settings))?;
    let cli = Cli::from_arg_matches(&matches)?;
    Ok(Parsed { cli, warnings: unknown_variables(environment) })
}

/// The command that `check` is to check: its settings apply too.
fn checked(check: &ArgMatches) -> &'static str {
    let produce = check.try_get_one::<For>("command").ok().flatten() == Some(&For::Produce);
    if produce { "produce" } else { "consume" }
}

/// A value from the environment or the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Setting {
    /// One, but for a list in the file.
    values: Vec<String>,
    /// Where it was found, for error messages.
    origin: String,
}

/// The settings of the environment, by flag.
fn from_environment(environment: &BTreeMap<String, String>) -> BTreeMap<String, Setting> {
    let mut settings = BTreeMap::new();
    for (variable, flag) in RFC_VARIABLES {
        if let Some(value) = environment.get(variable) {
            let value = match flag {
                "listen" => format!("0.0.0.0:{value}"),
                _ => value.clone(),
            };
            settings.insert(flag.to_owned(), setting(value, variable));
        }
    }
    for (variable, value) in environment {
        if let Some(name) = variable.strip_prefix(PREFIX) {
            let flag = name.to_lowercase().replace('_', "-");
            settings.insert(flag, setting(value.clone(), variable));
        }
    }
    settings
}

fn setting(value: String, variable: &str) -> Setting {
    Setting { values: vec![value], origin: format!("the environment variable {variable}") }
}

/// The settings of the file that apply, by flag. Keys at the top apply to every command that has the flag;
/// those in a table named after a command to that command only, and they win. Of `applying` tables, the last
/// one does.
pub(super) fn from_file(
    command: &Command,
    applying: &[&str],
    file: &Path,
) -> Result<BTreeMap<String, Setting>, String> {
    let shown = file.display();
    let text = std::fs::read_to_string(file)
        .map_err(|error| format!("the config file {shown} cannot be read: {error}"))?;
    let content: Map<String, Value> = if file.extension().is_some_and(|ending| ending == "json") {
        serde_json::from_str(&text).map_err(|error| error.to_string())
    } else {
        toml::from_str(&text).map_err(|error: toml::de::Error| {
            let line = error.span().map_or(0, |span| text[..span.start].matches('\n').count()) + 1;
            format!("line {line}: {}", error.message().replace('\n', ", "))
        })
    }
    .map_err(|error| format!("the config file {shown} cannot be read: {error}"))?;

    let mut settings = BTreeMap::new();
    let mut tables = Vec::new();
    let everywhere = flags(command);
    for (key, value) in &content {
        match (command.find_subcommand(key), value) {
            (Some(table), Value::Object(entries)) => tables.push((key, table, entries)),
            (Some(_), _) => {
                return Err(format!("{shown}: `{key}` is a command: its settings go in a table"));
            }
            (None, _) => {
                let valid = everywhere
                    .iter()
                    .copied()
                    .chain(command.get_subcommands().map(Command::get_name));
                let flag = known(key, valid, &format!("{shown}: unknown key `{key}`"))?;
                let several = takes_several(command, &flag);
                settings.insert(flag, file_setting(value, several, &shown, key)?);
            }
        }
    }
    tables.sort_by_key(|(name, ..)| applying.iter().position(|table| table == name));
    for (name, table, entries) in tables {
        for (key, value) in entries {
            let path = format!("{name}.{key}");
            let flag =
                known(key, flags(table).into_iter(), &format!("{shown}: unknown key `{path}`"))?;
            let setting = file_setting(value, takes_several(table, &flag), &shown, &path)?;
            if applying.contains(&name.as_str()) {
                settings.insert(flag, setting);
            }
        }
    }
    Ok(settings)
}

/// Whether a flag of the command, or of one below it, may be given several times.
fn takes_several(command: &Command, flag: &str) -> bool {
    let own = command.get_arguments().filter(|arg| arg.get_long() == Some(flag));
    own.into_iter().any(|arg| matches!(arg.get_action(), ArgAction::Append))
        || command.get_subcommands().any(|below| takes_several(below, flag))
}

fn file_setting(
    value: &Value,
    several: bool,
    file: &std::path::Display<'_>,
    key: &str,
) -> Result<Setting, String> {
    let values = match value {
        Value::String(text) => vec![text.clone()],
        Value::Number(number) => vec![number.to_string()],
        Value::Bool(flag) => vec![flag.to_string()],
        Value::Array(texts) if several && texts.iter().all(Value::is_string) => {
            texts.iter().filter_map(Value::as_str).map(str::to_owned).collect()
        }
        Value::Object(entries) if several && entries.values().all(Value::is_string) => {
            let entry = |(name, value): (&String, &Value)| {
                format!("{name}={}", value.as_str().unwrap_or_default())
            };
            entries.iter().map(entry).collect()
        }
        _ if several => {
            return Err(format!("{file}: the key `{key}` takes a text, or a list of texts"));
        }
        _ => {
            return Err(format!(
                "{file}: the key `{key}` takes one value: a text, a number or a boolean"
            ));
        }
    };
    Ok(Setting { values, origin: format!("the key `{key}` in {file}") })
}

/// The flag that a key names, or what is wrong with it and the nearest one. Words of a key may be
/// joined by underscores too.
fn known<'a>(
    key: &str,
    valid: impl Iterator<Item = &'a str>,
    wrong: &str,
) -> Result<String, String> {
    let flag = key.replace('_', "-");
    let valid: Vec<&str> = valid.collect();
    if valid.contains(&flag.as_str()) {
        return Ok(flag);
    }
    Err(match nearest(&flag, valid) {
        Some(nearest) => format!("{wrong}; did you mean `{nearest}`?"),
        None => wrong.to_owned(),
    })
}

fn nearest<'a>(word: &str, valid: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    valid
        .into_iter()
        .map(|candidate| (strsim::jaro_winkler(word, candidate), candidate))
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .map(|(_, candidate)| candidate)
}

/// The long names of the settings of a command and of those below it.
fn flags(command: &Command) -> Vec<&str> {
    let own = command.get_arguments().filter_map(|arg| arg.get_long()).filter(|long| is_set(long));
    own.chain(command.get_subcommands().flat_map(flags)).collect()
}

/// The variable that sets a flag.
pub(super) fn variable(flag: &str) -> String {
    format!("{PREFIX}{}", flag.to_uppercase().replace('-', "_"))
}

/// Whether the environment and the file can set a flag. What confirms a change is said each time.
pub(super) fn is_set(long: &str) -> bool {
    !matches!(long, "help" | "version" | "config" | "yes" | "force" | "reset")
}

/// The command with `settings` as the defaults of its flags.
fn with_defaults(
    command: Command,
    subcommand: &str,
    settings: &BTreeMap<String, Setting>,
) -> Command {
    let setting = |long: &str| settings.get(long).filter(|_| is_set(long));
    let apply = |command: Command| {
        command.mut_args(|arg| match arg.get_long().and_then(setting) {
            Some(setting) => arg.default_values(setting.values.clone()).required(false),
            None => arg,
        })
    };
    apply(command).mut_subcommand(subcommand, |command| apply(command).mut_subcommands(apply))
}

/// Adds to an error about a value where the value comes from, if not from the command line.
fn tell_origin(mut error: Error, settings: &BTreeMap<String, Setting>) -> Error {
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.clone()),
        _ => None,
    };
    let (arg, value) = (text(ContextKind::InvalidArg), text(ContextKind::InvalidValue));
    let flag = arg
        .as_deref()
        .and_then(|arg| arg.trim_start_matches('-').split([' ', '=']).next().map(str::to_owned));
    let setting = flag.and_then(|flag| settings.get(&flag));
    let is_of = |setting: &&Setting| value.as_ref().is_some_and(|v| setting.values.contains(v));
    if let Some(setting) = setting.filter(is_of) {
        let origin = format!("the value comes from {}", setting.origin);
        error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![origin.into()]));
    }
    error
}

/// Variables with our prefix that name no flag of any command. They are no error: the environment is
/// shared, and Kubernetes for one adds variables to it.
fn unknown_variables(environment: &BTreeMap<String, String>) -> Vec<String> {
    let command = Cli::command();
    let mut known: Vec<String> = flags(&command).into_iter().map(variable).collect();
    known.push("TRAMLINE_CONFIG".to_owned());
    environment
        .keys()
        .filter(|variable| variable.starts_with(PREFIX) && !known.contains(variable))
        .map(|variable| {
            let nearest = nearest(variable, known.iter().map(String::as_str)).unwrap_or_default();
            format!("the environment variable {variable} names no setting; did you mean {nearest}?")
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;
    use crate::{
        StartPosition,
        cli::{Command as Subcommand, consume::Consume},
        feed::Format,
    };

    /// What `consume` is given; the file's ending decides its language.
    fn consume(
        args: &[&str],
        environment: &[(&str, &str)],
        file: Option<(&str, &str)>,
    ) -> Result<Consume, String> {
        let mut args: Vec<OsString> =
            [&["tramline", "consume"], args].concat().into_iter().map(OsString::from).collect();
        let file = file.map(|(ending, text)| {
            let mut file = tempfile::Builder::new().suffix(ending).tempfile().expect("a file");
            file.write_all(text.as_bytes()).expect("a write");
            file
        });
        if let Some(file) = &file {
            args.extend(["--config".into(), file.path().into()]);
        }
        let environment =
            environment.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        match parse(args, &environment) {
            Ok(Parsed { cli: Cli { command: Subcommand::Consume(consume), .. }, .. }) => {
                Ok(*consume)
            }
            Ok(_) => Err("another command".into()),
            Err(error) => Err(error.to_string()),
        }
    }

    const FILE: &str = "app = \"from-file\"\n[consume]\nstream = \"from-file\"\nformat = \"raw\"\n";

    #[test]
    fn a_flag_wins_over_the_environment_and_the_environment_over_the_file() {
        let file = Some((".toml", FILE));
        let variable = [("TRAMLINE_STREAM", "from-environment")];

        let given = consume(&[], &[], file).expect("valid");
        assert_eq!((given.stream, given.app.as_str()), (vec!["from-file".to_owned()], "from-file"));
        assert_eq!(given.format, Format::Raw);
        assert_eq!(consume(&[], &variable, file).expect("valid").stream, ["from-environment"]);
        let flag = ["--stream", "from-flag"];
        assert_eq!(consume(&flag, &variable, file).expect("valid").stream, ["from-flag"]);
    }

    #[test]
    fn how_much_is_logged_can_stand_in_the_file() {
        let mut file = tempfile::Builder::new().suffix(".toml").tempfile().expect("a file");
        file.write_all(b"verbose = 2\n[demo]\nquiet = 1\n").expect("a write");
        let mut args: Vec<OsString> = vec!["tramline".into(), "demo".into(), "--config".into()];
        args.push(file.path().into());
        let global = parse(args, &BTreeMap::new()).map(|parsed| parsed.cli.global).ok();
        let global = global.expect("valid");
        assert_eq!((global.verbose, global.quiet), (2, 1));
    }

    #[test]
    fn what_is_checked_has_the_settings_of_the_command_and_its_own_win() {
        let mut file = tempfile::Builder::new().suffix(".toml").tempfile().expect("a file");
        let toml = "[check]\nstream = \"own\"\n[consume]\nstream = \"read\"\napp = \"a\"\nprefetch = \"1MiB\"\n\
                    [produce]\nstream = \"written\"\n";
        file.write_all(toml.as_bytes()).expect("a write");
        let given = |more: &[&str]| {
            let mut args: Vec<OsString> = vec!["tramline".into(), "check".into()];
            args.extend(more.iter().map(OsString::from));
            args.extend(["--config".into(), file.path().into()]);
            let Ok(parsed) = parse(args, &BTreeMap::new()) else { panic!("not valid") };
            format!("{:?}", parsed.cli.command)
        };
        assert!(given(&[]).contains("stream: [\"own\"], app: Some(\"a\")"));
        assert!(given(&["--for", "produce"]).contains("stream: [\"own\"], app: None"));
    }

    #[test]
    fn the_rfcs_variables_rank_below_ours_and_above_the_file() {
        let rfc = ("KINESIS_STREAM", "rfc");
        let file = Some((".toml", FILE));
        assert_eq!(consume(&[], &[rfc], file).expect("valid").stream, ["rfc"]);
        let both = [rfc, ("TRAMLINE_STREAM", "ours")];
        assert_eq!(consume(&[], &both, file).expect("valid").stream, ["ours"]);
    }

    #[test]
    fn the_file_may_be_json_and_join_words_by_underscores() {
        let json = r#"{"stream": "s", "app": "a", "consume": {"exit_when_idle": "5s", "start": "latest"}}"#;
        let given = consume(&[], &[], Some((".json", json))).expect("valid");
        assert_eq!(given.start, StartPosition::Latest);
        assert_eq!(given.exit_when_idle, Some(std::time::Duration::from_secs(5)));
    }

    #[test]
    fn a_table_of_a_command_wins_over_the_top_and_another_commands_table_does_not_count() {
        let toml = "stream = \"top\"\napp = \"a\"\n[consume]\nstream = \"own\"\n[produce]\nstream = \"other\"\n";
        assert_eq!(consume(&[], &[], Some((".toml", toml))).expect("valid").stream, ["own"]);
    }

    #[test]
    fn several_streams_can_be_named_in_each_place() {
        let streams = |given: Result<Consume, String>| given.expect("valid").stream;
        let flags = ["--stream", "a", "--stream", "b", "--app", "x"];
        assert_eq!(streams(consume(&flags, &[], None)), ["a", "b"]);
        let app = ["--app", "x"];
        let variable = [("TRAMLINE_STREAM", "a,b")];
        assert_eq!(streams(consume(&app, &variable, None)), ["a", "b"]);
        let file = Some((".toml", "stream = [\"a\", \"b\"]"));
        assert_eq!(streams(consume(&app, &[], file)), ["a", "b"]);
    }

    #[test]
    fn an_output_of_a_list_may_have_a_comma() {
        let toml = "stream = \"s\"\napp = \"a\"\noutput = [\"a=exec:x 1,2\", \"b=stdout\"]";
        let given = consume(&[], &[], Some((".toml", toml))).expect("valid");
        let names: Vec<_> = given.output.iter().filter_map(|output| output.name.clone()).collect();
        assert_eq!(names, ["a", "b"]);
    }

    #[test]
    fn unknown_keys_are_errors_also_in_tables_of_other_commands() {
        for (toml, said) in [
            ("strem = 1", "unknown key `strem`; did you mean `stream`?"),
            ("[produce]\nlisen = 1", "unknown key `produce.lisen`; did you mean `listen`?"),
            ("[consum]\nstream = \"s\"", "unknown key `consum`; did you mean `consume`?"),
            ("config = \"x\"", "unknown key `config`"),
            ("consume = \"x\"", "`consume` is a command"),
            ("app = [1]", "the key `app` takes one value"),
            ("stream = [1]", "the key `stream` takes a text, or a list of texts"),
        ] {
            let error = consume(&["--app", "a"], &[], Some((".toml", toml))).expect_err(toml);
            assert!(error.contains(said), "{error}");
        }
    }

    #[test]
    fn settings_of_a_command_within_a_command_are_found_but_nothing_is_confirmed_by_them() {
        let reset = |environment: &[(&str, &str)], toml: &str| {
            let mut file = tempfile::Builder::new().suffix(".toml").tempfile().expect("a file");
            file.write_all(toml.as_bytes()).expect("a write");
            let args = ["tramline", "lease", "reset", "--app", "a", "--to", "latest", "--config"];
            let args = args.into_iter().map(OsString::from).chain([file.path().into()]);
            let environment =
                environment.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
            parse(args, &environment)
                .map(|parsed| format!("{:?}", parsed.cli.command))
                .map_err(|error| error.to_string())
        };
        let toml = "[lease]\nstream = \"from-file\"\n";
        assert!(reset(&[], toml).expect("valid").contains("\"from-file\""));
        let variables = [("TRAMLINE_STREAM", "from-environment"), ("TRAMLINE_YES", "true")];
        let given = reset(&variables, toml).expect("valid");
        assert!(given.contains("\"from-environment\"") && given.contains("yes: false"), "{given}");
        let error = reset(&[], "[lease]\nyes = true\n").expect_err("confirms nothing");
        assert!(error.contains("unknown key `lease.yes`"), "{error}");
    }

    #[test]
    fn a_wrong_value_is_told_with_its_origin() {
        let args = ["--stream", "s", "--app", "a"];
        let error = consume(&args, &[("TRAMLINE_START", "noon")], None).expect_err("noon");
        assert!(error.contains("noon") && error.contains("TRAMLINE_START"), "{error}");
        let error =
            consume(&args, &[], Some((".toml", "[consume]\nprefetch = \"big\""))).expect_err("big");
        assert!(error.contains("`consume.prefetch`"), "{error}");
    }

    #[test]
    fn an_unknown_variable_is_a_warning_with_the_nearest_name() {
        let environment = [("TRAMLINE_STRAEM", "s"), ("TRAMLINE_FORMAT", "raw"), ("STRAEM", "s")]
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .into();
        let warnings = unknown_variables(&environment);
        assert_eq!(warnings.len(), 1);
        assert!(warnings[0].contains("did you mean TRAMLINE_STREAM?"), "{}", warnings[0]);
    }

    #[test]
    fn the_model_is_sound() {
        Cli::command().debug_assert();
    }
}
