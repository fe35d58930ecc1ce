//! TMOV and RGPS: where trains are.

use super::{Car, Cars, Fields, Line, OcsError};

/// A place in degrees. `0,0` stands for no place and is never one.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Position {
    /// North of the equator.
    pub latitude: f64,
    /// East of Greenwich, so negative in Boston.
    pub longitude: f64,
}

impl Position {
    fn new([latitude, longitude]: [f64; 2]) -> Option<Self> {
        let is_place = latitude != 0.0 || longitude != 0.0;
        is_place.then_some(Self { latitude, longitude })
    }
}

/// A TMOV message: a train moved.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Movement<'a> {
    /// On the Red, Orange or Blue Line, by track circuit.
    HeavyRail(HeavyRailMovement<'a>),
    /// On the Green Line, by GPS, track circuit or wayside reader.
    LightRail(LightRailMovement<'a>),
    /// The short form: the train left the system.
    Left {
        /// The train's uid.
        train: &'a str,
    },
}

/// Where a train of the Red, Orange or Blue Line is.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct HeavyRailMovement<'a> {
    /// The train's uid, hexadecimal.
    pub train: &'a str,
    /// The track circuit that it occupies.
    pub position: Option<Position>,
    /// A number whose meaning is not public.
    pub train_tag: Option<&'a str>,
    /// A code for direction and route.
    pub direction: Option<&'a str>,
    /// The trip that it serves.
    pub trip: Option<&'a str>,
    /// What dispatchers call it: letters and the lead car, such as `S1885`, or `WORK`. An `S` marks the
    /// last trip of the day.
    pub train_id: Option<&'a str>,
    /// Set if it runs express.
    pub express: Option<&'a str>,
    /// The track circuit before.
    pub previous_position: Option<Position>,
}

/// Where a train of the Green Line is.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct LightRailMovement<'a> {
    /// The train's id, decimal.
    pub train: &'a str,
    /// Where it is.
    pub position: Option<Position>,
    /// Field 7, whose meaning is not public; `1` was seen.
    pub flag: Option<&'a str>,
    /// The route by the code of the wayside readers, finer than a public route.
    pub avi_route: Option<&'a str>,
    /// Field 9, whose meaning is not public; `25` and `35` were seen.
    pub code: Option<&'a str>,
    /// The first car.
    pub lead_car: Car<'a>,
    /// What the position comes from; `gpsci` was seen.
    pub position_source: Option<&'a str>,
    /// All cars.
    pub cars: Cars<'a>,
    /// In a unit that is not public.
    pub speed: Option<f64>,
    /// Clockwise from north.
    pub heading_degrees: Option<f64>,
    /// Field 15, which may be absent and whose meaning is not public; `3` was seen.
    pub previous_code: Option<&'a str>,
    /// Where it was before; may be absent.
    pub previous_position: Option<Position>,
}

/// An RGPS message: where a modem on board says that its car is.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct RawGps<'a> {
    /// The modem, such as `U15-141-626`.
    pub router: &'a str,
    /// The car it is in.
    pub car: Car<'a>,
    /// Where it is. Some modems leave out the sign of the longitude; here it has it.
    pub position: Option<Position>,
    /// In a unit that is not public.
    pub speed: Option<f64>,
    /// Clockwise from north.
    pub heading_degrees: Option<f64>,
}

impl<'a> Movement<'a> {
    pub(super) fn take(fields: &mut Fields<'a>, line: Line) -> Result<Self, OcsError> {
        let train = fields.code("train uid")?;
        let coordinates = coordinates(fields, ["latitude", "longitude"])?;
        if coordinates == Some([0.0, 0.0]) && fields.is_empty() {
            return Ok(Self::Left { train });
        }
        let position = coordinates.and_then(Position::new);
        if line == Line::Green {
            LightRailMovement::take(fields, line, train, position).map(Self::LightRail)
        } else {
            HeavyRailMovement::take(fields, train, position).map(Self::HeavyRail)
        }
    }
}

impl<'a> HeavyRailMovement<'a> {
    fn take(
        fields: &mut Fields<'a>,
        train: &'a str,
        position: Option<Position>,
    ) -> Result<Self, OcsError> {
        Ok(Self {
            train,
            position,
            train_tag: fields.optional("train tag")?,
            direction: fields.optional("direction")?,
            trip: fields.other_trip("trip uid")?,
            train_id: fields.optional("train id")?,
            express: fields.optional("express flag")?,
            previous_position: previous_position(fields)?,
        })
    }
}

impl<'a> LightRailMovement<'a> {
    fn take(
        fields: &mut Fields<'a>,
        line: Line,
        train: &'a str,
        position: Option<Position>,
    ) -> Result<Self, OcsError> {
        let mut movement = Self {
            train,
            position,
            flag: fields.optional("flag")?,
            avi_route: fields.optional("AVI route code")?,
            code: fields.optional("code")?,
            lead_car: fields.car("lead car", line)?,
            position_source: fields.optional("source of the position")?,
            cars: Cars::new(fields.text("cars")?, '-', line),
            speed: fields.decimal("speed")?,
            heading_degrees: fields.decimal("heading")?,
            previous_code: None,
            previous_position: None,
        };
        if !fields.is_empty() {
            movement.previous_code = fields.optional("code of the previous position")?;
            movement.previous_position = previous_position(fields)?;
        }
        Ok(movement)
    }
}

impl<'a> RawGps<'a> {
    pub(super) fn take(fields: &mut Fields<'a>, line: Line) -> Result<Self, OcsError> {
        Ok(Self {
            router: fields.code("router id")?,
            car: fields.car("car", line)?,
            position: coordinates(fields, ["latitude", "longitude"])?
                // Boston is west of Greenwich.
                .map(|[latitude, longitude]| [latitude, -longitude.abs()])
                .and_then(Position::new),
            speed: fields.decimal("speed")?,
            heading_degrees: fields.decimal("heading")?,
        })
    }
}

fn previous_position(fields: &mut Fields<'_>) -> Result<Option<Position>, OcsError> {
    let coordinates = coordinates(fields, ["previous latitude", "previous longitude"])?;
    Ok(coordinates.and_then(Position::new))
}

/// Takes latitude and longitude, which are numbers, or both empty.
fn coordinates(
    fields: &mut Fields<'_>,
    [north, east]: [&'static str; 2],
) -> Result<Option<[f64; 2]>, OcsError> {
    let latitude = fields.decimal(north)?;
    if latitude.is_some_and(|degrees| degrees.abs() > 90.0) {
        return Err(fields.invalid(north, "from -90 to 90"));
    }
    let longitude = fields.decimal(east)?;
    if longitude.is_some_and(|degrees| degrees.abs() > 180.0) {
        return Err(fields.invalid(east, "from -180 to 180"));
    }
    match (latitude, longitude) {
        (None, None) => Ok(None),
        (Some(latitude), Some(longitude)) => Ok(Some([latitude, longitude])),
        _ => Err(fields.invalid(east, "given and empty together with the latitude")),
    }
}
