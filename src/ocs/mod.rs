//! The domain: what OCS sends, and the event that carries it.
//!
//! Pure. Framing and events know no sockets, the service day knows no clock, and the traffic generator
//! gives the same bytes for the same seed. Each line is read by itself: which trains there are, and when
//! they come, is for services to work out.
//!
//! # The OCS line
//!
//! `counter,TYPE,HH:MM:SS,line,…`: fields between commas, without quotes. [`OcsMessage`] is what it says:
//!
//! | type | what it says | |
//! |---|---|---|
//! | TSCH | a trip was added, dropped, assigned a train | [`Schedule`] |
//! | TMOV | a train is somewhere, or has left | [`Movement`] |
//! | RGPS | where a light-rail car is by its own GPS | [`RawGps`] |
//! | DEVI | the state of a switch or signal | [`Device`] |
//! | DIAG | free text | [`Body::Diagnostic`] |
//!
//! What is not known (types, codes, fields at the end) is kept. What is missing or not what it must be
//! is an [`OcsError`] for that line alone. Numbers and codes may be padded with spaces.

mod archive_line;
mod batch;
mod car;
mod clock;
mod event;
mod fields;
mod frame;
pub mod generate;
mod message;
mod movement;
mod schedule;
mod schema;
mod sequence;
mod service_day;

pub use archive_line::ArchiveLine;
pub use batch::{BATCH_EVENT_TYPE, BatchMessage, is_raw_message_batch};
pub use car::{Car, Cars};
pub(crate) use event::EventMiddle;
pub use event::{EVENT_TYPE, Event, EventSource, event_time, is_raw_message};
pub use fields::{Fields, OcsError};
pub use frame::{EOT, Frame, Framer};
pub use message::{Body, Device, Header, Line, OcsMessage};
pub use movement::{HeavyRailMovement, LightRailMovement, Movement, Position, RawGps};
pub use schedule::{
    AddType, Consist, Destination, NewTrip, Schedule, TaggedCar, TaggedCars, Tags, TripType,
};
pub use schema::event_schema;
pub use sequence::{SequenceMonitor, SequenceStep, counter};
pub use service_day::ServiceDay;
