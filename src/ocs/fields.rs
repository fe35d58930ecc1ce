//! The fields of an OCS line, one after the other.

use std::{fmt, str::FromStr};

use jiff::civil::Time;

use super::{Car, Line};

/// Why an OCS line is not understood. It concerns that line only, and [`Message::raw`] still has it.
///
/// It names the field but does not quote it, so it may be logged. Fields are counted from 0, the
/// counter: `raw.split(',').nth(error.index())` is the one.
///
/// [`Message::raw`]: crate::Message::raw
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OcsError {
    /// The line ends before a field that it must have.
    #[error(
        "OCS message not understood: it ends before field {index} (counted from 0), the {field}"
    )]
    Missing {
        /// Its place.
        index: usize,
        /// What it is.
        field: &'static str,
    },
    /// A field is not what it must be.
    #[error(
        "OCS message not understood: field {index} (counted from 0), the {field}, is not {expected}"
    )]
    Invalid {
        /// Its place.
        index: usize,
        /// What it is.
        field: &'static str,
        /// What it should be.
        expected: &'static str,
    },
}

impl OcsError {
    /// What the field is, such as `scheduled departure`.
    pub fn field(&self) -> &'static str {
        match self {
            Self::Missing { field, .. } | Self::Invalid { field, .. } => field,
        }
    }

    /// The place of the field in the line, from 0.
    pub fn index(&self) -> usize {
        match self {
            Self::Missing { index, .. } | Self::Invalid { index, .. } => *index,
        }
    }
}

/// Fields of an OCS line as they stand there: a list that is read in place.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Fields<'a> {
    /// With the commas; `None` if there is none. An empty text is one empty field.
    text: Option<&'a str>,
    /// The place of the first one in the line.
    index: usize,
}

impl<'a> Fields<'a> {
    pub(super) fn of(line: &'a str) -> Self {
        Self { text: Some(line), index: 0 }
    }

    /// The fields in their order.
    pub fn iter(&self) -> impl Iterator<Item = &'a str> + Clone + use<'a> {
        self.text.into_iter().flat_map(|text| text.split(','))
    }

    /// The fields with the commas between them; `None` if there is no field.
    pub fn as_str(&self) -> Option<&'a str> {
        self.text
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.iter().count()
    }

    /// Whether there is none. A field that is empty is one.
    pub fn is_empty(&self) -> bool {
        self.text.is_none()
    }

    /// Takes all that is left.
    pub(super) fn rest(&mut self) -> Self {
        std::mem::replace(self, Self { text: None, index: self.index })
    }

    /// Takes all that is left as one text.
    pub(super) fn rest_as_text(&mut self, field: &'static str) -> Result<&'a str, OcsError> {
        self.rest().text.ok_or(OcsError::Missing { index: self.index, field })
    }

    /// Takes a field as it stands.
    pub(super) fn text(&mut self, field: &'static str) -> Result<&'a str, OcsError> {
        let text = self.text.ok_or(OcsError::Missing { index: self.index, field })?;
        self.index += 1;
        match text.split_once(',') {
            Some((first, rest)) => {
                self.text = Some(rest);
                Ok(first)
            }
            None => {
                self.text = None;
                Ok(text)
            }
        }
    }

    /// Takes an identifier or a code: spaces around it do not count.
    pub(super) fn code(&mut self, field: &'static str) -> Result<&'a str, OcsError> {
        self.text(field).map(str::trim)
    }

    /// Takes a code that may be empty.
    pub(super) fn optional(&mut self, field: &'static str) -> Result<Option<&'a str>, OcsError> {
        Ok(Some(self.code(field)?).filter(|code| !code.is_empty()))
    }

    /// Takes the uid of a trip; `0` stands for none, and so does nothing.
    pub(super) fn other_trip(&mut self, field: &'static str) -> Result<Option<&'a str>, OcsError> {
        Ok(self.optional(field)?.filter(|uid| *uid != "0"))
    }

    pub(super) fn car(&mut self, field: &'static str, line: Line) -> Result<Car<'a>, OcsError> {
        Ok(Car::new(self.code(field)?, line))
    }

    pub(super) fn integer<N: FromStr>(&mut self, field: &'static str) -> Result<N, OcsError> {
        let number = self.code(field)?.parse();
        number.map_err(|_| self.invalid(field, "a whole number in range"))
    }

    /// Takes a number that may be empty.
    pub(super) fn decimal(&mut self, field: &'static str) -> Result<Option<f64>, OcsError> {
        let Some(text) = self.optional(field)? else { return Ok(None) };
        match text.parse() {
            Ok(number) if f64::is_finite(number) => Ok(Some(number)),
            _ => Err(self.invalid(field, "a number")),
        }
    }

    /// Takes `HH:MM:SS`.
    pub(super) fn time_of_day(&mut self, field: &'static str) -> Result<Time, OcsError> {
        let time = clock::<3>(self.code(field)?).and_then(|[h, m, s]| Time::new(h, m, s, 0).ok());
        time.ok_or(self.invalid(field, "a time HH:MM:SS"))
    }

    /// Takes `HH:MM`, which may be empty.
    pub(super) fn schedule_time(&mut self, field: &'static str) -> Result<Option<Time>, OcsError> {
        let Some(text) = self.optional(field)? else { return Ok(None) };
        let time = clock::<2>(text).and_then(|[h, m]| Time::new(h, m, 0, 0).ok());
        time.map(Some).ok_or(self.invalid(field, "a time HH:MM"))
    }

    /// The error for the field that was just taken.
    pub(super) fn invalid(&self, field: &'static str, expected: &'static str) -> OcsError {
        OcsError::Invalid { index: self.index - 1, field, expected }
    }
}

impl fmt::Debug for Fields<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

/// `N` numbers of two digits with colons between them.
fn clock<const N: usize>(text: &str) -> Option<[i8; N]> {
    let mut numbers = [0; N];
    let mut parts = text.split(':');
    for number in &mut numbers {
        let [tens @ b'0'..=b'9', ones @ b'0'..=b'9'] = parts.next()?.as_bytes() else {
            return None;
        };
        *number = ((tens - b'0') * 10 + (ones - b'0')) as i8;
    }
    parts.next().is_none().then_some(numbers)
}
