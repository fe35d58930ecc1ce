//! The domain: what OCS sends, and the event that carries it.
//!
//! Pure. Framing and events know no sockets, the service day knows no clock, and the traffic generator
//! gives the same bytes for the same seed.

mod batch;
mod event;
mod frame;
pub mod generate;
mod service_day;

pub use batch::{BATCH_EVENT_TYPE, BatchMessage, is_raw_message_batch};
pub(crate) use event::EventMiddle;
pub use event::{EVENT_TYPE, Event, EventSource, event_time, is_raw_message};
pub use frame::{EOT, Frame, Framer};
pub use service_day::ServiceDay;
