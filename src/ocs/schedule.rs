//! TSCH: changes of the schedule.

use std::fmt;

use jiff::civil::Time;

use super::{Car, Cars, Fields, Line, OcsError};

/// A TSCH message: what became of a trip. Heavy rail only.
///
/// A *trip* is one run between two places, scheduled or added; a *train* is the cars now running, which
/// serve one trip at a time. Their uids are opaque.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Schedule<'a> {
    /// RLD: the schedule of the line is loaded anew. What was known of its trips is void, and a NEW for
    /// every trip follows. Comes a little after 02:00.
    Reload {
        /// `W` was seen, on weekdays; old messages have none.
        schedule_type: Option<&'a str>,
    },
    /// NEW: a trip exists.
    New(NewTrip<'a>),
    /// CON: the cars of the train that serves a trip.
    Consist(Consist<'a>),
    /// ASN: a train now serves a trip.
    Assignment {
        /// The train.
        train: &'a str,
        /// The trip.
        trip: &'a str,
    },
    /// DST: a trip ends somewhere else.
    Destination(Destination<'a>),
    /// DEL: a trip is dropped, or is not dropped after all.
    Deletion {
        /// The trip.
        trip: &'a str,
        /// False where a deletion is undone.
        deleted: bool,
    },
    /// LNK: a trip has new neighbours in the chain of trips that one train serves.
    Link {
        /// The trip.
        trip: &'a str,
        /// The one before it.
        previous: Option<&'a str>,
        /// The one after it.
        next: Option<&'a str>,
    },
    /// OFF: the departure is moved.
    Offset {
        /// The trip.
        trip: &'a str,
        /// By how much against the schedule; negative is earlier. (RFC 12 and RFC 18 say minutes.)
        offset_minutes: i32,
    },
    /// TAG: the letters that dispatchers see for a train.
    Tags(Tags<'a>),
    /// A change that this version does not know.
    Other {
        /// Its subtype.
        subtype: &'a str,
        /// The fields after the subtype.
        fields: Fields<'a>,
    },
}

/// NEW: a trip exists.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct NewTrip<'a> {
    /// The trip.
    pub trip: &'a str,
    /// Whether it was in the schedule.
    pub add_type: Option<AddType<'a>>,
    /// Whether passengers ride on it.
    pub trip_type: Option<TripType<'a>>,
    /// By the wall clock; [`ServiceDay::scheduled_at`](super::ServiceDay::scheduled_at) gives the
    /// instant.
    pub scheduled_departure: Option<Time>,
    /// By the wall clock, like the departure.
    pub scheduled_arrival: Option<Time>,
    /// OCS's name for the route, such as `W946_`.
    pub route: Option<&'a str>,
    /// A station or yard by its OCS name, which is not that of GTFS.
    pub origin: Option<&'a str>,
    /// A station or yard by its OCS name.
    pub destination: Option<&'a str>,
    /// The trip that the same train serves before.
    pub previous: Option<&'a str>,
    /// The trip that the same train serves afterwards.
    pub next: Option<&'a str>,
}

/// How a trip came to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum AddType<'a> {
    /// `S`: it is in the schedule.
    Scheduled,
    /// `A`: a dispatcher added it.
    Added,
    /// A code that this version does not know.
    Other(&'a str),
}

/// What a trip is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum TripType<'a> {
    /// `R`: revenue service.
    Revenue,
    /// A code whose meaning is not public. `P` was seen on a run from a yard to a terminal.
    Other(&'a str),
}

/// CON: the cars of the train that serves a trip.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Consist<'a> {
    /// The trip.
    pub trip: &'a str,
    /// From front to back.
    pub cars: Cars<'a>,
    /// The train.
    pub train: &'a str,
}

/// DST: a trip ends somewhere else.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Destination<'a> {
    /// The trip.
    pub trip: &'a str,
    /// A station or yard by its OCS name.
    pub destination: &'a str,
    /// OCS's name for the route it takes now.
    pub route: Option<&'a str>,
    /// By the wall clock; [`ServiceDay::scheduled_at`](super::ServiceDay::scheduled_at) gives the
    /// instant.
    pub scheduled_arrival: Option<Time>,
}

/// TAG: the letters that dispatchers see for a train and for its cars.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Tags<'a> {
    /// The trip.
    pub trip: &'a str,
    /// The train.
    pub train: &'a str,
    /// The tags of the whole train as they stand: a character each.
    pub consist_tags: &'a str,
    /// The cars with their tags, those without one too.
    pub cars: TaggedCars<'a>,
}

impl<'a> Tags<'a> {
    /// The tags of the whole train. Spaces between them do not count.
    pub fn consist_tags(&self) -> impl Iterator<Item = char> + Clone + use<'a> {
        self.consist_tags.chars().filter(|tag| *tag != ' ')
    }
}

/// The cars of a TAG message.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct TaggedCars<'a> {
    fields: Fields<'a>,
    line: Line,
}

impl<'a> TaggedCars<'a> {
    /// The cars in the order of the message. A field with nothing in it names no car.
    pub fn iter(&self) -> impl Iterator<Item = TaggedCar<'a>> + Clone + use<'a> {
        let line = self.line;
        self.fields.iter().filter_map(move |field| {
            let mut rest = field.chars();
            let tag = rest.next()?;
            Some(TaggedCar {
                tag: Some(tag).filter(|tag| *tag != ' '),
                car: Car::new(rest.as_str(), line),
            })
        })
    }
}

impl fmt::Debug for TaggedCars<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

/// A car and the letter that dispatchers see for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct TaggedCar<'a> {
    /// The letter.
    pub tag: Option<char>,
    /// The car.
    pub car: Car<'a>,
}

impl<'a> Schedule<'a> {
    pub(super) fn take(fields: &mut Fields<'a>, line: Line) -> Result<Self, OcsError> {
        Ok(match fields.code("TSCH subtype")? {
            "RLD" => Self::Reload {
                schedule_type: match fields.is_empty() {
                    true => None,
                    false => fields.optional("schedule type")?,
                },
            },
            "NEW" => Self::New(NewTrip {
                trip: fields.code("trip uid")?,
                add_type: fields.optional("add type")?.map(|code| match code {
                    "S" => AddType::Scheduled,
                    "A" => AddType::Added,
                    other => AddType::Other(other),
                }),
                trip_type: fields.optional("trip type")?.map(|code| match code {
                    "R" => TripType::Revenue,
                    other => TripType::Other(other),
                }),
                scheduled_departure: fields.schedule_time("scheduled departure")?,
                scheduled_arrival: fields.schedule_time("scheduled arrival")?,
                route: fields.optional("route id")?,
                origin: fields.optional("origin")?,
                destination: fields.optional("destination")?,
                previous: fields.other_trip("previous trip uid")?,
                next: fields.other_trip("next trip uid")?,
            }),
            "CON" => Self::Consist(Consist {
                trip: fields.code("trip uid")?,
                cars: Cars::new(fields.text("cars")?, ' ', line),
                train: fields.code("train uid")?,
            }),
            "ASN" => Self::Assignment {
                train: fields.code("train uid")?,
                trip: fields.code("trip uid")?,
            },
            "DST" => Self::Destination(Destination {
                trip: fields.code("trip uid")?,
                destination: fields.text("destination")?,
                route: fields.optional("route id")?,
                scheduled_arrival: fields.schedule_time("scheduled arrival")?,
            }),
            "DEL" => Self::Deletion {
                trip: fields.code("trip uid")?,
                deleted: match fields.code("deletion")? {
                    "0" => false,
                    "1" => true,
                    _ => return Err(fields.invalid("deletion", "0 or 1")),
                },
            },
            "LNK" => Self::Link {
                trip: fields.code("trip uid")?,
                previous: fields.other_trip("previous trip uid")?,
                next: fields.other_trip("next trip uid")?,
            },
            "OFF" => Self::Offset {
                trip: fields.code("trip uid")?,
                offset_minutes: fields.integer("offset")?,
            },
            "TAG" => Self::Tags(Tags {
                trip: fields.code("trip uid")?,
                train: fields.code("train uid")?,
                consist_tags: fields.text("consist tags")?,
                cars: TaggedCars { fields: fields.rest(), line },
            }),
            "" => return Err(fields.invalid("TSCH subtype", "a name")),
            subtype => Self::Other { subtype, fields: fields.rest() },
        })
    }
}
