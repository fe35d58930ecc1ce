//! Whether a command could do its work: its settings, credentials, permissions and resources.
//!
//! Nothing is changed by it. What reads is tried. What writes is tried where a call can be made that AWS
//! must refuse after it has looked at the permission: a condition that never holds, a hash key that no
//! shard has. The rows of [`permissions`] are what is gone through, so that none is forgotten.

mod clock;
mod dynamodb;
mod kinesis;
mod s3;

use std::{collections::BTreeMap, path::Path};

use aws_credential_types::provider::ProvideCredentials as _;
use aws_types::SdkConfig;
use serde::Serialize;

use crate::{
    Checkpoints, DeadLetters, Retrieval,
    aws::{AwsError, AwsErrorKind, skew_text},
    handler::{Destination, is_stream_name},
    permissions::{self, Command, Permission, Resource, When},
};

/// What is to be done, as the command is told it.
#[derive(Debug)]
pub(crate) struct Settings {
    pub command: Command,
    pub streams: Vec<String>,
    pub applications: Vec<Application>,
    pub retrieval: Retrieval,
    /// `None` where nothing is stored.
    pub checkpoints: Option<Checkpoints>,
    pub dead_letters: Option<DeadLetters>,
    /// Bucket and prefix.
    pub archive: Option<(String, String)>,
}

/// An application, and its lease table.
#[derive(Debug)]
pub(crate) struct Application {
    pub name: String,
    pub lease_table: String,
}

/// What came of one check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Outcome {
    Pass,
    Fail,
    NotTried,
}

/// One check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Line {
    pub outcome: Outcome,
    /// What was looked at, such as `stream ctd-ocs-raw-messages`.
    pub check: String,
    /// The IAM action that was tried.
    pub action: Option<&'static str>,
    /// What was found.
    pub detail: String,
    /// The IAM action that is missing.
    pub missing_action: Option<&'static str>,
    /// What to do, if anything.
    pub repair: Option<String>,
}

/// Why a call did not pass.
enum Trouble {
    /// AWS said so.
    Aws(AwsError),
    /// It is there and wrong, or not there.
    Wrong { detail: String, repair: String },
    /// No call was made.
    NotTried(String),
}

impl From<AwsError> for Trouble {
    fn from(error: AwsError) -> Self {
        Self::Aws(error)
    }
}

/// What a call that passed tells.
type Found = Result<String, Trouble>;

/// Looks at everything that the command needs.
pub(crate) async fn run(config: &SdkConfig, settings: &Settings) -> Vec<Line> {
    let mut report = Report::new(settings.command);
    let named = report.configuration(settings);
    let region = report.region(config);
    let ready = named && region && report.credentials(config).await;
    let clock = clock::Clock::default();
    if ready {
        report.services(config, settings, &clock).await;
        report.clock(&clock);
    } else {
        let detail = "without what failed above, AWS is not asked".to_owned();
        report.line(Outcome::NotTried, "permissions and resources", detail);
    }
    report.files(settings);
    report.lines
}

/// The lines so far.
struct Report {
    command: Command,
    lines: Vec<Line>,
    /// The services that answered, and those that are not asked again, with the reason.
    services: BTreeMap<&'static str, Option<String>>,
    /// A call that AWS refused because of the clock of this machine.
    refused_for_clock: Option<AwsError>,
}

impl Report {
    fn new(command: Command) -> Self {
        Self { command, lines: Vec::new(), services: BTreeMap::new(), refused_for_clock: None }
    }

    fn line(&mut self, outcome: Outcome, check: impl Into<String>, detail: impl Into<String>) {
        self.lines.push(Line {
            outcome,
            check: check.into(),
            action: None,
            detail: detail.into(),
            missing_action: None,
            repair: None,
        });
    }

    fn failed(&mut self, check: &str, detail: impl Into<String>, repair: impl Into<String>) {
        self.line(Outcome::Fail, check, detail);
        if let Some(line) = self.lines.last_mut() {
            line.repair = Some(repair.into());
        }
    }

    /// Whether the settings make sense.
    fn configuration(&mut self, settings: &Settings) -> bool {
        const CHECK: &str = "configuration";
        let wrong = settings.streams.iter().find(|name| !is_stream_name(name));
        if let Some(name) = wrong {
            let repair = "write 1 to 128 letters, digits, _ . and - for --stream";
            self.failed(CHECK, format!("{name:?} cannot be the name of a stream"), repair);
            return false;
        }
        let (command, streams) = (settings.command, settings.streams.join(", "));
        let detail = match command {
            Command::Produce => format!("produce writes stream {streams}"),
            Command::Replay => format!("replay reads stream {streams}"),
            Command::Redrive => {
                let Some(letters) = &settings.dead_letters else {
                    let repair = "pass --dead-letters, the place that is told to redrive as --from";
                    self.failed(CHECK, "no place of dead letters is set", repair);
                    return false;
                };
                format!("redrive puts {letters} into stream {streams}")
            }
            Command::Consume | Command::Status | Command::Lease => {
                if !self.applications(CHECK, settings) {
                    return false;
                }
                let names = settings.applications.iter().map(|application| &*application.name);
                let names: Vec<&str> = names.collect();
                let is_one = names.len() == 1;
                let what = if is_one { "application" } else { "applications" };
                let names = names.join(", ");
                match command {
                    Command::Consume => format!("consume reads {streams} as {what} {names}"),
                    _ => format!("{command} is about {what} {names} of {streams}"),
                }
            }
        };
        self.line(Outcome::Pass, CHECK, detail);
        true
    }

    /// Whether there is an application, and every name is one.
    fn applications(&mut self, check: &str, settings: &Settings) -> bool {
        if settings.applications.is_empty() {
            let detail = format!("no application is set, which {} needs", settings.command);
            let repair = "pass --app, or --for produce to check a producer";
            self.failed(check, detail, repair);
            return false;
        }
        for Application { name, lease_table } in &settings.applications {
            for (flag, name, least, most) in
                [("--app", name, 1, 128), ("--lease-table", lease_table, 3, 255)]
            {
                if !is_name(name, least, most) {
                    let detail = format!("{name:?} cannot be used for {flag}");
                    let repair = format!("write {least} to {most} letters, digits, _ . and -");
                    self.failed(check, detail, repair);
                    return false;
                }
            }
        }
        true
    }

    fn region(&mut self, config: &SdkConfig) -> bool {
        match config.region() {
            Some(region) => self.line(Outcome::Pass, "region", region.to_string()),
            None => self.failed(
                "region",
                "no AWS region is set",
                "pass --region, set AWS_REGION or add one to the AWS profile",
            ),
        }
        config.region().is_some()
    }

    async fn credentials(&mut self, config: &SdkConfig) -> bool {
        const CHECK: &str = "credentials";
        let repair =
            "set AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or attach a role";
        let Some(provider) = config.credentials_provider() else {
            self.failed(CHECK, "there are none", repair);
            return false;
        };
        match provider.provide_credentials().await {
            Ok(credentials) => {
                // Enough to tell one key from another.
                let id = credentials.access_key_id();
                let end = id.char_indices().rev().nth(3).map_or("", |(at, _)| &id[at..]);
                let detail = format!("found, with an access key that ends in {end}");
                self.line(Outcome::Pass, CHECK, detail);
                true
            }
            Err(error) => {
                self.failed(CHECK, crate::aws::told(&error), repair);
                false
            }
        }
    }

    async fn services(&mut self, config: &SdkConfig, settings: &Settings, clock: &clock::Clock) {
        let region = config.region().map_or_else(String::new, ToString::to_string);
        let kinesis = kinesis::Streams::new(config, clock, region.clone());
        for stream in &settings.streams {
            kinesis.check(self, settings, stream).await;
        }
        // Of what the command does not use there is no row, and so no call.
        let in_one_document =
            |place: &Checkpoints| *place != Checkpoints::LeaseTable && !place.is_per_shard();
        if settings.checkpoints.as_ref().is_some_and(|place| !in_one_document(place)) {
            for application in &settings.applications {
                dynamodb::check(self, config, clock, &application.lease_table).await;
            }
        }
        let buckets = s3::Buckets::new(config, clock, region);
        if let Some(Checkpoints::S3 { bucket, key }) = &settings.checkpoints {
            let key = key.replace("{shard}", s3::NOBODYS_KEY);
            let resources = (Resource::StateBucket, Resource::StateObjects);
            buckets.check(self, resources, bucket, &key).await;
        }
        if let Some((bucket, prefix)) = &settings.archive {
            let resources = (Resource::ArchiveBucket, Resource::ArchiveObjects);
            buckets.check(self, resources, bucket, &s3::below(prefix)).await;
        }
        match settings.dead_letters.as_ref().map(|letters| &letters.0) {
            Some(Destination::Kinesis { stream }) => kinesis.check_letters(self, stream).await,
            Some(Destination::S3 { bucket, prefix }) => {
                let resources = (Resource::DeadLetterBucket, Resource::DeadLetterObjects);
                if settings.applications.is_empty() {
                    buckets.check(self, resources, bucket, &s3::below(prefix)).await;
                }
                // Where the workers write: a policy may grant no more than that.
                for Application { name, .. } in &settings.applications {
                    let key = s3::below(&format!("{prefix}/{name}"));
                    buckets.check(self, resources, bucket, &key).await;
                }
            }
            _ => {}
        }
    }

    /// The rows of the command on some resources.
    fn rows(&self, on: &[Resource]) -> Vec<&'static Permission> {
        permissions::of(self.command).filter(|row| on.contains(&row.on)).collect()
    }

    /// Why a service is not asked any more.
    fn is_given_up(&self, service: &str) -> Option<&str> {
        self.services.get(service)?.as_deref()
    }

    /// Makes a call, unless its service does not answer, and tells what came of it.
    async fn tried(&mut self, row: &Permission, check: &str, call: impl Future<Output = Found>) {
        let service = row.action.split(':').next().unwrap_or_default();
        let mut found = match self.is_given_up(service) {
            Some(reason) => Err(Trouble::NotTried(reason.to_owned())),
            None => call.await,
        };
        self.note_service(service, &found);
        // Told already, for all of them.
        if let Some(reason) = self.is_given_up(service) {
            found = Err(Trouble::NotTried(reason.to_owned()));
        }
        self.lines.push(line(row, check, found));
    }

    /// Notes without a call.
    fn not_tried(&mut self, row: &Permission, check: &str, why: impl Into<String>) {
        self.lines.push(line(row, check, Err(Trouble::NotTried(why.into()))));
    }

    /// Tells once whether a service can be talked to.
    fn note_service(&mut self, service: &'static str, found: &Found) {
        let trouble = match found {
            Err(Trouble::NotTried(_)) => return,
            Err(Trouble::Aws(error)) => match error.kind() {
                AwsErrorKind::Unreachable => Some(Outage::Endpoint),
                AwsErrorKind::Credentials => Some(Outage::Credentials),
                AwsErrorKind::Clock => Some(Outage::Clock),
                _ => None,
            },
            _ => None,
        };
        if self.services.contains_key(service) {
            return;
        }
        let check = format!("endpoint of {service}");
        let given_up = match (trouble, found) {
            (Some(Outage::Endpoint), Err(Trouble::Aws(error))) => {
                let variable = format!("AWS_ENDPOINT_URL_{}", service.to_uppercase());
                let repair = format!(
                    "check the network, the region, {variable} and, in a VPC, its endpoint for {service}"
                );
                self.failed(&check, error.to_string(), repair);
                Some(format!("{service} does not answer"))
            }
            (Some(Outage::Credentials), Err(Trouble::Aws(error))) => {
                self.failed("credentials", error.to_string(), "correct the credentials");
                Some(format!("{service} does not accept the credentials"))
            }
            (Some(Outage::Clock), Err(Trouble::Aws(error))) => {
                self.refused_for_clock = Some(error.clone());
                Some(format!("{service} refuses calls because of the clock"))
            }
            _ => {
                self.line(Outcome::Pass, check, "answers");
                None
            }
        };
        self.services.insert(service, given_up);
    }

    fn clock(&mut self, clock: &clock::Clock) {
        const CHECK: &str = "clock";
        let repair = "set it by NTP (timedatectl set-ntp true); AWS refuses calls from 5 minutes on, \
                      and `latest` and `service-day` go by it";
        match (clock.skew(), self.refused_for_clock.take()) {
            (Some(skew), _) if clock::is_wrong(skew) => {
                let detail = format!("the clock of this machine is {}", skew_text(skew));
                self.failed(CHECK, detail, repair);
            }
            (_, Some(error)) => self.failed(CHECK, error.said(), repair),
            (Some(skew), None) => self.line(Outcome::Pass, CHECK, skew_text(skew)),
            (None, None) => self.line(Outcome::NotTried, CHECK, "no answer has a Date"),
        }
    }

    /// Files that the command writes.
    fn files(&mut self, settings: &Settings) {
        if let Some(Checkpoints::File { path }) = &settings.checkpoints {
            let text = path.to_string_lossy().replace("{shard}", s3::NOBODYS_KEY);
            self.file("file of checkpoints", Path::new(&text));
        }
        if let Some(Destination::File { path }) = settings.dead_letters.as_ref().map(|to| &to.0) {
            self.file("file of dead letters", path);
        }
    }

    fn file(&mut self, what: &str, path: &Path) {
        let check = format!("{what} {}", path.display());
        let opened = std::fs::OpenOptions::new().append(true).open(path);
        let folder = path.parent().unwrap_or(Path::new("/"));
        match opened {
            Ok(_) => self.line(Outcome::Pass, check, "can be written"),
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                let repair = "let the user that runs tramline write it, or name another file";
                self.failed(&check, format!("cannot be written: {error}"), repair);
            }
            Err(_) if !folder.is_dir() => {
                let detail = format!("{} is no folder", folder.display());
                self.failed(&check, detail, format!("mkdir -p {}", folder.display()));
            }
            Err(_) if self.command == Command::Redrive => {
                self.failed(&check, "is not there", "name the file that the worker was told");
            }
            Err(_) => {
                let detail = "is not there yet, and making it would change something";
                self.line(Outcome::NotTried, check, detail);
            }
        }
    }
}

enum Outage {
    Endpoint,
    Credentials,
    Clock,
}

fn is_name(name: &str, least: usize, most: usize) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    (least..=most).contains(&name.len()) && name.chars().all(allowed)
}

/// What a call came to.
fn line(row: &Permission, check: &str, found: Found) -> Line {
    let line = |outcome, detail, missing_action, repair| Line {
        outcome,
        check: check.to_owned(),
        action: Some(row.action),
        detail,
        missing_action,
        repair,
    };
    match found {
        Ok(detail) => line(Outcome::Pass, detail, None, None),
        Err(Trouble::NotTried(why)) => line(Outcome::NotTried, why, None, None),
        Err(Trouble::Wrong { detail, repair }) => line(Outcome::Fail, detail, None, Some(repair)),
        Err(Trouble::Aws(error)) if error.kind() == AwsErrorKind::Denied => {
            let needed = match row.when {
                When::Granted => Some("not needed".to_owned()),
                When::Asked => Some(format!("only needed {}", row.when.told())),
                _ => None,
            };
            if let Some(needed) = needed {
                let detail = format!("not allowed, and {needed}: {}", error.said());
                return line(Outcome::NotTried, detail, None, None);
            }
            let missing = missing(row.action, &error);
            let detail = format!("not allowed: {}", error.said());
            let repair = format!("grant the IAM action {missing} on {}", row.on);
            line(Outcome::Fail, detail, Some(missing), Some(repair))
        }
        Err(Trouble::Aws(error)) => line(Outcome::Fail, error.to_string(), None, None),
    }
}

/// The action that is missing: that of the call, or that on the key of an encrypted stream.
fn missing(action: &'static str, error: &AwsError) -> &'static str {
    match error.said().contains("KMSAccessDenied") {
        true if action.starts_with("kinesis:Put") => "kms:GenerateDataKey",
        true => "kms:Decrypt",
        false => action,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(action: &str) -> &'static Permission {
        permissions::of(Command::Consume).find(|row| row.action == action).expect("a row")
    }

    fn denied(said: &str) -> Found {
        Err(AwsError::new("kinesis:GetRecords", AwsErrorKind::Denied, said).into())
    }

    #[test]
    fn what_is_missing_is_named_and_what_is_not_needed_fails_nothing() {
        let told = line(row("kinesis:GetRecords"), "stream s", denied("AccessDeniedException: no"));
        assert_eq!(
            (told.outcome, told.missing_action),
            (Outcome::Fail, Some("kinesis:GetRecords"))
        );
        let told =
            line(row("kinesis:GetRecords"), "stream s", denied("KMSAccessDeniedException: k"));
        assert_eq!(told.missing_action, Some("kms:Decrypt"));
        let optional = permissions::of(Command::Produce).find(|row| row.when == When::Granted);
        let told = line(optional.expect("a row"), "stream s", denied("AccessDeniedException: no"));
        assert_eq!((told.outcome, told.missing_action), (Outcome::NotTried, None));
    }

    #[test]
    fn a_service_that_does_not_answer_is_told_once() {
        let mut report = Report::new(Command::Consume);
        let gone =
            || Err(AwsError::new("kinesis:ListShards", AwsErrorKind::Unreachable, "x").into());
        for _ in 0..2 {
            report.note_service("kinesis", &gone());
        }
        assert_eq!(report.lines.len(), 1);
        assert_eq!(report.is_given_up("kinesis"), Some("kinesis does not answer"));
        assert_eq!(report.is_given_up("dynamodb"), None);
    }
}
