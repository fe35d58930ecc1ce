//! Made-up OCS traffic that hangs together: trains run between real termini, serve trips that were
//! announced before, and leave. The same seed gives the same bytes on every machine, so nothing
//! here reads a clock or calls a maths function that differs between platforms.
//!
//! A [`Generator`] is an iterator without end; sending what it gives, and when, is for others.
//!
//! ```
//! use tramline::ocs::generate::{Generator, Item, Profile};
//!
//! let lines = || Generator::new(1, 0, Profile::Day).filter(|item| *item != Item::Heartbeat);
//! assert_eq!(lines().nth(99), lines().nth(99));
//! ```

use std::collections::{BTreeMap, VecDeque};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// What the traffic looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Profile {
    /// An ordinary stretch of the service day from 05:30 on, 25 messages a second: mostly TMOV and
    /// RGPS, some TSCH changes, DEVI and DIAG.
    #[default]
    Day,
    /// The schedule load at 02:00:06, 400 messages a second: for each heavy-rail line an RLD, then
    /// a NEW for every trip, with TMOV between. After that it goes on as `Day`.
    Morning,
}

/// One thing an OCS sender puts on the wire, without the EOT that ends it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item {
    /// An OCS line: `counter,TYPE,HH:MM:SS,…`.
    Message(String),
    /// A frame with the body `HEARTBEAT`. It has no counter.
    Heartbeat,
}

/// One OCS sender, without end. Its counter goes up by one per message over all types and lines,
/// and starts again with 1 at midnight of its simulated clock.
#[derive(Debug, Clone)]
pub struct Generator {
    dice: Dice,
    /// The simulated wall clock: milliseconds since the midnight before the first message.
    now: u64,
    counter: u64,
    since_heartbeat: u32,
    /// The schedule load is on the wire.
    loading: bool,
    /// Messages whose order matters, such as NEW before ASN, without counter and time.
    pending: VecDeque<String>,
    /// Those under way, and those that wait in a yard for their first departure.
    trains: Vec<Train>,
    /// For each line the cars that are in no train.
    spare: BTreeMap<char, VecDeque<String>>,
    next_trip: u32,
    next_train: u32,
}

const SECOND: u64 = 1_000;
const MINUTE: u64 = 60 * SECOND;
const DAY: u64 = 24 * 60 * MINUTE;
/// When the day's schedule is loaded: 02:00:06.
const LOAD: u64 = 120 * MINUTE + 6 * SECOND;
/// How long a heavy-rail train runs over one track circuit.
const CIRCUIT: u64 = 20 * SECOND;
const MESSAGES_PER_HEARTBEAT: u32 = 30;

/// The timetable, in minutes.
const FIRST_DEPARTURE: u64 = 5 * 60 + 5;
const SERVICE: u64 = 18 * 60;
const LAYOVER: u64 = 5;

/// Name in OCS, latitude, longitude.
type Stop = (&'static str, f64, f64);

#[derive(Debug)]
struct Route {
    line: char,
    /// Part of the OCS route id; on `G` the AVI route code of the way out.
    number: u32,
    minutes_per_leg: u64,
    /// How many the schedule needs. Half as many run at any hour.
    trains: u64,
    /// First and last of the car numbers, as dispatchers type them. OCS takes a number only once,
    /// so a 15xx of `R` that `O` has too is a 25xx.
    cars: &'static [(u32, u32)],
    /// From yard to yard, with the termini next to them.
    path: &'static [Stop],
}

static ROUTES: [Route; 4] = [
    Route {
        line: 'R',
        number: 933,
        minutes_per_leg: 11,
        trains: 20,
        cars: &[(1500, 1511), (2512, 2523), (1600, 1651), (1700, 1885)],
        path: &[
            ("ALEWIFE YARD", 42.3993, -71.1468),
            ("ALEWIFE", 42.396158, -71.139971),
            ("HARVARD SQUARE", 42.373362, -71.118956),
            ("PARK STREET [R]", 42.356395, -71.062424),
            ("JFK/ UMASS BRT", 42.320685, -71.052391),
            ("BRAINTREE", 42.207854, -71.001138),
            ("CADDIGAN YARD", 42.2005, -71.001),
        ],
    },
    Route {
        line: 'O',
        number: 903,
        minutes_per_leg: 12,
        trains: 14,
        cars: &[(1400, 1499), (1512, 1551)],
        path: &[
            ("OAK GROVE STORAGE", 42.4405, -71.0715),
            ("OAK GROVE", 42.43668, -71.071097),
            ("DOWNTOWN CROSSING", 42.355518, -71.060225),
            ("BACK BAY/SOUTH END", 42.34735, -71.075727),
            ("FOREST HILLS", 42.300523, -71.113686),
            ("FOREST HILLS YARD", 42.2965, -71.1165),
        ],
    },
    Route {
        line: 'B',
        number: 946,
        minutes_per_leg: 7,
        trains: 10,
        cars: &[(700, 793)],
        path: &[
            ("WONDERLAND YARD", 42.4155, -70.9905),
            ("WONDERLAND", 42.41342, -70.991648),
            ("ORIENT HEIGHTS", 42.386867, -71.004736),
            ("AQUARIUM", 42.359784, -71.051652),
            ("BOWDOIN", 42.361365, -71.062037),
            ("BOWDOIN STORAGE", 42.362, -71.0635),
        ],
    },
    Route {
        line: 'G',
        number: 851,
        minutes_per_leg: 14,
        trains: 60,
        cars: &[(3600, 3719), (3800, 3893)],
        path: &[
            ("RIVERSIDE YARD", 42.3366, -71.2537),
            ("RIVERSIDE", 42.337348, -71.252236),
            ("RESERVOIR", 42.335088, -71.148758),
            ("KENMORE", 42.348949, -71.095169),
            ("NORTH STATION", 42.365577, -71.06129),
            ("LECHMERE YARD", 42.372, -71.077),
        ],
    },
];

impl Route {
    fn termini(&self) -> [usize; 2] {
        [1, self.path.len() - 2]
    }

    /// Running time between two places of the path.
    fn minutes(&self, from: usize, to: usize) -> u64 {
        self.minutes_per_leg * from.abs_diff(to) as u64
    }
}

/// One run between two places of a route's path.
#[derive(Debug, Clone)]
struct Trip {
    uid: u32,
    from: usize,
    to: usize,
    /// In minutes on the simulated clock.
    departs: u64,
    deleted: bool,
}

/// The cars that run as one, with the trips they are to serve one after the other.
#[derive(Debug, Clone)]
struct Train {
    uid: u32,
    route: &'static Route,
    /// Front to back.
    cars: Vec<String>,
    trips: Vec<Trip>,
    /// How many of the trips lie behind, with the one being served.
    begun: usize,
    from: usize,
    to: usize,
    /// When it goes from `from`, in milliseconds on the simulated clock.
    set_off: u64,
}

impl Train {
    fn is_light(&self) -> bool {
        self.route.line == 'G'
    }

    fn arrival(&self) -> u64 {
        self.set_off + self.route.minutes(self.from, self.to) * MINUTE
    }

    fn current_trip(&self) -> Option<&Trip> {
        self.trips.get(self.begun.checked_sub(1)?)
    }

    /// Moves on to the next trip that is not deleted.
    fn begin_next_trip(&mut self) -> Option<&Trip> {
        let ahead = self.trips.iter().skip(self.begun);
        self.begun += 1 + ahead.take_while(|trip| trip.deleted).count();
        self.current_trip()
    }

    /// Uids of the trips before and after in the chain, `0` for none.
    fn neighbours(&self, i: usize) -> String {
        let kept = |trip: &&Trip| !trip.deleted;
        let previous = self.trips.iter().take(i).rev().find(kept);
        let next = self.trips.iter().skip(i + 1).find(kept);
        format!("{},{}", uid_or_0(previous), uid_or_0(next))
    }

    /// Latitude, longitude and heading, as time alone decides.
    fn place(&self, now: u64) -> (f64, f64, f64) {
        let path = self.route.path;
        let run = (self.arrival() - self.set_off).max(1) as f64;
        let share = (now.saturating_sub(self.set_off) as f64 / run).min(1.0);
        let along = self.from as f64 + (self.to as f64 - self.from as f64) * share;
        let leg = (along as usize).min(path.len() - 2);
        let ((_, lat, lon), (_, next_lat, next_lon)) = (path[leg], path[leg + 1]);
        let (north, east, part) = (next_lat - lat, next_lon - lon, along - leg as f64);
        let back = if self.to < self.from { 180.0 } else { 0.0 };
        let heading = heading(north, east) + back;
        (lat + north * part, lon + east * part, heading)
    }

    /// TMOV of heavy rail, 14 fields. Where there is no position it says `0,0`.
    fn heavy_movement(&self, now: u64, lost: bool) -> String {
        let (line, train, trip) = (self.route.line, hex(self.uid), self.current_trip());
        // What is known is the track circuit, and the one before it.
        let entered = now - now.saturating_sub(self.set_off) % CIRCUIT;
        let (lat, lon, _) = self.place(entered);
        let place = [format!("{lat:.6},{lon:.6}"), "0,0".into()];
        let (lat, lon, _) = self.place(entered.saturating_sub(CIRCUIT));
        let codes = format!("{},{}", self.uid % 10, u8::from(self.to < self.from));
        let (trip, lead) = (uid_or_0(trip), &self.cars[0]);
        // `S` marks the last trip of the day.
        let id = match (self.uid as usize % 10, self.begun < self.trips.len()) {
            (0, _) => "WORK".into(),
            (n, true) => format!("{}{lead}", ["D", "K", "L"][n % 3]),
            (n, false) => format!("{}{lead}", ["DS", "KS", "S"][n % 3]),
        };
        let place = &place[usize::from(lost)];
        format!("TMOV,{line},{train},{place},{codes},{trip},{id},,{lat:.6},{lon:.6}")
    }

    /// TMOV of light rail, 15 fields, or 18 with the position before.
    fn light_movement(&self, now: u64, dice: &mut Dice) -> String {
        let (old_lat, old_lon, _) = self.place(now.saturating_sub(5 * SECOND));
        let (lat, lon, motion) = dice.gps(self.place(now), "");
        let before = dice.pick([String::new(), format!(",3,{old_lat},{old_lon}")]);
        let uid = 10_000 + self.uid % 90_000; // five decimal digits
        let avi_route = self.route.number + u32::from(self.to < self.from);
        let (code, lead, cars) = (dice.pick([25, 35]), &self.cars[0], self.cars.join("-"));
        let codes = format!("1,{avi_route},{code},{lead:>6},gpsci,{cars}");
        format!("TMOV,G,{uid},{lat},{lon},{codes},{motion}{before}")
    }

    /// RGPS of one car. Some modems sign the longitude and pad numbers, some do neither.
    fn raw_gps(&self, now: u64, dice: &mut Dice) -> String {
        let car = &self.cars[dice.index(self.cars.len())];
        let (signed, modem) = (car.starts_with("38"), &car[1..]);
        let (lat, lon, motion) = dice.gps(self.place(now), if signed { " " } else { "" });
        match (signed, -lon) {
            (true, _) => format!("RGPS,G,U14-182-{modem},{car},{lat:.6},{lon:.6},{motion}"),
            (_, west) => format!("RGPS,G,U15-141-{modem},{car},{lat:.13},{west:.13},{motion}"),
        }
    }

    /// NEW, with all ten fields: `S` from the schedule, or what a dispatcher adds (`A`), with no
    /// times, route id and destination yet.
    fn announce(&self, i: usize, scheduled: bool) -> String {
        let (trip, chain, route) = (&self.trips[i], self.neighbours(i), self.route);
        let (line, number, uid) = (route.line, route.number, hex(trip.uid));
        let arrives = hh_mm(trip.departs + route.minutes(trip.from, trip.to));
        let times = format!("{},{arrives}", hh_mm(trip.departs));
        let (from, to) = (route.path[trip.from].0, route.path[trip.to].0);
        let kind = if i == 0 { 'P' } else { 'R' };
        match scheduled {
            true => {
                format!("TSCH,{line},NEW,{uid},S,{kind},{times},W{number}_,{from},{to},{chain}")
            }
            false => format!("TSCH,{line},NEW,{uid},A,{kind},,,,{from},,{chain}"),
        }
    }

    /// CON: the cars of the train that serves the trip.
    fn consist(&self, trip: &str) -> String {
        let (line, cars, train) = (self.route.line, self.cars.join(" "), hex(self.uid));
        format!("TSCH,{line},CON,{trip},{cars},{train}")
    }

    /// TAG: the letters that dispatchers see, for the train and for each car.
    fn tags(&self, trip: &str, dice: &mut Dice) -> String {
        let (line, train) = (self.route.line, hex(self.uid));
        let consist_tags = dice.pick(["BDKET", "B D", ""]);
        let tagged = |car| format!(",{}{car}", dice.pick(["D", "K", "E", " "]));
        let cars: String = self.cars.iter().map(tagged).collect();
        format!("TSCH,{line},TAG,{trip},{train},{consist_tags}{cars}")
    }

    /// OFF, DEL, DST or LNK of a trip that is still ahead.
    fn change(&mut self, dice: &mut Dice) -> Option<String> {
        let i = self.begun + dice.index(self.trips.len().saturating_sub(self.begun));
        let (route, chain) = (self.route, self.neighbours(i));
        let trip = self.trips.get_mut(i)?;
        let (line, uid) = (route.line, hex(trip.uid));
        Some(match dice.below(5) {
            0 => format!("TSCH,{line},OFF,{uid},{}", i64::from(dice.below(21)) - 5),
            1 => format!("TSCH,{line},LNK,{uid},{chain}"),
            2 => {
                trip.deleted = !trip.deleted;
                format!("TSCH,{line},DEL,{uid},{}", u8::from(trip.deleted))
            }
            what => {
                trip.to = (trip.from + 1 + dice.index(route.path.len() - 1)) % route.path.len();
                let (to, number) = (route.path[trip.to].0, route.number);
                let arrives = hh_mm(trip.departs + route.minutes(trip.from, trip.to));
                let known = [",".into(), format!("W{number}_,{arrives}")];
                format!("TSCH,{line},DST,{uid},{to},{}", known[what as usize % 2])
            }
        })
    }
}

impl Generator {
    /// A sender whose bytes depend on nothing but the three arguments. `sender` tells the TCP
    /// connections of one run apart: each has its own counter, trips and trains.
    pub fn new(seed: u64, sender: u32, profile: Profile) -> Self {
        let mut dice = Dice::new(seed, sender);
        // Counters as the archive has them at these hours.
        let (now, counter) = match profile {
            Profile::Day => (330 * MINUTE, 7_000 + u64::from(dice.below(500))),
            Profile::Morning => (LOAD, 3_080 + u64::from(dice.below(1_914))),
        };
        let fleets = ROUTES.iter().map(|route| (route.line, dice.shuffle(route.cars)));
        let mut generator = Self {
            now,
            counter,
            since_heartbeat: 0,
            loading: false,
            pending: VecDeque::new(),
            trains: Vec::new(),
            spare: fleets.collect(),
            next_trip: 0x9800_0000 + dice.below(0x00F0_0000),
            next_train: 0x5400_0000 + dice.below(0x00F0_0000),
            dice,
        };
        generator.run_trains(40);
        if profile == Profile::Morning {
            generator.pending.clear();
            generator.load_schedule();
        }
        generator
    }

    /// Lets the clock run on, and once a second the railway too.
    fn advance(&mut self) {
        let before = self.now;
        let per_second = if self.loading { 400 } else { 25 };
        self.now += u64::from(self.dice.below(2_000 / per_second + 1));
        if before / DAY != self.now / DAY {
            self.counter = 0;
        }
        if before % DAY < LOAD && self.now % DAY >= LOAD {
            self.load_schedule();
        }
        // The railway does not outrun the messages about it.
        if self.pending.is_empty() {
            self.loading = false;
            if before / SECOND != self.now / SECOND {
                self.run_trains(1);
            }
        }
    }

    /// The schedule of the day. RLD voids what was known of its line.
    fn load_schedule(&mut self) {
        self.loading = true;
        for train in &mut self.trains {
            train.trips.clear();
        }
        let midnight = self.now / DAY * DAY / MINUTE;
        for route in ROUTES.iter().filter(|route| route.line != 'G') {
            self.pending.push_back(format!("TSCH,{},RLD,W", route.line));
            let [start, end] = route.termini();
            let run = route.minutes(start, end) + LAYOVER;
            for n in 0..route.trains {
                let first = midnight + FIRST_DEPARTURE + 2 * run * n / route.trains;
                self.add_train(route, first, 1 + SERVICE / run, true);
            }
        }
    }

    /// Couples a train and announces its trips: out of the yard at minute `first`, then to and fro
    /// between the termini. Without enough cars there is no train.
    fn add_train(&mut self, route: &'static Route, first: u64, trips: u64, scheduled: bool) {
        let length = match route.line {
            'G' => 1 + self.dice.index(2),
            _ => 6,
        };
        let spare = self.spare.entry(route.line).or_default();
        if spare.len() < length {
            return;
        }
        let end = self.dice.index(2);
        let yard = [0, route.path.len() - 1][end];
        let mut train = Train {
            uid: self.next_train,
            route,
            cars: spare.drain(..length).collect(),
            trips: Vec::new(),
            begun: 0,
            from: yard,
            to: yard,
            set_off: first * MINUTE,
        };
        self.next_train += 1 + self.dice.below(16);
        let (mut from, mut departs) = (yard, first);
        for n in 0..trips as usize {
            let (uid, to, deleted) = (self.next_trip, route.termini()[(end + n) % 2], false);
            train.trips.push(Trip { uid, from, to, departs, deleted });
            self.next_trip += 1;
            departs += route.minutes(from, to) + LAYOVER;
            from = to;
        }
        if !train.is_light() {
            let news = (0..trips as usize).map(|i| train.announce(i, scheduled));
            self.pending.extend(news);
        }
        self.trains.push(train);
    }

    /// Gives the train its next trip: CON, often TAG, and ASN. After the last one it leaves: it
    /// loses its position and then, in the 7-field TMOV, is gone. Light rail does both in silence.
    fn go_on(&mut self, mut train: Train) {
        let (line, light, uid) = (train.route.line, train.is_light(), hex(train.uid));
        while let Some(trip) = train.begin_next_trip() {
            let (trip, to, departure) = (hex(trip.uid), trip.to, trip.departs * MINUTE);
            train.set_off = train.arrival().max(departure);
            (train.from, train.to) = (train.to, to);
            // A trip whose time is over is passed by.
            if train.arrival() <= self.now {
                continue;
            }
            if !light {
                self.pending.push_back(train.consist(&trip));
                if self.dice.below(2) == 0 {
                    self.pending.push_back(train.tags(&trip, &mut self.dice));
                }
                let assigned = format!("TSCH,{line},ASN,{uid},{trip}");
                self.pending.push_back(assigned);
            }
            return self.trains.push(train);
        }
        if !light {
            let lost = train.heavy_movement(self.now, true);
            let gone = format!("TMOV,{line},{uid},0,0");
            self.pending.extend([lost, gone]);
        }
        self.spare.entry(line).or_default().extend(train.cars);
    }

    /// Adds trains, up to `late` minutes under way, where too few run, and lets those go on that
    /// have arrived.
    fn run_trains(&mut self, late: u32) {
        for route in &ROUTES {
            let runs = |train: &&Train| train.route.line == route.line && train.begun > 0;
            for _ in self.trains.iter().filter(runs).count() as u64..route.trains / 2 {
                let first = self.now / MINUTE - u64::from(self.dice.below(late));
                let trips = 3 + u64::from(self.dice.below(3));
                self.add_train(route, first, trips, false);
            }
        }
        let arrived = |train: &mut Train| train.arrival() <= self.now;
        let arrived: Vec<_> = self.trains.extract_if(.., arrived).collect();
        for train in arrived {
            self.go_on(train);
        }
    }

    /// A message without its counter and time: `TYPE,line,…`.
    fn compose(&mut self) -> String {
        // Other messages go between those pending, or a burst would be all of one type.
        let turn = self.since_heartbeat % if self.loading { 8 } else { 2 };
        if turn > 0
            && let Some(body) = self.pending.pop_front()
        {
            return body;
        }
        let body = match self.dice.below(100) {
            roll if self.loading => self.movement(roll < 50),
            0..45 => self.raw_gps(),
            45..70 => self.movement(true),
            // Heavy rail keeps quiet while NEW and ASN of its trips are pending.
            70..90 => self.movement(!self.pending.is_empty()),
            90..95 => self.change(),
            95..99 => Some(self.device()),
            _ => None,
        };
        let text = self.dice.pick(["BROADCAST", "test1", "test2"]);
        body.unwrap_or_else(|| format!("DIAG,{text}"))
    }

    /// TMOV.
    fn movement(&mut self, light: bool) -> Option<String> {
        let Self { dice, trains, .. } = self;
        let train = dice.draw(trains, |train| train.is_light() == light)?;
        Some(match light {
            true => train.light_movement(self.now, dice),
            false => train.heavy_movement(self.now, dice.below(50) == 0),
        })
    }

    /// RGPS.
    fn raw_gps(&mut self) -> Option<String> {
        let train = self.dice.draw(&mut self.trains, Train::is_light)?;
        Some(train.raw_gps(self.now, &mut self.dice))
    }

    /// TSCH about a trip of some train, under way or ahead.
    fn change(&mut self) -> Option<String> {
        let Self { dice, trains, .. } = self;
        let train = dice.draw(trains, |train| !train.is_light())?;
        let current = train.current_trip().map(|trip| hex(trip.uid));
        let body = match (dice.below(4), current) {
            (0, Some(trip)) => train.consist(&trip),
            (1, Some(trip)) => train.tags(&trip, dice),
            _ => train.change(dice)?,
        };
        // Its turn comes after the NEW of that trip.
        self.pending.push_back(body);
        self.pending.pop_front()
    }

    /// DEVI of a switch, a signal or a platform indicator.
    fn device(&mut self) -> String {
        let [a, b, n] = [2, 2, 4].map(|states| self.dice.below(states));
        match self.dice.below(3) {
            0 => format!("DEVI,B,SW,WON_SW{n},{a},{},{b},{}", 1 - a, 1 - b),
            1 => format!("DEVI,O,SG,FOR_SG{n},{a},{b}"),
            _ => format!("DEVI,R,MD,ALE ATD,{a},{b}"),
        }
    }
}

impl Iterator for Generator {
    type Item = Item;

    fn next(&mut self) -> Option<Item> {
        if self.since_heartbeat == MESSAGES_PER_HEARTBEAT {
            self.since_heartbeat = 0;
            return Some(Item::Heartbeat);
        }
        self.since_heartbeat += 1;
        self.advance();
        self.counter += 1;
        let (body, counter) = (self.compose(), self.counter);
        let (kind, rest) = body.split_once(',').unwrap_or((&body, ""));
        let (minute, second) = (hh_mm(self.now / MINUTE), self.now / SECOND % 60);
        let message = format!("{counter},{kind},{minute}:{second:02},{rest}");
        Some(Item::Message(message))
    }
}

fn hex(uid: u32) -> String {
    format!("{uid:08X}")
}

fn uid_or_0(trip: Option<&Trip>) -> String {
    trip.map_or("0".into(), |trip| hex(trip.uid))
}

/// `HH:MM` of minutes after some midnight.
fn hh_mm(minutes: u64) -> String {
    format!("{:02}:{:02}", minutes / 60 % 24, minutes % 60)
}

/// Degrees clockwise from north, a few off: a true arc tangent would differ between platforms.
fn heading(north: f64, east: f64) -> f64 {
    let east = east * 0.74; // a degree of longitude is that much shorter in Boston
    let turn = 90.0 * east / (north.abs() + east.abs());
    if north < 0.0 { 180.0 - turn } else { turn }
}

/// The only source of chance. It takes raw words from ChaCha and does the rest itself, so that no
/// new version of a distribution can alter the bytes.
#[derive(Debug, Clone)]
struct Dice(ChaCha8Rng);

impl Dice {
    fn new(seed: u64, sender: u32) -> Self {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[8..12].copy_from_slice(&sender.to_le_bytes());
        Self(ChaCha8Rng::from_seed(key))
    }

    /// From 0 up to `n`, without `n`.
    fn below(&mut self, n: u32) -> u32 {
        ((u64::from(self.0.next_u32()) * u64::from(n)) >> 32) as u32
    }

    fn index(&mut self, len: usize) -> usize {
        self.below(len as u32) as usize
    }

    fn pick<T: Clone, const N: usize>(&mut self, from: [T; N]) -> T {
        from[self.index(N)].clone()
    }

    /// One of those that are wanted.
    fn draw<'a, T>(&mut self, from: &'a mut [T], wanted: impl Fn(&T) -> bool) -> Option<&'a mut T> {
        let n = self.index(from.iter().filter(|it| wanted(it)).count());
        from.iter_mut().filter(|it| wanted(it)).nth(n)
    }

    /// Every car of a fleet, with the pairs in some order but kept together.
    fn shuffle(&mut self, fleet: &[(u32, u32)]) -> VecDeque<String> {
        let pairs = fleet.iter().flat_map(|&(a, z)| (a..z).step_by(2));
        let mut pairs: Vec<_> = pairs.collect();
        for i in (1..pairs.len()).rev() {
            pairs.swap(i, self.index(i + 1));
        }
        let cars = pairs.into_iter().flat_map(|even| [even + 1, even]);
        cars.map(|car| format!("{car:04}")).collect()
    }

    /// A place as GPS has it, about ten metres off, with the speed and a heading below 360.
    fn gps(&mut self, (lat, lon, heading): (f64, f64, f64), pad: &str) -> (f64, f64, String) {
        let [lat, lon] = [lat, lon].map(|it| it + f64::from(self.below(200)) / 1e6 - 1e-4);
        // Not under way some of the time.
        let speed = f64::from(self.below(6_000).saturating_sub(2_400)) / 100.0;
        let heading = (heading + f64::from(self.below(8))).rem_euclid(360.0);
        (lat, lon, format!("{pad}{speed:.2},{pad}{heading:.2}"))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    fn next_message(generator: &mut Generator) -> String {
        loop {
            if let Some(Item::Message(message)) = generator.next() {
                return message;
            }
        }
    }

    fn messages(generator: &mut Generator, n: usize) -> Vec<String> {
        (0..n).map(|_| next_message(generator)).collect()
    }

    fn day(seed: u64, n: usize) -> Vec<String> {
        messages(&mut Generator::new(seed, 0, Profile::Day), n)
    }

    fn morning(seed: u64, n: usize) -> Vec<String> {
        messages(&mut Generator::new(seed, 0, Profile::Morning), n)
    }

    /// Lets time pass unseen, up to shortly before `time` of the current day.
    fn skip_to(generator: &mut Generator, time: u64) {
        generator.now = generator.now / DAY * DAY + time - 5 * SECOND;
    }

    fn fields(message: &str) -> Vec<&str> {
        message.split(',').collect()
    }

    fn counter(message: &str) -> u64 {
        fields(message)[0].parse().unwrap()
    }

    /// Seconds after midnight.
    fn time(message: &str) -> u64 {
        let parts: Vec<u64> = fields(message)[2].split(':').map(|n| n.parse().unwrap()).collect();
        assert!(fields(message)[2].len() == 8 && parts[0] < 24 && parts[1] < 60 && parts[2] < 60);
        parts[0] * 3600 + parts[1] * 60 + parts[2]
    }

    fn kind(message: &str) -> String {
        match fields(message)[..] {
            [_, "TSCH", _, _, subtype, ..] => format!("TSCH {subtype}"),
            [_, kind, ..] => kind.into(),
            _ => String::new(),
        }
    }

    /// All there is: both profiles, and days that pass midnight and the schedule load.
    fn varied() -> Vec<String> {
        let mut all = day(1, 30_000);
        let mut generator = Generator::new(2, 7, Profile::Morning);
        all.extend(messages(&mut generator, 30_000));
        for time in [6 * 60 * MINUTE, 12 * 60 * MINUTE, DAY, LOAD, 9 * 60 * MINUTE] {
            skip_to(&mut generator, time);
            all.extend(messages(&mut generator, 10_000));
        }
        all
    }

    fn is_hex(field: &str) -> bool {
        field.len() == 8 && field.bytes().all(|b| matches!(b, b'0'..=b'9' | b'A'..=b'F'))
    }

    fn is_hex_or_0(field: &str) -> bool {
        field == "0" || is_hex(field)
    }

    fn is_number(field: &str) -> bool {
        !field.is_empty() && field.bytes().all(|b| b.is_ascii_digit())
    }

    fn is_car(field: &str) -> bool {
        field.len() == 4 && is_number(field)
    }

    fn is_hh_mm(field: &str) -> bool {
        matches!(field.split_once(':'), Some((h, m)) if h.len() == 2 && m.len() == 2
            && h.parse::<u8>().is_ok_and(|h| h < 24) && m.parse::<u8>().is_ok_and(|m| m < 60))
    }

    fn is_in_boston(lat: &str, lon: &str) -> bool {
        let near = |field: &str, range: std::ops::Range<f64>| {
            field.parse().is_ok_and(|degrees: f64| range.contains(&degrees))
        };
        near(lat, 42.19..42.45) && near(lon, -71.26..-70.98)
    }

    fn is_motion(speed: &str, heading: &str) -> bool {
        let below = |field: &str, limit: f64| {
            field.trim().parse().is_ok_and(|n: f64| (0.0..limit).contains(&n))
        };
        below(speed, 40.0) && below(heading, 360.0)
    }

    /// A place of the facts; rail yards and stations alike.
    fn is_place(line: &str, field: &str) -> bool {
        let routes = ROUTES.iter().filter(|route| line.starts_with(route.line));
        routes.flat_map(|route| route.path).any(|stop| stop.0 == field)
    }

    fn is_tagged_car(field: &str) -> bool {
        field.split_at_checked(1).is_some_and(|(tag, car)| "DKE ".contains(tag) && is_car(car))
    }

    /// Sections 6.1 to 6.7 of the facts.
    fn obeys_the_facts(message: &str) -> bool {
        time(message);
        match fields(message)[3..] {
            [text] => message.contains(",DIAG,") && !text.is_empty(),
            [line, ref rest @ ..] => match fields(message)[1] {
                "TSCH" => "ROB".contains(line) && is_schedule_change(line, rest),
                "TMOV" if line == "G" => is_light_movement(rest),
                "TMOV" => "ROB".contains(line) && is_heavy_movement(rest),
                "RGPS" => line == "G" && is_gps(rest),
                "DEVI" => match *rest {
                    ["SW", name, a, b, c, d] => {
                        name.contains("_SW") && [a, b, c, d].iter().all(|n| "01".contains(n))
                    }
                    ["SG", name, a, b] => {
                        name.contains("_SG") && "01".contains(a) && "01".contains(b)
                    }
                    ["MD", name, a, b] => !name.is_empty() && "01".contains(a) && "01".contains(b),
                    _ => false,
                },
                _ => false,
            },
            [] => false,
        }
    }

    fn is_schedule_change(line: &str, rest: &[&str]) -> bool {
        match *rest {
            ["RLD", "W"] => true,
            ["NEW", trip, added, kind, departs, arrives, route, from, to, previous, next] => {
                let timed = match added {
                    "S" => is_hh_mm(departs) && is_hh_mm(arrives) && is_place(line, to),
                    _ => added == "A" && [departs, arrives, route, to].concat().is_empty(),
                };
                let chained = is_hex_or_0(previous) && is_hex_or_0(next);
                let route = route.is_empty() || route.starts_with('W') && route.ends_with('_');
                is_hex(trip)
                    && "RP".contains(kind)
                    && timed
                    && route
                    && is_place(line, from)
                    && chained
            }
            ["CON", trip, cars, train] => {
                is_hex(trip)
                    && is_hex(train)
                    && cars.split(' ').count() == 6
                    && cars.split(' ').all(is_car)
            }
            ["ASN", train, trip] => is_hex(train) && is_hex(trip),
            ["DST", trip, to, route, arrives] => {
                let known = route.starts_with('W') && is_hh_mm(arrives);
                is_hex(trip)
                    && is_place(line, to)
                    && (known || [route, arrives].concat().is_empty())
            }
            ["DEL", trip, digit] => is_hex(trip) && ["0", "1"].contains(&digit),
            ["LNK", trip, previous, next] => {
                is_hex(trip) && is_hex_or_0(previous) && is_hex_or_0(next)
            }
            ["OFF", trip, minutes] => is_hex(trip) && minutes.parse::<i32>().is_ok(),
            ["TAG", trip, train, _, ref cars @ ..] => {
                is_hex(trip)
                    && is_hex(train)
                    && cars.len() == 6
                    && cars.iter().all(|car| is_tagged_car(car))
            }
            _ => false,
        }
    }

    fn is_heavy_movement(rest: &[&str]) -> bool {
        match *rest {
            [train, "0", "0"] => is_hex(train),
            [train, lat, lon, number, direction, trip, id, express, old_lat, old_lon] => {
                let lead = id.trim_start_matches(['D', 'K', 'L', 'S']);
                let id = id == "WORK" || id.len() > 4 && is_car(lead);
                let place = [lat, lon] == ["0", "0"] || is_in_boston(lat, lon);
                let codes = is_number(number) && "01".contains(direction) && express.is_empty();
                is_hex(train)
                    && place
                    && codes
                    && is_hex_or_0(trip)
                    && id
                    && is_in_boston(old_lat, old_lon)
            }
            _ => false,
        }
    }

    fn is_light_movement(rest: &[&str]) -> bool {
        let (known, before) = rest.split_at_checked(11).unwrap_or_default();
        let [train, lat, lon, "1", route, code, lead, "gpsci", cars, speed, heading] = *known
        else {
            return false;
        };
        let before = match *before {
            ["3", lat, lon] => is_in_boston(lat, lon),
            _ => before.is_empty(),
        };
        let train = train.len() == 5 && is_number(train);
        let lead = lead.len() == 6 && cars.starts_with(lead.trim_start());
        let codes = ["851", "852"].contains(&route) && ["25", "35"].contains(&code);
        let cars = cars.split('-').all(is_car);
        train
            && is_in_boston(lat, lon)
            && lead
            && codes
            && cars
            && is_motion(speed, heading)
            && before
    }

    fn is_gps(rest: &[&str]) -> bool {
        let [modem, car, lat, lon, speed, heading] = *rest else {
            return false;
        };
        let west = if lon.starts_with('-') { lon.into() } else { format!("-{lon}") };
        modem.starts_with('U')
            && is_car(car)
            && is_in_boston(lat, &west)
            && is_motion(speed, heading)
    }

    #[test]
    fn same_seed_gives_the_same_bytes() {
        for profile in [Profile::Day, Profile::Morning] {
            let items = |seed| Generator::new(seed, 3, profile).take(20_000).collect::<Vec<_>>();
            assert_eq!(items(5), items(5));
            assert_ne!(items(5), items(6));
        }
    }

    /// Others keep what this generator made. Change these only with a reason that they can see.
    #[test]
    fn the_bytes_of_seed_1_stay_as_they_are() {
        let digest = |lines: &[String]| {
            let bytes = lines.iter().flat_map(|line| line.bytes());
            bytes.fold(0xCBF2_9CE4_8422_2325, |hash: u64, byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3)
            })
        };
        let (day, morning) = (day(1, 100_000), morning(1, 100_000));
        assert_eq!(day[..4], PINNED_DAY);
        assert_eq!(morning[..2], PINNED_MORNING);
        assert_eq!(
            [digest(&day), digest(&morning)],
            [0xA063_C4CD_5893_2900, 0x3124_336E_4E82_D3F3]
        );
    }

    const PINNED_DAY: [&str; 4] = [
        "7315,TSCH,05:30:00,R,NEW,98E17188,A,P,,,,ALEWIFE YARD,,0,98E17189",
        "7316,TMOV,05:30:00,G,33646,42.33670432489524,-71.25331320902856,1,851,35,  3656,gpsci,3656-3879,33.66,60.24",
        "7317,TSCH,05:30:00,R,NEW,98E17189,A,R,,,,ALEWIFE,,98E17188,98E1718A",
        "7318,TMOV,05:30:00,G,33557,42.37068122062142,-71.0735510927857,1,852,25,  3867,gpsci,3867,9.60,122.03",
    ];
    const PINNED_MORNING: [&str; 2] = [
        "4284,TSCH,02:00:06,R,RLD,W",
        "4285,TSCH,02:00:06,R,NEW,98E1724F,S,P,05:05,05:16,W933_,ALEWIFE YARD,ALEWIFE,0,98E17250",
    ];

    #[test]
    fn counters_go_up_by_one() {
        for lines in [day(1, 5_000), morning(1, 5_000)] {
            assert!(lines.windows(2).all(|pair| counter(&pair[1]) == counter(&pair[0]) + 1));
        }
        assert!((3_081..=4_994).contains(&counter(&morning(1, 1)[0])));
    }

    #[test]
    fn a_heartbeat_follows_every_thirty_messages() {
        let items: Vec<_> = Generator::new(1, 0, Profile::Day).take(31 * 100).collect();
        for (i, item) in items.iter().enumerate() {
            assert_eq!(*item == Item::Heartbeat, i % 31 == 30);
        }
    }

    #[test]
    fn every_type_and_subtype_appears() {
        let kinds =
            |lines: Vec<String>| lines.iter().map(|line| kind(line)).collect::<BTreeSet<_>>();
        let mut all: BTreeSet<_> = ["ASN", "CON", "DEL", "DST", "LNK", "NEW", "OFF", "RLD", "TAG"]
            .map(|subtype| format!("TSCH {subtype}"))
            .into();
        all.extend(["DEVI", "DIAG", "RGPS", "TMOV"].map(String::from));
        assert_eq!(kinds(morning(1, 20_000)), all);
        all.remove("TSCH RLD");
        assert_eq!(kinds(day(1, 10_000)), all);
    }

    #[test]
    fn every_form_the_facts_show_appears() {
        let lines = varied();
        let has = |form: &dyn Fn(&[&str]) -> bool| lines.iter().any(|line| form(&fields(line)));
        assert!(has(&|f| f[1] == "TMOV" && f.len() == 7));
        assert!(has(&|f| f[1] == "TMOV" && f.len() == 14 && f[5..7] == ["0", "0"] && f[9] != "0"));
        assert!(has(&|f| f[1] == "TMOV" && f.len() == 14 && f[9] == "0"));
        assert!(has(&|f| f[1] == "TMOV" && f.len() == 14 && f[10] == "WORK"));
        assert!(has(&|f| f[1] == "TMOV" && f.len() == 14 && f[10].starts_with("DS")));
        assert!(has(&|f| f[1] == "TMOV" && f.len() == 15 && f[12].len() == 4));
        assert!(has(&|f| f[1] == "TMOV" && f.len() == 18 && f[12].len() == 9));
        assert!(has(&|f| f[1] == "RGPS" && !f[7].starts_with('-')));
        assert!(has(&|f| f[1] == "RGPS" && f[7].starts_with('-') && f[8].starts_with(' ')));
        assert!(has(&|f| f[1] == "DEVI" && f[4] == "SW"));
        assert!(has(&|f| f[1] == "DEVI" && f[4] == "SG"));
        assert!(has(&|f| f[1] == "DEVI" && f[4] == "MD"));
        let has = |kind: &str, form: &dyn Fn(&[&str]) -> bool| {
            has(&|f| f[1] == "TSCH" && f[4] == kind && form(&f[5..]))
        };
        assert!(has("NEW", &|f| f[1..3] == ["S", "P"]));
        assert!(has("NEW", &|f| f[1..3] == ["A", "R"]));
        assert!(has("CON", &|f| f[1].contains("25")));
        assert!(has("TAG", &|f| f[3..].iter().any(|car| car.starts_with(' '))));
        assert!(has("TAG", &|f| f[3..].iter().any(|car| car[1..].starts_with("25"))));
        assert!(has("DST", &|f| f[2].is_empty()));
        assert!(has("DST", &|f| !f[2].is_empty()));
        assert!(has("DEL", &|f| f[1] == "0"));
        assert!(has("DEL", &|f| f[1] == "1"));
        assert!(has("LNK", &|f| f[1] != "0" && f[2] == "0"));
        assert!(has("OFF", &|f| f[1].starts_with('-')));
        for line in ["R", "O", "B", "G"] {
            assert!(lines.iter().any(|message| fields(message)[3] == line));
        }
    }

    #[test]
    fn every_line_has_the_fields_the_facts_give() {
        for line in varied() {
            assert!(obeys_the_facts(&line), "{line}");
            assert!(line.bytes().all(|byte| matches!(byte, b' '..=b'~')), "{line}");
        }
    }

    #[test]
    fn every_message_is_a_distinct_line() {
        for lines in [day(1, 50_000), morning(1, 50_000)] {
            assert_eq!(lines.iter().collect::<BTreeSet<_>>().len(), lines.len());
        }
    }

    #[test]
    fn two_senders_differ() {
        let lines = |sender| messages(&mut Generator::new(1, sender, Profile::Day), 5_000);
        let [one, other] = [lines(0), lines(1)];
        assert_ne!(counter(&one[0]), counter(&other[0]));
        let bodies = |lines: &[String]| -> BTreeSet<String> {
            let tmov = lines.iter().filter(|line| kind(line) == "TMOV");
            tmov.map(|line| fields(line)[3..].join(",")).collect()
        };
        assert!(bodies(&one).is_disjoint(&bodies(&other)));
    }

    #[test]
    fn the_clock_runs_on_at_the_pace_of_the_profile() {
        let lines = day(1, 50_000);
        assert!(lines.windows(2).all(|pair| time(&pair[0]) <= time(&pair[1])));
        assert_eq!(time(&lines[0]), 5 * 3600 + 30 * 60);
        let seconds = time(&lines[49_999]) - time(&lines[0]);
        assert!((1_950..2_050).contains(&seconds), "{seconds}");
    }

    #[test]
    fn morning_opens_with_the_schedule_load() {
        let lines = morning(1, 3_000);
        assert!(lines[0].ends_with(",TSCH,02:00:06,R,RLD,W"), "{}", lines[0]);
        let mut loaded = BTreeMap::new();
        for line in lines.iter().filter(|line| line.contains(",S,")) {
            *loaded.entry(fields(line)[3]).or_insert(0) += 1;
        }
        assert!(loaded.values().sum::<u32>() > 900, "{loaded:?}");
        let first = |text: &str| lines.iter().position(|line| line.contains(text)).unwrap();
        let mut end = 0;
        for line in ["R", "O", "B"] {
            let reload = first(&format!(",{line},RLD,W"));
            assert!(reload >= end && reload < first(&format!(",{line},NEW,")));
            let scheduled = |message: &String| {
                message.contains(&format!(",{line},NEW,")) && message.contains(",S,")
            };
            end = lines.iter().rposition(scheduled).unwrap();
        }
        let between = lines[..end].iter().filter(|line| kind(line) == "TMOV").count();
        assert!((100..200).contains(&between), "{between}");
        let per_second = lines.iter().filter(|line| line.contains(",02:00:07,")).count();
        assert!((350..450).contains(&per_second), "{per_second}");
        let afterwards = lines.iter().filter(|line| line.contains(",02:00:20,")).count();
        assert!((15..35).contains(&afterwards), "{afterwards}");
    }

    #[test]
    fn the_schedule_is_loaded_every_night() {
        let mut generator = Generator::new(1, 0, Profile::Day);
        for _ in 0..2 {
            skip_to(&mut generator, DAY);
            messages(&mut generator, 500);
            skip_to(&mut generator, LOAD);
            let lines = messages(&mut generator, 2_000);
            for line in ["R", "O", "B"] {
                assert!(lines.iter().any(|message| message.contains(&format!(",{line},RLD,W"))));
            }
        }
    }

    #[test]
    fn midnight_restarts_the_counter() {
        let mut generator = Generator::new(1, 0, Profile::Day);
        skip_to(&mut generator, DAY);
        let lines = messages(&mut generator, 1_000);
        let midnight = lines.iter().position(|line| time(line) == 0).unwrap();
        assert!(midnight > 0 && time(&lines[midnight - 1]) == 24 * 3600 - 1);
        for (i, line) in lines.iter().enumerate() {
            let expected = if i < midnight {
                counter(&lines[0]) + i as u64
            } else {
                (i - midnight) as u64 + 1
            };
            assert_eq!(counter(line), expected);
        }
    }

    /// Trips by NEW since the last RLD of their line, trains by CON and ASN until they leave.
    #[test]
    fn what_a_line_names_was_announced_before() {
        let (mut trips, mut consists, mut serves, mut gone) =
            (BTreeSet::new(), BTreeMap::new(), BTreeMap::new(), BTreeSet::new());
        let lines = varied();
        for message in &lines[30_000..] {
            let all = fields(message);
            let line = *all.get(3).unwrap_or(&"");
            let known = |trip: &str| trip == "0" || trips.contains(&(line, trip));
            match (all[1], &all[4..]) {
                ("TSCH", ["RLD", ..]) => {
                    trips.retain(|(of, _)| *of != line);
                    serves.retain(|_, (of, _)| *of != line);
                }
                ("TSCH", ["NEW", trip, ..]) => assert!(trips.insert((line, *trip)), "{message}"),
                ("TSCH", ["CON", trip, cars, train]) => {
                    assert!(known(trip) && !gone.contains(train), "{message}");
                    consists.insert(*train, (*trip, *cars));
                }
                ("TSCH", ["ASN", train, trip]) => {
                    assert!(known(trip) && consists[train].0 == *trip, "{message}");
                    serves.insert(*train, (line, *trip));
                }
                ("TSCH", ["TAG", trip, train, ..]) => {
                    assert!(known(trip) && consists[train].0 == *trip, "{message}");
                }
                ("TSCH", ["LNK", trip, previous, next]) => {
                    assert!(known(trip) && known(previous) && known(next), "{message}");
                }
                ("TSCH", ["OFF" | "DEL" | "DST", trip, ..]) => assert!(known(trip), "{message}"),
                ("TMOV", [train, "0", "0"]) => assert!(gone.insert(*train), "{message}"),
                ("TMOV", [train, _, _, _, _, trip, ..]) if line != "G" => {
                    assert!(!gone.contains(train), "{message}");
                    let served = serves.get(train).map_or("0", |(_, trip)| trip);
                    assert!([served, "0"].contains(trip), "{message}");
                    assert!(
                        all[10] == "WORK"
                            || served == "0"
                            || all[10].ends_with(&consists[train].1[..4])
                    );
                }
                _ => {}
            }
        }
        assert!(serves.len() > 50 && gone.len() > 20);
    }

    #[test]
    fn a_deleted_trip_is_neither_served_nor_linked_to() {
        let mut deleted = BTreeSet::new();
        let lines = day(1, 200_000);
        for message in &lines {
            match fields(message)[4.min(fields(message).len())..] {
                ["DEL", trip, "1"] => assert!(deleted.insert(trip), "{message}"),
                ["DEL", trip, _] => assert!(deleted.remove(trip), "{message}"),
                ["ASN", _, trip] => assert!(!deleted.contains(trip), "{message}"),
                ["LNK", _, before, after] => {
                    assert!(!deleted.contains(before) && !deleted.contains(after), "{message}");
                }
                _ => {}
            }
        }
        assert!(deleted.len() > 10);
    }

    #[test]
    fn a_car_is_in_one_train_at_a_time() {
        let mut generator = Generator::new(1, 0, Profile::Morning);
        for hour in 3..24 {
            skip_to(&mut generator, hour * 60 * MINUTE);
            messages(&mut generator, 3_000);
            let cars: Vec<_> = generator.trains.iter().flat_map(|train| &train.cars).collect();
            assert_eq!(cars.iter().collect::<BTreeSet<_>>().len(), cars.len());
            for route in &ROUTES {
                let of_line =
                    generator.trains.iter().filter(|train| train.route.line == route.line);
                assert!(of_line.count() as u64 >= route.trains / 2, "{} at {hour}", route.line);
            }
        }
    }

    #[test]
    fn trains_move_like_trains() {
        let mut last: BTreeMap<String, (u64, f64, f64)> = BTreeMap::new();
        let lines = day(1, 100_000);
        for line in lines.iter().filter(|line| line.contains(",TMOV,")) {
            let all = fields(line);
            let (now, place) = (time(line), [all[5], all[6]].map(|n| n.parse::<f64>().unwrap()));
            if place == [0.0, 0.0] {
                continue;
            }
            if let Some((then, lat, lon)) = last.insert(all[4].into(), (now, place[0], place[1])) {
                let metres = (place[0] - lat).hypot((place[1] - lon) * 0.74) * 111_000.0;
                // 40 m/s, with a track circuit or what GPS is off by on top.
                assert!(metres < 40.0 * (now - then) as f64 + 900.0, "{line}: {metres} m");
            }
        }
        let far = last.values().filter(|(_, lat, _)| *lat < 42.25).count();
        assert!(last.len() > 50 && far > 0, "{last:?}");
    }
}
