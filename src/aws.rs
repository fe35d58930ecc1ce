//! What an AWS error means for us.
//!
//! Every call goes through [`failure`], so that each log line about AWS reads the same: the operation
//! by its IAM name, what AWS said, and what to do where we know it.

use std::{
    error::Error,
    fmt,
    sync::{Mutex, MutexGuard},
    time::Duration,
};

use aws_credential_types::provider::error::CredentialsError;
use aws_smithy_runtime_api::client::{orchestrator::HttpResponse, result::SdkError};
use aws_smithy_types::error::metadata::ProvideErrorMetadata;
use aws_smithy_types::{event_stream::RawMessage, timeout::TimeoutConfig};
use aws_types::{SdkConfig, service_config::ServiceConfigKey};
use jiff::{SignedDuration, Timestamp, fmt::rfc2822::DateTimeParser};
use tokio::time::Instant;

/// An AWS call that did not succeed.
#[derive(Debug, Clone)]
pub struct AwsError {
    operation: &'static str,
    kind: AwsErrorKind,
    said: String,
}

/// Why an AWS call did not succeed, as far as a caller would act on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum AwsErrorKind {
    /// Too many calls or bytes: wait and call again.
    Throttled,
    /// The credentials do not allow the operation.
    Denied,
    /// There are no credentials, or AWS does not accept them.
    Credentials,
    /// AWS refuses the signature because the clock of this machine is wrong.
    Clock,
    /// The stream, shard, consumer, table, bucket or object does not exist.
    NotFound,
    /// It exists already, or is busy.
    InUse,
    /// A quota is used up.
    Quota,
    /// The shard iterator is older than five minutes.
    ExpiredIterator,
    /// A conditional write found another state than expected.
    Condition,
    /// The server does not know the operation.
    UnknownOperation,
    /// No connection, or no answer in time.
    Unreachable,
    /// The server failed.
    Server,
    /// AWS refused the call for another reason.
    Refused,
}

impl AwsError {
    /// An error of the operation with this IAM name, such as `dynamodb:Scan`, in AWS's words.
    pub fn new(operation: &'static str, kind: AwsErrorKind, said: impl Into<String>) -> Self {
        Self { operation, kind, said: said.into() }
    }

    /// Why it did not succeed.
    pub fn kind(&self) -> AwsErrorKind {
        self.kind
    }

    /// What AWS or the network said.
    #[cfg(feature = "cli")]
    pub(crate) fn said(&self) -> &str {
        &self.said
    }

    /// Whether the same call may succeed later without anyone doing anything.
    pub fn is_transient(&self) -> bool {
        use AwsErrorKind::*;
        matches!(self.kind, Throttled | InUse | Unreachable | Server)
    }
}

impl fmt::Display for AwsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { operation, kind, said } = self;
        match kind {
            AwsErrorKind::Throttled => write!(f, "{operation} was throttled: {said}"),
            AwsErrorKind::Denied if *operation == "s3:GetObject" => write!(
                f,
                "{operation} is not allowed: {said}; grant the IAM actions s3:GetObject on the object \
                 and s3:ListBucket on the bucket (without it S3 answers so when there is no object)"
            ),
            AwsErrorKind::Denied => {
                write!(f, "{operation} is not allowed: {said}; grant the IAM action {operation}")
            }
            AwsErrorKind::Credentials => write!(
                f,
                "{operation} has no usable AWS credentials: {said}; set AWS_PROFILE or \
                 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or attach a role"
            ),
            AwsErrorKind::Clock => write!(
                f,
                "{operation} was refused because the clock of this machine is wrong: {said}; set it by \
                 NTP (timedatectl set-ntp true)"
            ),
            AwsErrorKind::Unreachable => write!(f, "{operation} got no answer: {said}"),
            AwsErrorKind::UnknownOperation => write!(
                f,
                "the server does not know {operation}: {said}; use another server, or for reading set \
                 the retrieval to polling"
            ),
            _ => write!(f, "{operation} failed: {said}"),
        }
    }
}

impl Error for AwsError {}

/// A client of the SDK that opens new connections when a call got no answer.
///
/// Over HTTP/2 the SDK makes all its calls on one connection, and stays on it when calls run out of time.
/// A host that went away without a word would hold up every call until TCP gives up on it, which takes a
/// quarter of an hour. A client made anew has new connections, unless the configuration has an HTTP client
/// of its own.
pub(crate) struct Reconnecting<C> {
    connect: Box<dyn Fn() -> C + Send + Sync>,
    current: Mutex<Connected<C>>,
}

struct Connected<C> {
    client: C,
    /// When it was made in place of another one.
    renewed_at: Option<Instant>,
}

/// Calls that were under way together fail together: for this long, the connections count as new.
const NEW_FOR: Duration = Duration::from_secs(5);

impl<C: Clone> Reconnecting<C> {
    pub(crate) fn new(connect: impl Fn() -> C + Send + Sync + 'static) -> Self {
        let current = Connected { client: connect(), renewed_at: None };
        Self { connect: Box::new(connect), current: current.into() }
    }

    pub(crate) fn get(&self) -> C {
        self.lock().client.clone()
    }

    /// Lets the calls that follow go over new connections. Those under way stay where they are.
    pub(crate) fn reconnect(&self) {
        let mut current = self.lock();
        if current.renewed_at.is_none_or(|at| at.elapsed() > NEW_FOR) {
            *current = Connected { client: (self.connect)(), renewed_at: Some(Instant::now()) };
        }
    }

    /// Reads an error of this client, as [`failure`] does.
    pub(crate) fn failure<E>(
        &self,
        operation: &'static str,
        error: SdkError<E, HttpResponse>,
    ) -> AwsError
    where
        E: ProvideErrorMetadata + Error + 'static,
    {
        let error = failure(operation, error);
        if error.kind == AwsErrorKind::Unreachable {
            self.reconnect();
        }
        error
    }

    fn lock(&self) -> MutexGuard<'_, Connected<C>> {
        self.current.lock().unwrap_or_else(|poison| poison.into_inner())
    }
}

impl<C> fmt::Debug for Reconnecting<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reconnecting").finish_non_exhaustive()
    }
}

/// Reads an SDK error. `operation` is the IAM action, such as `kinesis:GetRecords`.
pub(crate) fn failure<E>(operation: &'static str, error: SdkError<E, HttpResponse>) -> AwsError
where
    E: ProvideErrorMetadata + Error + 'static,
{
    let service = match &error {
        SdkError::ServiceError(service) => service,
        SdkError::ResponseError(response) => return unreadable(operation, response.raw(), &error),
        _ => return unanswered(operation, &error),
    };
    let status = service.raw().status();
    let mut said = said(service.err(), &format!("HTTP status {status}"));
    let kind = match service.err().code() {
        Some(code) => match kind_of(code) {
            AwsErrorKind::Credentials if is_about_time(service.err().message()) => {
                AwsErrorKind::Clock
            }
            AwsErrorKind::Refused if status.is_server_error() => AwsErrorKind::Server,
            // The same code stands for a rate and, when consumers are registered, for their number.
            AwsErrorKind::Quota if operation != "kinesis:RegisterStreamConsumer" => {
                AwsErrorKind::Throttled
            }
            kind => kind,
        },
        None => AwsErrorKind::Server,
    };
    if kind == AwsErrorKind::Clock
        && let Some(skew) = clock_skew(service.raw(), Timestamp::now())
    {
        said = format!("{said}; it is {}", skew_text(skew));
    }
    AwsError { operation, kind, said }
}

/// Whether a refused signature was refused for its time (AWS documentation, "Signature Version 4
/// troubleshooting").
fn is_about_time(message: Option<&str>) -> bool {
    let about_time = ["Signature expired", "Signature not yet current"];
    about_time.iter().any(|words| message.is_some_and(|message| message.contains(words)))
}

/// How far `now` is ahead of the `Date` of an answer, if it has one.
pub(crate) fn clock_skew(answer: &HttpResponse, now: Timestamp) -> Option<SignedDuration> {
    let theirs = DateTimeParser::new().parse_timestamp(answer.headers().get("date")?).ok()?;
    Some(now.duration_since(theirs))
}

/// A clock's skew in words.
pub(crate) fn skew_text(skew: SignedDuration) -> String {
    match skew.as_secs() {
        -1..=1 => "the same as that of AWS, to a second".to_owned(),
        ahead @ 2.. => format!("{ahead} s ahead of that of AWS"),
        behind => format!("{} s behind that of AWS", behind.unsigned_abs()),
    }
}

/// Reads the error of one record of a call that otherwise succeeded.
pub(crate) fn record_failure(operation: &'static str, code: &str, message: &str) -> AwsError {
    AwsError { operation, kind: kind_of(code), said: format!("{code}: {message}") }
}

/// AWS answers in JSON. Anything else comes from something in between, such as a proxy that cannot reach
/// its server; a page of HTML in answer to a subscription, from a server that does not know it (moto).
fn unreadable(
    operation: &'static str,
    answer: &HttpResponse,
    error: &(dyn Error + 'static),
) -> AwsError {
    let status = answer.status();
    let html = answer.headers().get("content-type").is_some_and(|kind| kind.contains("text/html"));
    let fan_out = operation == "kinesis:SubscribeToShard";
    let kind = match status.as_u16() {
        502..=504 => AwsErrorKind::Server,
        _ if html && fan_out => AwsErrorKind::UnknownOperation,
        _ => AwsErrorKind::Server,
    };
    let said = if html {
        format!("HTTP status {status} with a page of HTML, which is no answer of AWS's")
    } else {
        format!("HTTP status {status} with an answer that cannot be read: {}", told(error))
    };
    AwsError { operation, kind, said }
}

/// Reads an error that arrived within an event stream.
pub(crate) fn stream_failure<E>(operation: &'static str, error: SdkError<E, RawMessage>) -> AwsError
where
    E: ProvideErrorMetadata + Error + 'static,
{
    let SdkError::ServiceError(service) = &error else { return unanswered(operation, &error) };
    let kind = service.err().code().map_or(AwsErrorKind::Server, kind_of);
    AwsError { operation, kind, said: said(service.err(), "an error without a code") }
}

fn said(error: &impl ProvideErrorMetadata, otherwise: &str) -> String {
    match (error.code(), error.message()) {
        (Some(code), Some(message)) => format!("{code}: {message}"),
        (Some(code), None) => code.to_owned(),
        (None, _) => otherwise.to_owned(),
    }
}

/// The call did not reach the server, or its answer did not reach us.
fn unanswered(operation: &'static str, error: &(dyn Error + 'static)) -> AwsError {
    let kind = if causes(error).any(|cause| cause.is::<CredentialsError>()) {
        AwsErrorKind::Credentials
    } else {
        AwsErrorKind::Unreachable
    };
    // The outermost text only says that the call failed.
    AwsError { operation, kind, said: told(error.source().unwrap_or(error)) }
}

fn kind_of(code: &str) -> AwsErrorKind {
    match code {
        "ProvisionedThroughputExceededException"
        | "Throttling"
        | "ThrottlingException"
        | "ThrottledException"
        | "RequestLimitExceeded"
        | "TooManyRequestsException"
        | "SlowDown"
        | "KMSThrottlingException" => AwsErrorKind::Throttled,
        "AccessDeniedException" | "AccessDenied" | "KMSAccessDeniedException" => {
            AwsErrorKind::Denied
        }
        "UnrecognizedClientException"
        | "InvalidClientTokenId"
        | "InvalidAccessKeyId"
        | "InvalidSignatureException"
        | "IncompleteSignatureException"
        | "IncompleteSignature"
        | "MissingAuthenticationToken"
        | "MissingAuthenticationTokenException"
        | "SignatureDoesNotMatch"
        | "ExpiredToken"
        | "ExpiredTokenException" => AwsErrorKind::Credentials,
        "RequestTimeTooSkewed" | "RequestExpired" | "RequestInTheFuture" => AwsErrorKind::Clock,
        "ResourceNotFoundException" | "NoSuchBucket" | "NoSuchKey" => AwsErrorKind::NotFound,
        "ResourceInUseException" | "OperationAborted" => AwsErrorKind::InUse,
        "LimitExceededException" => AwsErrorKind::Quota,
        "ExpiredIteratorException" => AwsErrorKind::ExpiredIterator,
        "ConditionalCheckFailedException" | "PreconditionFailed" | "ConditionalRequestConflict" => {
            AwsErrorKind::Condition
        }
        // S3 waited in vain for our bytes.
        "RequestTimeout" => AwsErrorKind::Unreachable,
        "UnknownOperationException" | "InvalidAction" | "NotImplemented" => {
            AwsErrorKind::UnknownOperation
        }
        "InternalFailure"
        | "InternalFailureException"
        | "InternalServerError"
        | "InternalError"
        | "ServiceUnavailable"
        | "ServiceUnavailableException" => AwsErrorKind::Server,
        _ => AwsErrorKind::Refused,
    }
}

fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    let mut next = Some(error);
    std::iter::from_fn(move || {
        let error = next?;
        next = error.source();
        Some(error)
    })
}

/// The causes of an error, outermost first, without those that only repeat their own cause.
pub(crate) fn told(error: &(dyn Error + 'static)) -> String {
    let texts: Vec<String> = causes(error).map(ToString::to_string).collect();
    let mut told: Vec<&str> = Vec::new();
    for (n, text) in texts.iter().enumerate() {
        let repeats = texts[n + 1..].iter().any(|deeper| text.contains(deeper.as_str()));
        if !repeats && !told.contains(&text.as_str()) {
            told.push(text);
        }
    }
    told.join(": ")
}

/// Limits for calls that answer at once or not at all. (Kinesalite never answers some of them.)
pub(crate) fn call_timeouts() -> TimeoutConfig {
    TimeoutConfig::builder()
        .connect_timeout(Duration::from_secs(3))
        .operation_attempt_timeout(Duration::from_secs(10))
        .build()
}

/// Limits for calls on the lease table: a call that hangs must leave time for another one before the
/// lease runs out.
pub(crate) fn lease_timeouts() -> TimeoutConfig {
    TimeoutConfig::builder()
        .connect_timeout(Duration::from_secs(1))
        .operation_attempt_timeout(Duration::from_secs(2))
        .build()
}

/// How long a state document of 64 MiB may take on its way.
pub(crate) const STATE_LIMIT: Duration = Duration::from_secs(60);

/// Limits for reading and writing state documents. A connection on which nothing moves is given up
/// sooner, by the SDK's stalled stream protection.
pub(crate) fn state_timeouts() -> TimeoutConfig {
    TimeoutConfig::builder()
        .connect_timeout(Duration::from_secs(3))
        .operation_attempt_timeout(STATE_LIMIT)
        .build()
}

/// Describes an S3 client. Servers at an address of their own rarely know buckets by their host name, so
/// there the bucket goes into the path.
pub(crate) fn s3_config(config: &SdkConfig) -> aws_sdk_s3::config::Builder {
    let key = ServiceConfigKey::builder()
        .service_id("S3")
        .env("AWS_ENDPOINT_URL")
        .profile("endpoint_url")
        .build();
    let of_s3 = config.service_config().zip(key.ok()).and_then(|(of, key)| of.load_config(key));
    let own_address = config.endpoint_url().is_some() || of_s3.is_some();
    aws_sdk_s3::config::Builder::from(config).force_path_style(own_address)
}

/// A time as the SDK writes it.
pub(crate) fn sdk_time(at: Timestamp) -> aws_smithy_types::DateTime {
    let nanos = at.as_nanosecond();
    let (seconds, nanos) = (nanos.div_euclid(1_000_000_000), nanos.rem_euclid(1_000_000_000));
    aws_smithy_types::DateTime::from_secs_and_nanos(seconds as i64, nanos as u32)
}

/// A time as the SDK read it; `None` outside the years that exist.
pub(crate) fn time_from_sdk(at: &aws_smithy_types::DateTime) -> Option<Timestamp> {
    Timestamp::new(at.secs(), at.subsec_nanos() as i32).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Layer(&'static str, #[source] Option<Box<Layer>>);

    #[test]
    fn causes_that_only_repeat_their_own_cause_are_left_out() {
        let refused = Layer("connection refused", None);
        let tcp = Layer("tcp connect: connection refused", Some(refused.into()));
        let dispatch = Layer("dispatch failure", Some(tcp.into()));
        assert_eq!(told(&dispatch), "dispatch failure: connection refused");
    }

    #[test]
    fn times_survive_the_way_to_the_sdk_and_back() {
        for text in ["2025-03-09T07:00:00.123456789Z", "1969-12-31T23:59:59.5Z"] {
            let at: Timestamp = text.parse().expect("a time");
            assert_eq!(time_from_sdk(&sdk_time(at)), Some(at));
        }
    }

    #[test]
    fn a_signature_refused_for_its_time_is_a_wrong_clock_by_how_much_the_answer_says() {
        use aws_sdk_kinesis::operation::list_streams::ListStreamsError;
        use aws_smithy_types::{body::SdkBody, error::ErrorMetadata};

        let refused = |code: &str, message: &str, date: Option<&str>| {
            let mut answer = HttpResponse::new(400.try_into().expect("a status"), SdkBody::empty());
            if let Some(date) = date {
                answer.headers_mut().insert("date", date.to_owned());
            }
            let error = ErrorMetadata::builder().code(code).message(message).build();
            let error = SdkError::service_error(ListStreamsError::generic(error), answer);
            failure("kinesis:ListStreams", error)
        };
        let expired = "Signature expired: 20250702T150000Z is now earlier than 20250702T150500Z";
        let error = refused("InvalidSignatureException", expired, None);
        assert_eq!(error.kind(), AwsErrorKind::Clock);
        let future = "02 Jul 2999 15:00:00 GMT";
        let text = refused("SignatureDoesNotMatch", "Signature not yet current: x", Some(future));
        let text = text.to_string();
        assert!(text.contains("the clock of this machine is wrong"), "{text}");
        assert!(text.contains("s behind that of AWS") && text.contains("NTP"), "{text}");
        assert_eq!(refused("RequestTimeTooSkewed", "", None).kind(), AwsErrorKind::Clock);
        let wrong_key = "The request signature we calculated does not match";
        let error = refused("InvalidSignatureException", wrong_key, Some(future));
        assert_eq!(error.kind(), AwsErrorKind::Credentials);
    }

    #[test]
    fn the_date_of_an_answer_gives_the_skew_of_the_clock() {
        let at = |text: &str| text.parse().expect("a time");
        let skew = |date: &'static str, now: &str| {
            let status = 200.try_into().expect("a status");
            let mut answer = HttpResponse::new(status, aws_smithy_types::body::SdkBody::empty());
            answer.headers_mut().insert("date", date);
            clock_skew(&answer, at(now))
        };
        let date = "Wed, 02 Jul 2025 15:00:00 GMT";
        let ahead = skew(date, "2025-07-02T15:10:00Z").expect("a date");
        assert_eq!(skew_text(ahead), "600 s ahead of that of AWS");
        assert_eq!(skew_text(-ahead), "600 s behind that of AWS");
        let right = skew(date, "2025-07-02T15:00:00.9Z").expect("a date");
        assert_eq!(skew_text(right), "the same as that of AWS, to a second");
        assert_eq!(skew("yesterday", "2025-07-02T15:00:00Z"), None);
    }
}
