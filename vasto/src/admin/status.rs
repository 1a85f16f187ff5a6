//! What KEYSPACE STATUS says, and how that is told: as a list, as a line, as a bar.

use super::client::Answer;

/// What a narrow terminal shows in one line: a longer one could not be drawn over.
const LINE_COLUMNS: usize = 79;
const BAR_COLUMNS: usize = 16;

/// How far an operation is. What is not known is `None`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Status {
    pub operation: Option<i64>,
    pub kind: String,
    pub from: String,
    pub to: String,
    pub phase: String,
    pub percent: Option<f64>,
    pub bytes: Option<u64>,
    pub bytes_expected: Option<u64>,
    /// Bytes per second.
    pub rate: Option<u64>,
    pub behind_keys: Option<u64>,
    pub behind_ms: Option<u64>,
    pub elapsed_seconds: Option<u64>,
    pub remaining_seconds: Option<u64>,
    pub waits_for: String,
    pub reason: String,
}

impl Status {
    /// `None` if it is no map with a phase in it.
    pub fn read(answer: &Answer) -> Option<Self> {
        let fields = fields(answer)?;
        let find = |name: &str| fields.iter().find(|(field, _)| *field == name).map(|(_, value)| *value);
        let text = |name: &str| find(name).map(plain).unwrap_or_default();
        let number = |name: &str| match find(name) {
            Some(Answer::Number(number)) => u64::try_from(*number).ok(),
            Some(Answer::Text(_) | Answer::Nothing | Answer::List(_)) | None => None,
        };
        let operation = match find("operation") {
            Some(Answer::Number(id)) => Some(*id),
            Some(Answer::Text(_) | Answer::Nothing | Answer::List(_)) | None => None,
        };
        Some(Self {
            operation,
            kind: text("kind"),
            from: text("from"),
            to: text("to"),
            phase: find("phase").map(plain)?,
            percent: text("percent").parse().ok().filter(|percent| (0.0..=100.0).contains(percent)),
            bytes: number("bytes"),
            bytes_expected: number("bytes_expected"),
            rate: number("rate"),
            behind_keys: number("behind_keys"),
            behind_ms: number("behind_ms"),
            elapsed_seconds: number("elapsed"),
            remaining_seconds: number("remaining"),
            waits_for: text("waits_for"),
            reason: text("reason"),
        })
    }

    /// What tells two lines from each other when each of them is kept: not every byte.
    pub fn step(&self) -> (String, Option<i64>, String) {
        (self.phase.clone(), self.percent.map(|percent| percent as i64), self.waits_for.clone())
    }

    /// A line to be kept.
    pub fn line(&self) -> String {
        let mut line = format!("{} from {} to {}: {}", self.kind, self.from, self.to, self.phase);
        if let Some(percent) = self.percent {
            line.push_str(&format!(", {percent:.1} %"));
        }
        self.figures().iter().for_each(|figure| line.push_str(&format!(", {figure}")));
        line
    }

    /// A line to be drawn over by the next one.
    pub fn bar(&self) -> String {
        let full = self.percent.map_or(0, |percent| (percent * BAR_COLUMNS as f64 / 100.0) as usize).min(BAR_COLUMNS);
        let percent = self.percent.map_or_else(|| "    ?".to_owned(), |percent| format!("{percent:5.1}"));
        let (full, rest) = ("#".repeat(full), "-".repeat(BAR_COLUMNS - full));
        let line = format!("{:<9} [{full}{rest}] {percent} %  {}", self.phase, self.figures().join(", "));
        line.trim_end().chars().map(printable).take(LINE_COLUMNS).collect()
    }

    fn figures(&self) -> Vec<String> {
        let mut figures = Vec::new();
        let is_copied = self.bytes >= self.bytes_expected;
        if let (Some(bytes), Some(expected)) = (self.bytes, self.bytes_expected.filter(|expected| *expected > 0)) {
            figures.push(format!("{} of {}", amount(bytes), amount(expected)));
        }
        if let Some(rate) = self.rate.filter(|rate| *rate > 0 && !is_copied) {
            figures.push(format!("{}/s", amount(rate)));
        }
        if let Some(left) = self.remaining_seconds {
            figures.push(format!("{} left", time(left)));
        }
        if let (Some(keys), Some(ms)) = (self.behind_keys.filter(|keys| *keys > 0), self.behind_ms) {
            figures.push(format!("{keys} keys and {ms} ms behind"));
        }
        if !self.waits_for.is_empty() {
            figures.push(format!("waits for: {}", self.waits_for));
        }
        figures
    }
}

/// A letter that moves the cursor would spoil the line.
fn printable(letter: char) -> char {
    if letter.is_control() { ' ' } else { letter }
}

/// The names and values of a map as RESP2 has it.
fn fields(answer: &Answer) -> Option<Vec<(&str, &Answer)>> {
    let Answer::List(elements) = answer else { return None };
    elements.chunks(2).map(pair).collect()
}

fn pair(pair: &[Answer]) -> Option<(&str, &Answer)> {
    match pair {
        [Answer::Text(name), value] => Some((name, value)),
        _ => None,
    }
}

fn plain(answer: &Answer) -> String {
    match answer {
        Answer::Text(text) => text.clone(),
        Answer::Number(number) => number.to_string(),
        Answer::Nothing => String::new(),
        Answer::List(elements) => elements.iter().map(plain).collect::<Vec<_>>().join(", "),
    }
}

/// All that the server says, a line each; what is not known or empty is left out.
pub fn described(answer: &Answer) -> String {
    let Some(fields) = fields(answer) else { return plain(answer) };
    let mut lines = Vec::new();
    for (name, value) in fields {
        match value {
            Answer::List(elements) => lines.extend(elements.iter().map(|element| format!("  {}", plain(element)))),
            value => {
                let text = plain(value);
                lines.extend((!text.is_empty()).then(|| format!("{name}: {text}")));
            }
        }
    }
    lines.join("\n")
}

/// Bytes for people, in the units of `--resize-rate`.
fn amount(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["kB", "MB", "GB", "TB", "PB"];
    if bytes < 1000 {
        return format!("{bytes} B");
    }
    let (mut amount, mut unit) = (bytes as f64 / 1000.0, 0);
    // What would be rounded to 1000.0 is one of the next unit.
    while amount >= 999.95 && unit + 1 < UNITS.len() {
        amount /= 1000.0;
        unit += 1;
    }
    format!("{amount:.1} {}", UNITS[unit])
}

/// Seconds for people.
pub fn time(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min {} s", seconds / 60, seconds % 60),
        7200.. => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    fn text(text: &str) -> Answer {
        Answer::Text(text.to_owned())
    }

    fn map(fields: &[(&str, Answer)]) -> Answer {
        Answer::List(fields.iter().flat_map(|(name, value)| [text(name), value.clone()]).collect())
    }

    fn copying() -> Answer {
        map(&[
            ("keyspace", text("users")),
            ("operation", Answer::Number(17)),
            ("kind", text("resize")),
            ("from", Answer::Number(3)),
            ("to", Answer::Number(4)),
            ("phase", text("copy")),
            ("percent", text("42.5")),
            ("bytes", Answer::Number(1_190_000_000)),
            ("bytes_expected", Answer::Number(2_800_000_000)),
            ("rate", Answer::Number(64_000_000)),
            ("behind_keys", Answer::Number(0)),
            ("behind_ms", Answer::Number(0)),
            ("elapsed", Answer::Number(19)),
            ("remaining", Answer::Number(25)),
            ("waits_for", text("")),
            ("reason", text("")),
            ("moves", Answer::List(vec![text("shard 3 from shard 0"), text("shard 3 from shard 1")])),
        ])
    }

    #[test]
    fn a_status_is_told_as_a_bar_and_as_a_line() {
        let status = Status::read(&copying()).unwrap();
        assert_eq!((status.operation, status.percent), (Some(17), Some(42.5)));
        assert_eq!(status.bar(), "copy      [######----------]  42.5 %  1.2 GB of 2.8 GB, 64.0 MB/s, 25 s left");
        assert_eq!(status.line(), "resize from 3 to 4: copy, 42.5 %, 1.2 GB of 2.8 GB, 64.0 MB/s, 25 s left");
        let whole = Status { percent: Some(100.0), phase: "committed".to_owned(), ..Status::default() };
        assert_eq!(whole.bar(), "committed [################] 100.0 %");
        let unknown = Status { percent: None, waits_for: "no master\tleads".to_owned(), ..whole };
        assert_eq!(unknown.bar(), "committed [----------------]     ? %  waits for: no master leads");
        let long = Status { waits_for: "x".repeat(500), ..status };
        assert_eq!(long.bar().chars().count(), LINE_COLUMNS);
        assert!(long.line().ends_with('x') && long.line().len() > 500);
    }

    #[test]
    fn every_step_of_a_percent_or_a_reason_is_told_once() {
        let status = Status::read(&copying()).unwrap();
        let later = Status { percent: Some(42.9), bytes: Some(1_200_000_000), ..status.clone() };
        assert_eq!(status.step(), later.step());
        assert_ne!(status.step(), Status { percent: Some(43.0), ..status.clone() }.step());
        assert_ne!(status.step(), Status { percent: None, ..status.clone() }.step());
        assert_ne!(status.step(), Status { waits_for: "a store".to_owned(), ..status.clone() }.step());
    }

    #[test]
    fn what_is_said_is_listed_without_what_is_not() {
        assert_eq!(
            described(&copying()),
            "keyspace: users\noperation: 17\nkind: resize\nfrom: 3\nto: 4\nphase: copy\npercent: 42.5\nbytes: 1190000000\n\
             bytes_expected: 2800000000\nrate: 64000000\nbehind_keys: 0\nbehind_ms: 0\nelapsed: 19\nremaining: 25\n  \
             shard 3 from shard 0\n  shard 3 from shard 1"
        );
        let none = map(&[("keyspace", text("0")), ("operation", Answer::Nothing), ("phase", text("none"))]);
        assert_eq!(described(&none), "keyspace: 0\nphase: none");
        assert_eq!(Status::read(&none).unwrap().operation, None);
        for no_status in [text("OK"), Answer::Number(1), map(&[("a", text("b"))]), Answer::List(vec![text("phase")])] {
            assert_eq!(Status::read(&no_status), None, "{no_status:?}");
        }
    }

    #[test]
    fn amounts_and_times_have_units() {
        for (bytes, expected) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.0 kB"),
            (999_949, "999.9 kB"),
            (999_951, "1.0 MB"),
            (u64::MAX, "18446.7 PB"),
        ] {
            assert_eq!(amount(bytes), expected);
        }
        for (seconds, expected) in [(0, "0 s"), (119, "119 s"), (125, "2 min 5 s"), (7325, "2 h 2 min")] {
            assert_eq!(time(seconds), expected);
        }
    }
}
