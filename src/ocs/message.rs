//! What an OCS line says.

use std::fmt;

use jiff::{Timestamp, civil::Time};

use super::{Fields, Movement, OcsError, RawGps, Schedule, clock};

/// An OCS line, understood. It borrows from the line; lists are read from it in place.
///
/// Get one from a message with [`Message::ocs`](crate::Message::ocs).
///
/// ```
/// use jiff::Timestamp;
/// use tramline::ocs::{Body, Line, OcsMessage, Schedule};
///
/// let line = "4520,TSCH,09:44:01,R,ASN,54466E3A,983BA807";
/// let received_at: Timestamp = "2025-07-02T13:44:03Z".parse()?;
///
/// let message = OcsMessage::parse(line, Some(received_at))?;
/// assert_eq!(message.header.line, Some(Line::Red));
/// assert_eq!(message.header.at(), Some("2025-07-02T13:44:01Z".parse()?));
/// match message.body {
///     Body::Schedule(Schedule::Assignment { train, trip }) => {
///         assert_eq!((train, trip), ("54466E3A", "983BA807"));
///     }
///     _ => panic!("not an assignment"),
/// }
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct OcsMessage<'a> {
    /// What every line begins with.
    pub header: Header<'a>,
    /// The rest.
    pub body: Body<'a>,
    /// Fields after the last one that is known. A newer OCS may send some; they are no error.
    pub surplus: Fields<'a>,
}

/// What every OCS line begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Header<'a> {
    /// The OCS sequence number: one more with each message of a sender, until it starts again around
    /// midnight. [`SequenceMonitor`](super::SequenceMonitor) watches it. Not to be confused with the
    /// sequence number of the Kinesis record.
    pub counter: u64,
    /// `TSCH`, `TMOV`, `RGPS`, `DEVI`, `DIAG`, or another one.
    pub message_type: &'a str,
    /// The wall clock of OCS, in America/New_York. It has no date; see [`at`](Self::at).
    pub time_of_day: Time,
    /// The line of the subway. DIAG has none, and of a type that is not known it cannot be told.
    pub line: Option<Line>,
    /// When the message was received, as given to [`OcsMessage::parse`].
    pub received_at: Option<Timestamp>,
}

/// A line of the subway.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Line {
    /// `R`
    Red,
    /// `O`
    Orange,
    /// `B`
    Blue,
    /// `G`, light rail
    Green,
}

/// What an OCS message is about.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Body<'a> {
    /// TSCH: the schedule changed.
    Schedule(Schedule<'a>),
    /// TMOV: a train moved.
    Movement(Movement<'a>),
    /// RGPS: where a light-rail car is by its own GPS.
    RawGps(RawGps<'a>),
    /// DEVI: a wayside device changed its state.
    Device(Device<'a>),
    /// DIAG: free text, with any commas in it.
    Diagnostic(&'a str),
    /// A type that this version does not know: the fields after the time.
    Other(Fields<'a>),
}

/// DEVI: the state of a wayside device.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Device<'a> {
    /// `SW` a switch, `SG` a signal, `MD` something like a terminal's bell; there may be others.
    pub kind: &'a str,
    /// Such as `WON_SW1`.
    pub name: &'a str,
    /// Its state: zeros and ones, whose meaning for each kind is not public.
    pub values: Fields<'a>,
}

impl<'a> OcsMessage<'a> {
    /// Understands an OCS line.
    ///
    /// `received_at`, the event's time, gives the time of day its date. A type, a subtype or a field too
    /// many that this version does not know is kept, not refused. A field that is missing or not what it
    /// must be is an error for this line.
    pub fn parse(line: &'a str, received_at: Option<Timestamp>) -> Result<Self, OcsError> {
        let mut fields = Fields::of(line);
        let fields = &mut fields;
        let counter = fields.integer("counter")?;
        let message_type = fields.code("type")?;
        if message_type.is_empty() {
            return Err(fields.invalid("type", "a name"));
        }
        let time_of_day = fields.time_of_day("time")?;
        let line = match message_type {
            "TSCH" | "TMOV" | "RGPS" | "DEVI" => Some(Line::take(fields)?),
            _ => None,
        };
        let body = match (message_type, line) {
            ("TSCH", Some(line)) => Body::Schedule(Schedule::take(fields, line)?),
            ("TMOV", Some(line)) => Body::Movement(Movement::take(fields, line)?),
            ("RGPS", Some(line)) => Body::RawGps(RawGps::take(fields, line)?),
            ("DEVI", Some(_)) => Body::Device(Device {
                kind: fields.code("kind of device")?,
                name: fields.text("name of the device")?,
                values: fields.rest(),
            }),
            ("DIAG", _) => Body::Diagnostic(fields.rest_as_text("text")?),
            _ => Body::Other(fields.rest()),
        };
        let header = Header { counter, message_type, time_of_day, line, received_at };
        Ok(Self { header, body, surplus: fields.rest() })
    }
}

impl Header<'_> {
    /// The instant that the time of day means: the one near [`received_at`](Self::received_at) at which
    /// New York's clocks showed it. `None` if it is not known when the message was received.
    ///
    /// It lies less than an hour after that, and mostly before: a time of day that is further ahead
    /// is yesterday's. A message that is more than a day old gets a wrong day.
    pub fn at(&self) -> Option<Timestamp> {
        self.received_at.map(|received_at| clock::instant(self.time_of_day, received_at))
    }
}

impl Line {
    /// The letter that OCS has for it.
    pub fn letter(self) -> char {
        match self {
            Self::Red => 'R',
            Self::Orange => 'O',
            Self::Blue => 'B',
            Self::Green => 'G',
        }
    }

    fn take(fields: &mut Fields<'_>) -> Result<Self, OcsError> {
        match fields.code("line")? {
            "R" => Ok(Self::Red),
            "O" => Ok(Self::Orange),
            "B" => Ok(Self::Blue),
            "G" => Ok(Self::Green),
            _ => Err(fields.invalid("line", "R, O, B or G")),
        }
    }
}

/// The name, such as `Red`.
impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Red => "Red",
            Self::Orange => "Orange",
            Self::Blue => "Blue",
            Self::Green => "Green",
        })
    }
}

#[cfg(test)]
mod tests {
    use jiff::civil::time;
    use proptest::prelude::*;

    use super::*;
    use crate::ocs::{
        AddType, Movement, OcsError, Schedule, TripType,
        generate::{Generator, Item, Profile},
    };

    fn parse(line: &str) -> OcsMessage<'_> {
        OcsMessage::parse(line, None).unwrap_or_else(|error| panic!("{error} in {line:?}"))
    }

    /// A message that has no more fields than are known.
    fn body(line: &str) -> Body<'_> {
        let message = parse(line);
        assert!(message.surplus.is_empty(), "{line}");
        message.body
    }

    fn schedule(line: &str) -> Schedule<'_> {
        match body(line) {
            Body::Schedule(schedule) => schedule,
            other => panic!("{other:?}"),
        }
    }

    fn movement(line: &str) -> Movement<'_> {
        match body(line) {
            Body::Movement(movement) => movement,
            other => panic!("{other:?}"),
        }
    }

    fn error(line: &str) -> OcsError {
        OcsMessage::parse(line, None).expect_err(line)
    }

    #[test]
    fn the_header_is_the_same_for_all() {
        let received_at = "2025-07-02T09:47:55.1Z".parse().expect("a time");
        let line = "38375,DEVI,05:47:53,R,MD,ALE ATD,1,0";
        let header = OcsMessage::parse(line, Some(received_at)).expect("a message").header;
        assert_eq!(header.counter, 38_375);
        assert_eq!(header.message_type, "DEVI");
        assert_eq!(header.time_of_day, time(5, 47, 53, 0));
        assert_eq!(header.line, Some(Line::Red));
        assert_eq!(header.at(), "2025-07-02T09:47:53Z".parse().ok());
        assert_eq!(parse(line).header.at(), None);
        let lines = ["O", "B", "G"].map(|letter| {
            let line = format!("1,DEVI,05:47:53,{letter},MD,ALE ATD,1,0");
            parse(&line).header.line.expect("a line")
        });
        assert_eq!(lines, [Line::Orange, Line::Blue, Line::Green]);
    }

    #[test]
    fn rld() {
        let [w, none] = ["4994,TSCH,02:00:06,R,RLD,W", "3081,TSCH,09:44:01,O,RLD"].map(schedule);
        assert_eq!(w, Schedule::Reload { schedule_type: Some("W") });
        assert_eq!(none, Schedule::Reload { schedule_type: None });
    }

    #[test]
    fn new() {
        let Schedule::New(scheduled) = schedule(
            "3089,TSCH,02:00:08,B,NEW,98A880B8,S,P,05:12,05:32,W946_,ORIENT HEIGHTS YARD,WONDERLAND,0,\
             98A880B9",
        ) else {
            panic!("not a NEW");
        };
        assert_eq!(scheduled.trip, "98A880B8");
        assert_eq!(scheduled.add_type, Some(AddType::Scheduled));
        assert_eq!(scheduled.trip_type, Some(TripType::Other("P")));
        assert_eq!(scheduled.scheduled_departure, Some(time(5, 12, 0, 0)));
        assert_eq!(scheduled.scheduled_arrival, Some(time(5, 32, 0, 0)));
        assert_eq!(scheduled.route, Some("W946_"));
        assert_eq!(scheduled.origin, Some("ORIENT HEIGHTS YARD"));
        assert_eq!(scheduled.destination, Some("WONDERLAND"));
        assert_eq!((scheduled.previous, scheduled.next), (None, Some("98A880B9")));

        let line = "28329,TSCH,09:44:01,B,NEW,98AA06F7,A,R,,,,WONDERLAND,,0,0";
        let Schedule::New(added) = schedule(line) else { panic!("not a NEW") };
        assert_eq!(added.add_type, Some(AddType::Added));
        assert_eq!(added.trip_type, Some(TripType::Revenue));
        assert_eq!((added.scheduled_departure, added.scheduled_arrival), (None, None));
        assert_eq!((added.route, added.destination), (None, None));
        assert_eq!((added.previous, added.next), (None, None));

        let Schedule::New(empty) = schedule("1,TSCH,09:44:01,B,NEW,,,,,,,,,,") else {
            panic!("not a NEW");
        };
        assert_eq!((empty.trip, empty.add_type, empty.next), ("", None, None));
    }

    #[test]
    fn con() {
        for (cars, numbers) in [
            ("1737 1736 1725 1724 1731 1730", ["1737", "1736", "1725", "1724", "1731", "1730"]),
            ("2537 2536 1725 1724 1731 1730", ["1537", "1536", "1725", "1724", "1731", "1730"]),
        ] {
            let line = format!("4331,TSCH,09:44:01,R,CON,983AC23D,{cars},54466E3A");
            let Schedule::Consist(consist) = schedule(&line) else { panic!("not a CON") };
            assert_eq!((consist.trip, consist.train), ("983AC23D", "54466E3A"));
            let read: Vec<_> = consist.cars.iter().map(|car| car.number()).collect();
            assert_eq!(read, numbers);
            let shown: Vec<_> = consist.cars.iter().map(|car| car.shown()).collect();
            assert_eq!(shown.join(" "), cars);
        }
    }

    #[test]
    fn asn_has_the_train_before_the_trip() {
        assert_eq!(
            schedule("4520,TSCH,09:44:01,R,ASN,54466E3A,983BA807"),
            Schedule::Assignment { train: "54466E3A", trip: "983BA807" }
        );
    }

    #[test]
    fn dst() {
        let line = "4520,TSCH,09:44:01,R,DST,983BA807,CADDIGAN YARD,,";
        let Schedule::Destination(end) = schedule(line) else { panic!("not a DST") };
        assert_eq!((end.trip, end.destination), ("983BA807", "CADDIGAN YARD"));
        assert_eq!((end.route, end.scheduled_arrival), (None, None));
        let line = "4520,TSCH,09:44:01,R,DST,983BA807,ALEWIFE,S931_,00:05";
        let Schedule::Destination(end) = schedule(line) else { panic!("not a DST") };
        assert_eq!((end.route, end.scheduled_arrival), (Some("S931_"), Some(time(0, 5, 0, 0))));
    }

    #[test]
    fn del_lnk_off() {
        let trip = "983BA716";
        for (fields, expected) in [
            ("DEL,983BA716,0", Schedule::Deletion { trip, deleted: false }),
            ("DEL,983BA716,1", Schedule::Deletion { trip, deleted: true }),
            (
                "LNK,983BA716,983BA715,983BA710",
                Schedule::Link { trip, previous: Some("983BA715"), next: Some("983BA710") },
            ),
            (
                "LNK,983BA716,983BA715,0",
                Schedule::Link { trip, previous: Some("983BA715"), next: None },
            ),
            ("OFF,983BA716,13579", Schedule::Offset { trip, offset_minutes: 13_579 }),
            ("OFF,983BA716, -5", Schedule::Offset { trip, offset_minutes: -5 }),
        ] {
            assert_eq!(schedule(&format!("19332,TSCH,09:44:01,R,{fields}")), expected);
        }
    }

    #[test]
    fn tag() {
        fn cars(line: &str) -> Vec<(Option<char>, String)> {
            let Schedule::Tags(tags) = schedule(line) else { panic!("not a TAG") };
            assert_eq!((tags.trip, tags.train), ("9836C4EE", "543C4CE2"));
            assert_eq!(tags.consist_tags().collect::<String>(), "BDKET");
            let cars = tags.cars.iter();
            cars.map(|tagged| (tagged.tag, tagged.car.number().into_owned())).collect()
        }
        let expected = [
            (Some('D'), "1707"),
            (None, "1706"),
            (Some('K'), "1623"),
            (Some('E'), "1622"),
            (Some('E'), "1511"),
            (Some('E'), "1510"),
        ]
        .map(|(tag, car)| (tag, car.to_owned()));
        let line =
            "19333,TSCH,09:44:01,R,TAG,9836C4EE,543C4CE2,BDKET,D1707, 1706,K1623,E1622,E1511,E1510";
        assert_eq!(cars(line), expected);
        assert_eq!(cars(&line.replace("E151", "E251")), expected);
        assert_eq!(cars(&line.replace("BDKET", "BD KE T")), expected);
        assert_eq!(cars("1,TSCH,09:44:01,R,TAG,9836C4EE,543C4CE2,BDKET"), []);
    }

    #[test]
    fn tmov_of_heavy_rail() {
        let Movement::HeavyRail(train) = movement(
            "7424,TMOV,05:33:34,R,547C0908,42.396399,-71.139415,0,0,9811BD73,S1885,,42.396305,\
             -71.140080",
        ) else {
            panic!("not heavy rail");
        };
        let place = train.position.expect("a place");
        assert_eq!((place.latitude, place.longitude), (42.396399, -71.139415));
        assert_eq!((train.train, train.trip), ("547C0908", Some("9811BD73")));
        assert_eq!((train.train_tag, train.direction), (Some("0"), Some("0")));
        assert_eq!((train.train_id, train.express), (Some("S1885"), None));
        let before = train.previous_position.expect("a place");
        assert_eq!((before.latitude, before.longitude), (42.396305, -71.140080));

        let Movement::HeavyRail(nowhere) =
            movement("1,TMOV,05:33:34,R,547C0908,0,0,0,0,0,WORK,1,0.0,0")
        else {
            panic!("not heavy rail");
        };
        assert_eq!((nowhere.position, nowhere.previous_position), (None, None));
        assert_eq!((nowhere.trip, nowhere.express), (None, Some("1")));
    }

    #[test]
    fn tmov_of_a_train_that_left() {
        assert_eq!(
            movement("4732,TMOV,01:56:36,B,547C237C,0,0"),
            Movement::Left { train: "547C237C" }
        );
        // Cut short, not gone.
        for line in ["1,TMOV,01:56:36,B,547C237C,42.3,-71.1", "1,TMOV,01:56:36,B,547C237C,,"] {
            assert_eq!(error(line), OcsError::Missing { index: 7, field: "train tag" });
        }
    }

    #[test]
    fn tmov_of_light_rail() {
        let Movement::LightRail(train) = movement(
            "9529,TMOV,02:00:40,G,10230,42.336251428162655,-71.14902308252195,1,831,25,  3885,gpsci,\
             3885,0.00,254.19,3,42.336251428162655,-71.14902308252195",
        ) else {
            panic!("not light rail");
        };
        let place = train.position.expect("a place");
        assert_eq!((place.latitude, place.longitude), (42.336251428162655, -71.14902308252195));
        assert_eq!(train.train, "10230");
        assert_eq!((train.flag, train.avi_route, train.code), (Some("1"), Some("831"), Some("25")));
        assert_eq!(train.lead_car.number(), "3885");
        assert_eq!(train.position_source, Some("gpsci"));
        assert_eq!((train.speed, train.heading_degrees), (Some(0.0), Some(254.19)));
        assert_eq!((train.previous_code, train.previous_position), (Some("3"), Some(place)));

        let Movement::LightRail(pair) = movement(
            "11220,TMOV,01:59:59,G,10023,42.336581141538126,-71.25367201212993,1,852,35,  3644,gpsci,\
             3644-3862,0.00,26.69",
        ) else {
            panic!("not light rail");
        };
        assert_eq!(pair.cars.iter().map(|car| car.shown()).collect::<Vec<_>>(), ["3644", "3862"]);
        assert_eq!((pair.previous_code, pair.previous_position), (None, None));
    }

    #[test]
    fn rgps_has_boston_west_of_greenwich() {
        for (line, router, car, [latitude, longitude], [speed, heading]) in [
            (
                "38357,RGPS,14:24:21,G,U14-182-008,3888,42.367026,-71.106266, 0.00, 184.54",
                "U14-182-008",
                "3888",
                [42.367026, -71.106266],
                [0.0, 184.54],
            ),
            (
                "53402,RGPS,12:17:43,G,U16-350-713,3087,42.2694266666667,71.0770833333333,31.94,71.99",
                "U16-350-713",
                "3087",
                [42.2694266666667, -71.0770833333333],
                [31.94, 71.99],
            ),
        ] {
            let Body::RawGps(gps) = body(line) else { panic!("not RGPS") };
            assert_eq!((gps.router, gps.car.shown()), (router, car));
            let place = gps.position.expect("a place");
            assert_eq!((place.latitude, place.longitude), (latitude, longitude));
            assert_eq!((gps.speed, gps.heading_degrees), (Some(speed), Some(heading)));
        }
        let Body::RawGps(gps) = body("1,RGPS,14:24:21,G,U14,3888,0,0,0,0") else {
            panic!("not RGPS");
        };
        assert_eq!(gps.position, None);
    }

    #[test]
    fn devi_and_diag() {
        let Body::Device(device) = body("38375,DEVI,05:47:53,R,MD,ALE ATD,1,0") else {
            panic!("not DEVI");
        };
        assert_eq!((device.kind, device.name), ("MD", "ALE ATD"));
        assert_eq!(device.values.iter().collect::<Vec<_>>(), ["1", "0"]);
        let diagnostic = parse("1234,DIAG,12:34:56,BROADCAST, to all");
        assert_eq!(diagnostic.body, Body::Diagnostic("BROADCAST, to all"));
        assert_eq!(diagnostic.header.line, None);
    }

    #[test]
    fn p9_what_is_not_known_is_kept() {
        let notd = parse("4364,NOTD,02:04:55,B,SW,WON_SW1,0,1,0,1");
        assert_eq!(notd.header.message_type, "NOTD");
        let Body::Other(fields) = notd.body else { panic!("{notd:?}") };
        assert_eq!(fields.as_str(), Some("B,SW,WON_SW1,0,1,0,1"));
        assert_eq!(fields.len(), 7);
        let Body::Other(none) = body("4364,NOTD,02:04:55") else { panic!("a known type") };
        assert!(none.is_empty());
        assert_eq!(none.iter().count(), 0);

        let Schedule::Other { subtype, fields } = schedule("1,TSCH,02:04:55,B,XYZ,a,b") else {
            panic!("a known subtype");
        };
        assert_eq!((subtype, fields.as_str()), ("XYZ", Some("a,b")));

        for (line, surplus) in [
            ("1,TSCH,02:04:55,B,RLD,W,x", "x"),
            ("1,TSCH,02:04:55,B,DEL,98A8F1AF,0,x,", "x,"),
            ("1,RGPS,14:24:21,G,U14,3888,42.3,-71.1,0,0,", ""),
            ("1,TMOV,05:33:34,R,547C0908,42.3,-71.1,0,0,0,WORK,,42.3,-71.1,x,y", "x,y"),
        ] {
            assert_eq!(parse(line).surplus.as_str(), Some(surplus));
        }
    }

    #[test]
    fn p9_what_is_wrong_is_named() {
        for (line, index, field) in [
            ("", 0, "counter"),
            ("not_an_integer,DEVI,02:04:55,B,SW,WON_SW1,0,1,0,1", 0, "counter"),
            ("not_an_integer,DEVI,this_is_not_a_time,B,SW,WON_SW1,0,1,0,1", 0, "counter"),
            ("4364", 1, "type"),
            ("4364,,02:04:55,", 1, "type"),
            ("4364,DEVI", 2, "time"),
            ("4364,DEVI,this_is_not_a_time,B,SW,WON_SW1,0,1,0,1", 2, "time"),
            ("4364,DEVI,2:04:55,B", 2, "time"),
            ("4364,DEVI,24:00:00,B", 2, "time"),
            ("4364,DEVI,02:04:60,B", 2, "time"),
            ("4364,DEVI,02:04:55", 3, "line"),
            (
                "3089,TSCH,02:00:08,X,NEW,98A880B8,S,P,05:12,05:32,W946_,ORIENT HEIGHTS YARD,\
                 WONDERLAND,0,98A880B9",
                3,
                "line",
            ),
            ("1,DIAG,12:34:56", 3, "text"),
            ("1,DEVI,12:34:56,R,SW", 5, "name of the device"),
            ("1,TSCH,12:34:56,R", 4, "TSCH subtype"),
            ("1,TSCH,12:34:56,R,", 4, "TSCH subtype"),
            ("1,TSCH,12:34:56,R,NEW,98A880B8,S,P,5:12", 8, "scheduled departure"),
            ("1,TSCH,12:34:56,R,NEW,98A880B8,S,P,,,,,,0", 14, "next trip uid"),
            ("1,TSCH,12:34:56,R,CON,98A880B8,1737", 7, "train uid"),
            ("1,TSCH,12:34:56,R,ASN,98A880B8", 6, "trip uid"),
            ("1,TSCH,12:34:56,R,DST,98A880B8,ALEWIFE,,x", 8, "scheduled arrival"),
            ("1,TSCH,12:34:56,R,DEL,98A880B8,2", 6, "deletion"),
            ("1,TSCH,12:34:56,R,LNK,98A880B8,0", 7, "next trip uid"),
            ("1,TSCH,12:34:56,R,OFF,98A880B8,1.5", 6, "offset"),
            ("1,TSCH,12:34:56,R,TAG,98A880B8,543C4CE2", 7, "consist tags"),
            ("1,TMOV,12:34:56,R,547C0908,42.3,x,0,0,0,WORK,,42.3,-71.1", 6, "longitude"),
            ("1,TMOV,12:34:56,R,547C0908,nan,0,0,0,0,WORK,,42.3,-71.1", 5, "latitude"),
            ("1,TMOV,12:34:56,R,547C0908,91,0,0,0,0,WORK,,42.3,-71.1", 5, "latitude"),
            ("1,TMOV,12:34:56,R,547C0908,42.3,,0,0,0,WORK,,42.3,-71.1", 6, "longitude"),
            ("1,TMOV,12:34:56,R,547C0908,42.3,-71.1,0,0,0,WORK,,42.3", 13, "previous longitude"),
            ("1,TMOV,12:34:56,G,10230,42.3,-71.1,1,831,25,3885,gpsci,3885,0.00", 14, "heading"),
            (
                "1,TMOV,12:34:56,G,10230,42.3,-71.1,1,831,25,3885,gpsci,3885,0,0,3",
                16,
                "previous latitude",
            ),
            ("1,RGPS,14:24:21,G,U14,3888,42.3,-71.1,fast,0", 8, "speed"),
        ] {
            let error = error(line);
            assert_eq!((error.index(), error.field()), (index, field), "{line}");
        }
    }

    #[test]
    fn an_error_names_the_field_and_does_not_quote_it() {
        assert_eq!(
            error("4364,DEVI,noon,B,SW,WON_SW1").to_string(),
            "OCS message not understood: field 2 (counted from 0), the time, is not a time HH:MM:SS"
        );
        assert_eq!(
            error("4364,TSCH,02:04:55,B,DEL,98A8F1AF").to_string(),
            "OCS message not understood: it ends before field 6 (counted from 0), the deletion"
        );
    }

    #[test]
    fn everything_that_is_generated_is_understood() {
        let generators = [(1, Profile::Day), (2, Profile::Morning)]
            .map(|(seed, profile)| Generator::new(seed, 0, profile).take(30_000));
        for item in generators.into_iter().flatten() {
            let Item::Message(line) = item else { continue };
            let message = parse(&line);
            let is_known = match message.body {
                Body::Schedule(Schedule::Other { .. }) | Body::Other(_) => false,
                _ => message.surplus.is_empty(),
            };
            assert!(is_known, "{line}");
        }
    }

    /// Lines that get past the header, of fields that may be right or wrong.
    fn almost_lines() -> impl Strategy<Value = String> {
        let kind = prop::sample::select(vec!["TSCH", "TMOV", "RGPS", "DEVI", "DIAG", "NOTD"]);
        let field = prop_oneof![
            prop::sample::select(vec![
                "RLD",
                "NEW",
                "CON",
                "ASN",
                "DST",
                "DEL",
                "LNK",
                "OFF",
                "TAG",
                "",
                "0",
                "1",
                "05:12",
                "42.3",
                "-71.1",
                "é",
                " 3885",
                "1737 25é",
            ])
            .prop_map(str::to_owned),
            "\\PC{0,5}",
        ];
        (kind, prop::sample::select(vec!["R", "G", "X"]), prop::collection::vec(field, 0..18))
            .prop_map(|(kind, line, fields)| {
                format!("1,{kind},02:04:55,{line},{}", fields.join(","))
            })
    }

    proptest! {
        #[test]
        fn p9_no_text_makes_it_panic(text in any::<String>(), line in almost_lines()) {
            for line in [&text, &line] {
                // The lists are read only now.
                let _ = format!("{:?}", OcsMessage::parse(line, None));
            }
        }
    }
}
