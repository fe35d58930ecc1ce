//! Settings as people write them.

use std::{net::IpAddr, path::PathBuf, time::Duration};

use bytesize::ByteSize;
use clap::{ValueEnum, builder::PossibleValue};
use ipnet::IpNet;
use jiff::{SignedDuration, Timestamp};

use crate::{
    Checkpoints, DeadLetters, Encoding, MaxCheckpointAge, OnFailure, OnStuck, PartitionKey,
    Retrieval, SequenceNumber, SequencePer, Spool, StartPosition,
    feed::Format,
    handler::{Kind, is_stream_name},
    ocs::generate::Profile,
};

/// A length of time such as `500ms`, `10s` or `1h30m`.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    text.parse::<SignedDuration>()
        .ok()
        .and_then(|duration| Duration::try_from(duration).ok())
        .filter(|duration| (1..=365 * 24 * 3_600_000).contains(&duration.as_millis()))
        .ok_or_else(|| {
            "write a length of time from 1ms to a year with its unit, such as 500ms, 10s or 5m"
                .to_owned()
        })
}

/// A length of time that may be none, up to an hour.
pub(super) fn delay(text: &str) -> Result<Duration, String> {
    text.trim()
        .parse::<SignedDuration>()
        .ok()
        .and_then(|duration| Duration::try_from(duration).ok())
        .filter(|duration| *duration <= Duration::from_secs(3600))
        .ok_or_else(|| {
            "write a length of time up to 1h with its unit, such as 0s, 200ms or 1s".to_owned()
        })
}

/// The delay of a message type, such as `RGPS=200ms`.
pub(super) fn type_delay(text: &str) -> Result<(String, Duration), String> {
    let (kind, after) = text.split_once('=').unwrap_or((text, ""));
    match delay(after) {
        Ok(delay) if !kind.trim().is_empty() => Ok((kind.trim().to_uppercase(), delay)),
        _ => Err("write a message type and a length of time, such as RGPS=200ms or TMOV=0s".into()),
    }
}

/// A network, or the address of one host.
pub(super) fn network(text: &str) -> Result<IpNet, String> {
    let host = || text.parse::<IpAddr>().map(IpNet::from);
    text.parse().or_else(|_| host()).map_err(|_| {
        "write an address or a network, such as 10.108.46.198, 10.108.0.0/16 or fd00::/8".to_owned()
    })
}

/// Where messages wait: a directory, or `none` for memory.
pub(super) fn spool(text: &str) -> Result<Spool, String> {
    Ok(match text {
        "none" => Spool::Memory,
        directory => Spool::Directory(directory.into()),
    })
}

/// The size of a spool: from 1 MiB, without an upper limit.
pub(super) fn spool_size_bytes(text: &str) -> Result<u64, String> {
    text.parse::<ByteSize>()
        .ok()
        .map(|size| size.as_u64())
        .filter(|bytes| *bytes >= crate::SPOOL_LIMIT_MIN_BYTES)
        .ok_or_else(|| "write a size from 1MiB, such as 256MiB or 4GiB".to_owned())
}

/// What a stream's record limit may be.
pub(super) fn record_size_bytes(text: &str) -> Result<u32, String> {
    size_bytes(text)
        .ok()
        .filter(|bytes| (1024 * 1024..=10 * 1024 * 1024).contains(bytes))
        .ok_or_else(|| "write a size from 1MiB to 10MiB".to_owned())
}

/// A lease duration: too short to be renewed in time, it would only be lost again and again.
pub(super) fn lease_duration(text: &str) -> Result<Duration, String> {
    duration(text)
        .ok()
        .filter(|duration| *duration >= Duration::from_secs(1))
        .ok_or_else(|| "write a length of time from 1s, such as 10s".to_owned())
}

/// A number of bytes such as `64KiB` or `8MiB`, up to 1 GiB.
pub(super) fn size_bytes(text: &str) -> Result<u32, String> {
    text.parse::<ByteSize>()
        .ok()
        .and_then(|size| u32::try_from(size.as_u64()).ok())
        .filter(|bytes| (1..=1 << 30).contains(bytes))
        .ok_or_else(|| "write a size from 1B to 1GiB, such as 64KiB or 8MiB".to_owned())
}

/// A start position: a word or an RFC 3339 time.
pub(super) fn start(text: &str) -> Result<StartPosition, String> {
    match text {
        "latest" => Ok(StartPosition::Latest),
        "trim-horizon" => Ok(StartPosition::TrimHorizon),
        "service-day" => Ok(StartPosition::ServiceDay),
        time => time.parse().map(StartPosition::At).map_err(|_| {
            "write latest, trim-horizon, service-day or a time such as 2025-07-02T06:00:00Z"
                .to_owned()
        }),
    }
}

/// A place for checkpoints.
pub(super) fn checkpoints(text: &str) -> Result<Checkpoints, String> {
    Checkpoints::parse(text).map_err(|error| error.to_string())
}

/// How old a checkpoint may be.
pub(super) fn max_checkpoint_age(text: &str) -> Result<MaxCheckpointAge, String> {
    match text {
        "service-day" => Ok(MaxCheckpointAge::ServiceDay),
        other => duration(other)
            .map(MaxCheckpointAge::Age)
            .map_err(|error| format!("write service-day or a duration; {error}")),
    }
}

/// A part of a hundred.
pub(super) fn percent(text: &str) -> Result<f64, String> {
    let percent = text.trim_end_matches('%').trim().parse::<f64>().ok();
    percent
        .filter(|percent| (0.0..=100.0).contains(percent))
        .ok_or_else(|| "write a number from 0 to 100, such as 0.25".to_owned())
}

/// Where `lease reset` moves a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ResetPosition {
    Latest,
    TrimHorizon,
    Time(Timestamp),
    SequenceNumber(SequenceNumber),
}

/// A position to reset to: a word, an RFC 3339 time or a sequence number.
pub(super) fn reset_position(text: &str) -> Result<ResetPosition, String> {
    match text {
        "latest" => Ok(ResetPosition::Latest),
        "trim-horizon" => Ok(ResetPosition::TrimHorizon),
        other => SequenceNumber::parse(other)
            .map(ResetPosition::SequenceNumber)
            .or_else(|| other.parse().ok().map(ResetPosition::Time))
            .ok_or_else(|| {
                "write latest, trim-horizon, a time such as 2025-07-02T06:00:00Z or a sequence number"
                    .to_owned()
            }),
    }
}

/// A point in time.
pub(super) fn time(text: &str) -> Result<Timestamp, String> {
    text.parse().map_err(|_| "write a time such as 2025-07-02T06:00:00Z".to_owned())
}

/// A place where dead letters are stored and can be read back.
pub(super) fn dead_letters(text: &str) -> Result<DeadLetters, String> {
    text.parse()
        .ok()
        .filter(|parsed| *parsed != DeadLetters::stderr())
        .ok_or_else(|| "write kinesis://STREAM, s3://BUCKET/PREFIX or file:///PATH".to_owned())
}

/// Where messages go, and the name of that.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Output {
    pub name: Option<String>,
    pub place: Place,
}

/// Where messages go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    Stdout,
    Archive {
        bucket: String,
        prefix: String,
    },
    /// A socket at this path, which readers connect to.
    Unix(PathBuf),
    /// An address and port that readers connect to.
    Tcp(String),
    /// An address and port to connect to.
    TcpConnect(String),
    /// A shell command.
    Exec(String),
}

impl Place {
    fn parse(text: &str) -> Option<Self> {
        if text == "stdout" {
            return Some(Self::Stdout);
        }
        if let Some(command) = text.strip_prefix("exec:") {
            return (!command.trim().is_empty()).then(|| Self::Exec(command.to_owned()));
        }
        let address = |place: &str| {
            let (host, port) = place.rsplit_once(':')?;
            (!host.is_empty() && port.parse::<u16>().is_ok()).then(|| place.to_owned())
        };
        let (scheme, place) = text.split_once("://")?;
        match scheme {
            "s3-archive" => {
                let (bucket, prefix) = place.split_once('/').unwrap_or((place, ""));
                let (bucket, prefix) = (bucket.to_owned(), prefix.to_owned());
                (!bucket.is_empty()).then_some(Self::Archive { bucket, prefix })
            }
            "unix" => {
                (place.starts_with('/') && !place.ends_with('/')).then(|| Self::Unix(place.into()))
            }
            "tcp" => address(place).map(Self::Tcp),
            "tcp-connect" => address(place).map(Self::TcpConnect),
            _ => None,
        }
    }
}

/// An output: a place, perhaps with a name before it.
pub(super) fn output(text: &str) -> Result<Output, String> {
    let named = text.split_once('=').filter(|(name, _)| is_name(name));
    let (name, place) = named.map_or((None, text), |(name, place)| (Some(name.to_owned()), place));
    Place::parse(place).map(|place| Output { name, place }).ok_or_else(|| {
        "write stdout, unix:///PATH, tcp://ADDRESS:PORT, tcp-connect://HOST:PORT, exec:COMMAND or \
         s3-archive://BUCKET/PREFIX, with NAME= before it to give it a position of its own"
            .to_owned()
    })
}

/// The name of an output or a reader, which becomes part of an application's.
pub(super) fn name(text: &str) -> Result<String, String> {
    is_name(text)
        .then(|| text.to_owned())
        .ok_or_else(|| "write a name of letters, digits, _ . and -".to_owned())
}

fn is_name(text: &str) -> bool {
    is_stream_name(text)
}

/// The name of a stream.
pub(super) fn stream_name(text: &str) -> Result<String, String> {
    is_stream_name(text)
        .then(|| text.to_owned())
        .ok_or_else(|| "write the name of a stream: letters, digits, _ . and -".to_owned())
}

/// The word for a value.
pub(super) fn word(value: impl ValueEnum) -> String {
    value.to_possible_value().map_or(String::new(), |word| word.get_name().to_owned())
}

/// Words for values of enums that live elsewhere.
macro_rules! words {
    ($type:ty { $($variant:ident = $word:literal $help:literal,)+ }) => {
        impl ValueEnum for $type {
            fn value_variants<'a>() -> &'a [Self] {
                &[$(Self::$variant),+]
            }

            fn to_possible_value(&self) -> Option<PossibleValue> {
                Some(match self {
                    $(Self::$variant => PossibleValue::new($word).help($help),)+
                })
            }
        }
    };
}

words!(Format {
    Json = "json" "an object with the message's place in the stream and the CloudEvent",
    Event = "event" "the CloudEvent",
    Raw = "raw" "the OCS text",
});

words!(Retrieval {
    Auto = "auto" "fan-out, or polling if the server does not know fan-out",
    FanOut = "fan-out" "SubscribeToShard: pushed, 2 MB/s a shard for this application alone",
    Polling = "polling" "GetRecords: 2 MB/s a shard, shared by all that poll",
});

words!(OnFailure {
    Stop = "stop" "stop its shard; the checkpoint stays before it",
    DeadLetter = "dead-letter" "put it to the dead letters, and go on",
    Skip = "skip" "log it, count it, and go on",
});

words!(OnStuck {
    Restart = "restart" "drop its task and start it again from the last checkpoint",
    Release = "release" "the same, but by another worker if there is one",
    Report = "report" "tell it, count it, show it in the status",
});

words!(PartitionKey {
    ConnectionHash = "connection-hash" "a salted hash of the peer's address and port",
    HostHash = "host-hash" "a salted hash of the peer's address",
    Connection = "connection" "{local address -> peer address}, readable, as Trike writes it",
});

words!(SequencePer {
    Host = "host" "a host, over all of its connections",
    Connection = "connection" "a connection: for senders behind a proxy, which all have its address",
});

words!(Encoding {
    Array = "array" "a JSON array of CloudEvents, as Trike writes it",
    Single = "single" "one CloudEvent",
    Batch = "batch" "one CloudEvent with many messages: com.mbta.ocs.raw_message_batch",
    Kpl = "kpl" "a KPL aggregate, one CloudEvent in each user record",
});

words!(Kind {
    Undecodable = "undecodable" "no raw OCS message",
    HandlerFailed = "handler-failed" "the handler returned an error each time",
    HandlerTimedOut = "handler-timed-out" "the handler did not return in time",
    Oversized = "oversized" "of an OCS connection, never in a stream: not put back",
    Unfinished = "unfinished" "of an OCS connection, never in a stream: not put back",
});

words!(Profile {
    Day = "day" "an ordinary stretch of the service day",
    Morning = "morning" "the schedule load at 02:00, then an ordinary day",
});

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_and_hosts_are_written_the_usual_way() {
        let within = |net: &str, host: &str| {
            network(net).expect(net).contains(&host.parse::<IpAddr>().expect(host))
        };
        assert!(within("10.108.0.0/16", "10.108.46.198"));
        assert!(!within("10.108.0.0/16", "10.109.0.1"));
        assert!(within("10.0.0.1", "10.0.0.1"));
        assert!(!within("10.0.0.1", "10.0.0.2"));
        assert!(within("fd00::/8", "fd12::1"));
        for wrong in ["", "10.0.0", "10.0.0.0/33", "localhost"] {
            assert!(network(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn durations_are_written_with_their_unit() {
        assert_eq!(duration("10s"), Ok(Duration::from_secs(10)));
        assert_eq!(duration("1h30m"), Ok(Duration::from_secs(5400)));
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        for wrong in ["10", "", "-1s", "0s", "soon", "10 parsecs", "1us", "9000h"] {
            assert!(duration(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn delays_may_be_none_and_are_given_by_type() {
        assert_eq!(delay("0s"), Ok(Duration::ZERO));
        assert_eq!(type_delay("rgps = 200ms").map(|(kind, _)| kind), Ok("RGPS".to_owned()));
        assert_eq!(type_delay("TMOV=0s"), Ok(("TMOV".to_owned(), Duration::ZERO)));
        for wrong in ["", "TMOV", "TMOV=", "=1s", "TMOV=soon", "TMOV=2h"] {
            assert!(type_delay(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn sizes_are_written_with_their_unit() {
        assert_eq!(size_bytes("64KiB"), Ok(65_536));
        assert_eq!(size_bytes("8MiB"), Ok(8_388_608));
        for wrong in ["", "0", "-1MiB", "5GiB", "large"] {
            assert!(size_bytes(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn start_positions_are_words_or_times() {
        assert_eq!(start("latest"), Ok(StartPosition::Latest));
        let time = "2025-07-02T06:00:00Z";
        assert_eq!(start(time), Ok(StartPosition::At(time.parse().expect("a time"))));
        assert_eq!(start("2025-07-02T02:00:00-04:00"), start(time));
        assert!(start("yesterday").is_err());
    }

    #[test]
    fn outputs_are_places_perhaps_with_a_name() {
        let place = |text: &str| output(text).map(|output| (output.name, output.place));
        let unnamed = |place| Ok((None, place));
        assert_eq!(place("stdout"), unnamed(Place::Stdout));
        assert_eq!(place("unix:///run/ocs.sock"), unnamed(Place::Unix("/run/ocs.sock".into())));
        assert_eq!(place("tcp://[::]:7001"), unnamed(Place::Tcp("[::]:7001".to_owned())));
        let command = "A=b exec reader --to=x,y";
        assert_eq!(place(&format!("exec:{command}")), unnamed(Place::Exec(command.to_owned())));
        assert_eq!(
            place("green=tcp-connect://rtr-1:8001"),
            Ok((Some("green".to_owned()), Place::TcpConnect("rtr-1:8001".to_owned())))
        );
        for wrong in [
            "",
            "stdin",
            "unix://run",
            "unix:///",
            "tcp://7001",
            "tcp://:1",
            "exec: ",
            "=stdout",
            "a b=stdout",
        ] {
            assert!(output(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn percentages_are_numbers_up_to_a_hundred() {
        assert_eq!(percent("0.25"), Ok(0.25));
        assert_eq!(percent("10 %"), Ok(10.0));
        for wrong in ["", "-1", "101", "NaN", "some"] {
            assert!(percent(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn reset_positions_are_words_times_or_sequence_numbers() {
        assert_eq!(reset_position("latest"), Ok(ResetPosition::Latest));
        let time = "2025-07-02T06:00:00Z";
        assert_eq!(reset_position(time), Ok(ResetPosition::Time(time.parse().expect("a time"))));
        let number = "49590338271490256608559692538361571095921575989136588898";
        let parsed = SequenceNumber::parse(number).expect("a number");
        assert_eq!(reset_position(number), Ok(ResetPosition::SequenceNumber(parsed)));
        for wrong in ["", "-1", "yesterday", "LATEST", "2025-07-02"] {
            assert!(reset_position(wrong).is_err(), "{wrong:?}");
        }
    }
}
