use std::{borrow::Cow, fmt};

use super::Line;

/// A car of a train.
///
/// Since January 2024 dispatchers type the Red Line's cars 15xx as 25xx: new Orange Line cars are 15xx
/// too, and OCS cannot hold a number twice. So a car has the number on its side, and the one that OCS
/// shows for it.
///
/// ```
/// use tramline::ocs::{Body, OcsMessage, Schedule};
///
/// let line = "4331,TSCH,09:44:01,R,CON,983AC23D,2537 2536 1725,54466E3A";
/// let Body::Schedule(Schedule::Consist(consist)) = OcsMessage::parse(line, None)?.body else {
///     panic!("not a CON");
/// };
/// let front = consist.cars.iter().next().expect("a car");
/// assert_eq!(front.number(), "1537");
/// assert_eq!(front.shown(), "2537");
/// # Ok::<_, tramline::ocs::OcsError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Car<'a> {
    shown: &'a str,
    line: Line,
}

impl<'a> Car<'a> {
    pub(super) fn new(shown: &'a str, line: Line) -> Self {
        Self { shown: shown.trim(), line }
    }

    /// The number that the car bears.
    pub fn number(&self) -> Cow<'a, str> {
        match (self.line, self.shown.strip_prefix("25")) {
            (Line::Red, Some(rest)) => Cow::Owned(format!("15{rest}")),
            _ => Cow::Borrowed(self.shown),
        }
    }

    /// The number as OCS has it.
    pub fn shown(&self) -> &'a str {
        self.shown
    }
}

/// The number that the car bears.
impl fmt::Display for Car<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.number())
    }
}

/// The cars of a train as one field names them.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Cars<'a> {
    text: &'a str,
    separator: char,
    line: Line,
}

impl<'a> Cars<'a> {
    pub(super) fn new(text: &'a str, separator: char, line: Line) -> Self {
        Self { text, separator, line }
    }

    /// The cars in the order of the field.
    pub fn iter(&self) -> impl Iterator<Item = Car<'a>> + Clone + use<'a> {
        let line = self.line;
        let cars = self.text.split(self.separator).map(move |shown| Car::new(shown, line));
        cars.filter(|car| !car.shown.is_empty())
    }
}

impl fmt::Debug for Cars<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_cars_of_the_red_line_are_renumbered() {
        for (line, shown, number) in [
            (Line::Red, "2501", "1501"),
            (Line::Orange, "2501", "2501"),
            (Line::Red, "1737", "1737"),
            (Line::Red, "1525", "1525"),
            (Line::Blue, " 0748", "0748"),
        ] {
            let car = Car::new(shown, line);
            assert_eq!(car.number(), number);
            assert_eq!(car.shown(), shown.trim());
            assert_eq!(car.to_string(), number);
        }
    }
}
