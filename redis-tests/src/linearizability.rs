//! Decides whether the history of one key can be explained by operations that took effect one at a time.
//!
//! Each operation must have taken effect at some moment between its invocation and its completion; one of unknown outcome at any
//! moment after its invocation, or never. The check goes through the completions in order of time and keeps every
//! *explanation* of what came before: what the key may hold, and which of the operations that are still open have taken effect already.
//! When an operation completes, each explanation in which it has not yet taken effect is continued by all orders of open operations
//! that end with it and in which each gives the answer that its client got; without any the history is wrong. That is the search of Wing
//! and Gong with the memory of Lowe, breadth first, and it is exact. Three things keep the number of explanations small:
//!
//! - Of two explanations that agree in the value and in the operations of known outcome the one that needed fewer of the unknown ones is kept:
//!   these never have to take effect, so it can do all that the other can.
//! - An open read that would be answered rightly is taken at once: it changes nothing.
//! - INCRs of unknown outcome are all alike, so they are counted instead of told apart. That leaves unknown SETs, DELs and APPENDs, whose
//!   orders multiply: whoever makes a history stops using a key after a few of them.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::time::Duration;

use crate::history::{Action, Answer, Operation, Outcome};

/// More explanations than this at one time and the check gives up, and says so. Histories of our loads need some hundred.
const EXPLANATIONS_MAX: usize = 200_000;

/// Operations that may be open at one time: the bits of a mask.
const OPEN_MAX: usize = 128;

/// What the check came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// With what the key may hold at the end.
    Linearizable(Vec<Content>),
    /// The answer of this operation (in the order of `sorted`) fits to none of what the key may have held before.
    Violation { operation: usize, possible: Vec<Content> },
    /// Too many explanations to go through at this operation.
    Undecided { operation: usize },
}

/// What a key holds.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Content {
    Absent,
    Value(Vec<u8>),
    /// Something that the next answer tells: where a history goes on after a violation.
    Anything,
}

impl fmt::Debug for Content {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Content::Absent => formatter.write_str("(nil)"),
            Content::Value(value) => write!(formatter, "{:?}", String::from_utf8_lossy(value)),
            Content::Anything => formatter.write_str("anything"),
        }
    }
}

impl Content {
    fn is(&self, value: Option<&[u8]>) -> bool {
        match self {
            Content::Absent => value.is_none(),
            Content::Value(held) => value == Some(held),
            Content::Anything => true,
        }
    }

    fn from(value: Option<&[u8]>) -> Content {
        value.map_or(Content::Absent, |value| Content::Value(value.to_vec()))
    }
}

/// What the key holds after an operation that got this answer (`None`: nobody knows which); `None` if it cannot have got it.
fn apply(content: &Content, action: &Action, answer: Option<&Answer>) -> Option<Content> {
    let after = match action {
        Action::Set(value) => Content::Value(value.clone()),
        Action::Get => match answer {
            Some(Answer::Found(value)) if content.is(value.as_deref()) => Content::from(value.as_deref()),
            Some(_) => return None,
            None => content.clone(),
        },
        Action::Delete => {
            let existed = match content {
                Content::Absent => Some(0),
                Content::Value(_) => Some(1),
                Content::Anything => None,
            };
            if let (Some(existed), Some(answer)) = (existed, answer)
                && *answer != Answer::Number(existed)
            {
                return None;
            }
            Content::Absent
        }
        Action::Increment => {
            let before = match content {
                Content::Absent => 0,
                Content::Value(value) => std::str::from_utf8(value).ok()?.parse::<i64>().ok()?,
                Content::Anything => match answer {
                    Some(Answer::Number(number)) => number - 1,
                    Some(_) => return None,
                    None => return Some(Content::Anything),
                },
            };
            if answer.is_some_and(|answer| *answer != Answer::Number(before + 1)) {
                return None;
            }
            Content::Value((before + 1).to_string().into_bytes())
        }
        Action::Append(token) => {
            let before: &[u8] = match content {
                Content::Absent => b"",
                Content::Value(value) => value,
                Content::Anything => return Some(Content::Anything),
            };
            let after = [before, token].concat();
            if answer.is_some_and(|answer| *answer != Answer::Number(after.len() as i64)) {
                return None;
            }
            Content::Value(after)
        }
    };
    Some(after)
}

/// Contents by number, so that explanations are small.
#[derive(Default)]
struct Contents {
    numbers: HashMap<Content, u32>,
    all: Vec<Content>,
}

impl Contents {
    fn number(&mut self, content: Content) -> u32 {
        if let Some(number) = self.numbers.get(&content) {
            return *number;
        }
        let number = self.all.len() as u32;
        self.all.push(content.clone());
        self.numbers.insert(content, number);
        number
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Explanation {
    content: u32,
    /// Open operations of known outcome that have taken effect.
    known: u128,
    /// Operations of unknown outcome that have taken effect, without the INCRs.
    unknown: u128,
    /// How many of the INCRs of unknown outcome have.
    increments: u32,
}

/// The best explanations of each content and set of known operations.
#[derive(Default)]
struct Explanations {
    best: HashMap<(u32, u128), Vec<(u128, u32)>>,
    count: usize,
}

impl Explanations {
    /// Whether it was worth adding.
    fn add(&mut self, explanation: Explanation) -> bool {
        let best = self.best.entry((explanation.content, explanation.known)).or_default();
        let needs = |more: &(u128, u32), less: &(u128, u32)| more.0 & less.0 == less.0 && more.1 >= less.1;
        let own = (explanation.unknown, explanation.increments);
        if best.iter().any(|other| needs(&own, other)) {
            return false;
        }
        let before = best.len();
        best.retain(|other| !needs(other, &own));
        best.push(own);
        self.count = self.count + best.len() - before;
        true
    }

    fn iter(&self) -> impl Iterator<Item = Explanation> + '_ {
        self.best.iter().flat_map(|((content, known), best)| {
            best.iter().map(|(unknown, increments)| Explanation {
                content: *content,
                known: *known,
                unknown: *unknown,
                increments: *increments,
            })
        })
    }
}

/// The operations that matter, by completion, as the check and its verdict number them.
pub fn sorted(operations: &[Operation]) -> Vec<Operation> {
    let mut sorted: Vec<Operation> = operations
        .iter()
        .filter(|operation| match operation.outcome {
            Outcome::Done(_) => true,
            Outcome::NotExecuted => false,
            Outcome::Unknown => operation.action.is_write(),
        })
        .cloned()
        .collect();
    sorted.sort_by_key(|operation| (operation.completed, operation.invoked));
    sorted
}

/// Checks a history of one key that began absent; the operations as `sorted` gives them.
pub fn check(operations: &[Operation]) -> Verdict {
    let mut search = Search::new(operations);
    loop {
        match search.step() {
            Step::On => {}
            Step::End => return Verdict::Linearizable(search.possible()),
            Step::Wrong { operation } => {
                return Verdict::Violation { operation, possible: search.possible() };
            }
            Step::TooMany { operation } => return Verdict::Undecided { operation },
        }
    }
}

/// For keyspaces that may lose what was acknowledged: goes on after each violation with what that operation saw; the
/// operations that do not fit.
pub fn violations(operations: &[Operation]) -> Vec<usize> {
    let mut search = Search::new(operations);
    let mut wrong = Vec::new();
    loop {
        match search.step() {
            Step::On => {}
            Step::End => return wrong,
            Step::Wrong { operation } | Step::TooMany { operation } => {
                wrong.push(operation);
                search.resume_after(operation);
            }
        }
    }
}

enum Step {
    On,
    End,
    Wrong { operation: usize },
    TooMany { operation: usize },
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Moment {
    Invocation,
    Completion,
}

struct Search<'a> {
    operations: &'a [Operation],
    /// Invocations before completions of the same moment: operations that touch may be in either order.
    moments: Vec<(Duration, Moment, usize)>,
    next: usize,
    /// The operation in each bit of the masks.
    slots: Vec<Option<usize>>,
    unknown_increments: u32,
    contents: Contents,
    explanations: Explanations,
}

impl<'a> Search<'a> {
    fn new(operations: &'a [Operation]) -> Search<'a> {
        let mut moments = Vec::new();
        for (number, operation) in operations.iter().enumerate() {
            moments.push((operation.invoked, Moment::Invocation, number));
            if operation.is_done() {
                moments.push((operation.completed, Moment::Completion, number));
            }
        }
        moments.sort_unstable();
        let mut search = Search {
            operations,
            moments,
            next: 0,
            slots: Vec::new(),
            unknown_increments: 0,
            contents: Contents::default(),
            explanations: Explanations::default(),
        };
        search.begin_with(Content::Absent);
        search
    }

    fn begin_with(&mut self, content: Content) {
        let content = self.contents.number(content);
        self.explanations = Explanations::default();
        self.explanations.add(Explanation { content, known: 0, unknown: 0, increments: 0 });
    }

    fn possible(&self) -> Vec<Content> {
        let numbers: HashSet<u32> = self.explanations.iter().map(|explanation| explanation.content).collect();
        let mut possible: Vec<Content> =
            numbers.into_iter().map(|number| self.contents.all[number as usize].clone()).collect();
        possible.sort();
        possible
    }

    /// The next moment.
    fn step(&mut self) -> Step {
        let Some((_, moment, operation)) = self.moments.get(self.next).copied() else {
            return Step::End;
        };
        self.next += 1;
        match moment {
            Moment::Invocation => self.open(operation),
            Moment::Completion => self.complete(operation),
        }
    }

    fn open(&mut self, number: usize) -> Step {
        let operation = &self.operations[number];
        if operation.outcome == Outcome::Unknown && operation.action == Action::Increment {
            self.unknown_increments += 1;
            return Step::On;
        }
        let slot = match self.slots.iter().position(Option::is_none) {
            Some(slot) => slot,
            None if self.slots.len() == OPEN_MAX => return Step::TooMany { operation: number },
            None => {
                self.slots.push(None);
                self.slots.len() - 1
            }
        };
        self.slots[slot] = Some(number);
        Step::On
    }

    fn answer(&self, number: usize) -> Option<&'a Answer> {
        match &self.operations[number].outcome {
            Outcome::Done(answer) => Some(answer),
            Outcome::NotExecuted | Outcome::Unknown => None,
        }
    }

    /// With all open reads taken that are answered rightly.
    fn with_reads(&self, mut explanation: Explanation) -> Explanation {
        let content = &self.contents.all[explanation.content as usize];
        if *content == Content::Anything {
            return explanation;
        }
        for (slot, number) in self.slots.iter().enumerate() {
            let Some(number) = number else { continue };
            let (action, answer) = (&self.operations[*number].action, self.answer(*number));
            let is_read = match action {
                Action::Get => true,
                Action::Delete => *content == Content::Absent,
                Action::Set(_) | Action::Increment | Action::Append(_) => false,
            };
            if is_read && answer.is_some() && apply(content, action, answer).is_some() {
                explanation.known |= 1 << slot;
            }
        }
        explanation
    }

    fn complete(&mut self, number: usize) -> Step {
        let Some(slot) = self.slots.iter().position(|open| *open == Some(number)) else {
            // It was open when a violation set the search back.
            return Step::On;
        };
        let bit = 1_u128 << slot;
        let mut result = Explanations::default();
        let mut seen = Explanations::default();
        let mut open: Vec<Explanation> = self.explanations.iter().collect();
        while let Some(explanation) = open.pop() {
            let explanation = self.with_reads(explanation);
            if explanation.known & bit != 0 {
                result.add(Explanation { known: explanation.known & !bit, ..explanation });
                continue;
            }
            if !seen.add(explanation) {
                continue;
            }
            if seen.count > EXPLANATIONS_MAX {
                return Step::TooMany { operation: number };
            }
            self.continue_with_each(explanation, &mut open);
        }
        if result.count == 0 {
            return Step::Wrong { operation: number };
        }
        self.explanations = result;
        self.slots[slot] = None;
        Step::On
    }

    /// All that can take effect next.
    fn continue_with_each(&mut self, explanation: Explanation, open: &mut Vec<Explanation>) {
        for slot in 0..self.slots.len() {
            let bit = 1_u128 << slot;
            let Some(number) = self.slots[slot] else { continue };
            if (explanation.known | explanation.unknown) & bit != 0 {
                continue;
            }
            let (action, answer) = (&self.operations[number].action, self.answer(number));
            let content = &self.contents.all[explanation.content as usize];
            let Some(content) = apply(content, action, answer) else { continue };
            let mut next = Explanation { content: self.contents.number(content), ..explanation };
            match answer {
                Some(_) => next.known |= bit,
                None => next.unknown |= bit,
            }
            open.push(next);
        }
        if explanation.increments < self.unknown_increments {
            let content = &self.contents.all[explanation.content as usize];
            if let Some(content) = apply(content, &Action::Increment, None) {
                let content = self.contents.number(content);
                open.push(Explanation { content, increments: explanation.increments + 1, ..explanation });
            }
        }
    }

    /// After a violation: what the key holds is what that operation saw, unless others were under way. These, and what was unknown
    /// before, are forgotten.
    fn resume_after(&mut self, number: usize) {
        let operation = &self.operations[number];
        let others = self.slots.iter().flatten().any(|open| *open != number && self.answer(*open).is_some());
        let content = match &operation.outcome {
            Outcome::Done(answer) if !others => apply(&Content::Anything, &operation.action, Some(answer)),
            Outcome::Done(_) | Outcome::NotExecuted | Outcome::Unknown => None,
        };
        self.slots.clear();
        self.unknown_increments = 0;
        self.begin_with(content.unwrap_or(Content::Anything));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One operation a line: client, invoked, completed, command, `->`, answer (`?` for unknown, `!` for not executed).
    fn history(text: &str) -> Vec<Operation> {
        let operations: Vec<Operation> = text
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty())
            .map(|line| {
                let words: Vec<&str> = line.split_whitespace().collect();
                let number = |word: &str| word.parse::<u64>().unwrap();
                let arrow = words.iter().position(|word| *word == "->").unwrap();
                let argument = words[arrow - 1].as_bytes().to_vec();
                let action = match words[3] {
                    "SET" => Action::Set(argument),
                    "GET" => Action::Get,
                    "DEL" => Action::Delete,
                    "INCR" => Action::Increment,
                    "APPEND" => Action::Append(argument),
                    other => panic!("{other}"),
                };
                let answer = words[arrow + 1];
                let outcome = match (answer, &action) {
                    ("?", _) => Outcome::Unknown,
                    ("!", _) => Outcome::NotExecuted,
                    ("OK", _) => Outcome::Done(Answer::Stored),
                    ("nil", _) => Outcome::Done(Answer::Found(None)),
                    (value, Action::Get) => Outcome::Done(Answer::Found(Some(value.as_bytes().to_vec()))),
                    (value, _) => Outcome::Done(Answer::Number(value.parse().unwrap())),
                };
                Operation {
                    key: "k".into(),
                    client: number(words[0]) as u32,
                    action,
                    invoked: Duration::from_millis(number(words[1])),
                    completed: Duration::from_millis(number(words[2])),
                    outcome,
                }
            })
            .collect();
        sorted(&operations)
    }

    fn right(text: &str) {
        let verdict = check(&history(text));
        assert!(matches!(verdict, Verdict::Linearizable(_)), "{verdict:?}\n{text}");
    }

    /// Wrong, and the first completion that shows it.
    fn wrong(text: &str, completed: u64) {
        let history = history(text);
        match check(&history) {
            Verdict::Violation { operation, .. } => {
                assert_eq!(history[operation].completed, Duration::from_millis(completed), "{text}");
            }
            other => panic!("{other:?}\n{text}"),
        }
    }

    #[test]
    fn one_client_sees_what_it_wrote() {
        right(
            "1 0 1 GET -> nil
             1 2 3 SET a -> OK
             1 4 5 APPEND bc -> 3
             1 6 7 GET -> abc
             1 8 9 DEL -> 1
             1 10 11 DEL -> 0
             1 12 13 INCR -> 1
             1 14 15 GET -> 1",
        );
    }

    #[test]
    fn a_lost_write_is_found() {
        wrong("1 0 1 SET a -> OK\n1 2 3 SET b -> OK\n1 4 5 GET -> a", 5);
        wrong("1 0 1 SET a -> OK\n1 2 3 GET -> nil", 3);
        wrong("1 0 1 SET a -> OK\n1 2 3 APPEND b -> 2\n1 4 5 APPEND c -> 2", 5);
    }

    #[test]
    fn a_stale_read_is_found() {
        // Both writes are over before the read begins, whoever made them.
        wrong("1 0 1 SET a -> OK\n2 2 3 SET b -> OK\n3 4 5 GET -> a", 5);
        // While the second write runs, its value may or may not be seen, but not seen and then not seen.
        right("1 0 1 SET a -> OK\n2 2 9 SET b -> OK\n3 3 4 GET -> a\n3 5 6 GET -> b");
        wrong("1 0 1 SET a -> OK\n2 2 9 SET b -> OK\n3 3 4 GET -> b\n3 5 6 GET -> a", 6);
    }

    #[test]
    fn a_resurrected_delete_is_found() {
        wrong("1 0 1 SET a -> OK\n1 2 3 DEL -> 1\n1 4 5 GET -> a", 5);
        wrong("1 0 1 SET a -> OK\n1 2 3 DEL -> 1\n2 4 5 DEL -> 1", 5);
        wrong("1 0 1 SET a -> OK\n1 2 3 DEL -> 1\n2 4 5 APPEND b -> 2", 5);
    }

    #[test]
    fn a_doubled_increment_is_found() {
        wrong("1 0 1 INCR -> 1\n1 2 3 GET -> 2", 3);
        wrong("1 0 1 INCR -> 1\n2 2 3 INCR -> ?\n1 4 5 GET -> 3", 5);
        right("1 0 1 INCR -> 1\n2 2 3 INCR -> ?\n1 4 5 GET -> 2");
        right("1 0 1 INCR -> 1\n2 2 3 INCR -> ?\n1 4 5 GET -> 1");
        // The same number twice.
        wrong("1 0 5 INCR -> 1\n2 1 6 INCR -> 1", 6);
    }

    #[test]
    fn a_value_that_is_gone_after_it_was_read_is_found() {
        // The write of b is unknown: that it was read settles that it was made.
        wrong("1 0 1 SET a -> OK\n1 2 3 SET b -> ?\n2 4 5 GET -> b\n2 6 7 GET -> a", 7);
        right("1 0 1 SET a -> OK\n1 2 3 SET b -> ?\n2 4 5 GET -> a\n2 6 7 GET -> b\n2 8 9 GET -> b");
        // An unknown write takes effect once.
        wrong("1 0 1 SET a -> ?\n2 2 3 GET -> a\n2 4 5 SET c -> OK\n2 6 7 GET -> a", 7);
    }

    #[test]
    fn what_was_refused_was_not_executed() {
        wrong("1 0 1 SET a -> OK\n1 2 3 SET b -> !\n1 4 5 GET -> b", 5);
        wrong("1 0 1 INCR -> !\n1 2 3 GET -> 1", 3);
    }

    #[test]
    fn an_unknown_write_may_take_effect_late() {
        right(
            "1 0 1 SET a -> ?
             2 2 3 SET b -> OK
             2 4 5 GET -> b
             2 6 7 GET -> a",
        );
        right("1 0 1 APPEND x -> ?\n1 2 3 APPEND y -> ?\n2 4 5 APPEND z -> 3\n2 6 7 GET -> yxz");
        wrong("1 0 1 APPEND x -> ?\n2 4 5 APPEND z -> 3", 5);
        // Not before it was sent.
        wrong("2 0 1 GET -> a\n1 2 3 SET a -> ?", 1);
        right("1 0 1 SET a -> OK\n1 2 3 DEL -> ?\n2 4 5 GET -> a\n2 6 7 GET -> nil");
    }

    #[test]
    fn operations_at_one_time_may_come_in_any_order() {
        right("1 0 9 INCR -> 3\n2 0 9 INCR -> 1\n3 0 9 INCR -> 2\n1 10 11 GET -> 3");
        wrong("1 0 9 INCR -> 3\n2 0 9 INCR -> 1\n3 0 9 INCR -> 4\n1 10 11 GET -> 3", 9);
        right("1 0 9 SET a -> OK\n2 0 9 SET b -> OK\n3 0 9 DEL -> 1\n1 10 11 GET -> b");
    }

    #[test]
    fn a_history_with_losses_is_gone_through_to_the_end() {
        let history = history(
            "1 0 1 INCR -> 1
             1 2 3 INCR -> 2
             1 4 5 INCR -> 2
             1 6 7 INCR -> 3
             1 8 9 GET -> 1
             1 10 11 INCR -> 2",
        );
        let at: Vec<u128> =
            violations(&history).iter().map(|operation| history[*operation].completed.as_millis()).collect();
        assert_eq!(at, [5, 9]);
    }

    /// Histories made by executing the operations at a random moment within their time are right; with one answer changed to what
    /// was true before an acknowledged write they are wrong. Both are compared with the plain search without any of the savings.
    #[test]
    fn agrees_with_a_plain_search_on_random_histories() {
        let mut seeded = crate::seed::seeded("linearizability");
        let random = &mut seeded.random;
        let (mut rights, mut wrongs) = (0, 0);
        for _ in 0..3_000 {
            let operations = random_history(random);
            let expected = plain_search(&operations, &mut vec![false; operations.len()], &Content::Absent);
            let verdict = check(&operations);
            let found = match verdict {
                Verdict::Linearizable(_) => true,
                Verdict::Violation { .. } => false,
                Verdict::Undecided { .. } => panic!("so few operations are undecided"),
            };
            assert_eq!(found, expected, "{operations:#?}");
            assert_eq!(violations(&operations).is_empty(), expected);
            if expected { rights += 1 } else { wrongs += 1 }
        }
        assert!(rights > 300 && wrongs > 300, "{rights} right and {wrongs} wrong ones");
    }

    fn random_history(random: &mut fastrand::Rng) -> Vec<Operation> {
        let mut content = Content::Absent;
        let mut operations = Vec::new();
        let counts = random.bool();
        for number in 0..random.u64(3..9) {
            let action = match (random.u8(0..4), counts) {
                (0, _) => Action::Get,
                (1, true) => Action::Increment,
                (1, false) => Action::Append(vec![b'a' + number as u8]),
                (2, _) => Action::Delete,
                (_, true) => Action::Set((100 * number).to_string().into_bytes()),
                (_, false) => Action::Set(vec![b'A' + number as u8]),
            };
            let at = 10 * number + 10;
            let (invoked, completed) = (at.saturating_sub(random.u64(0..25)), at + random.u64(0..25));
            let unknown = random.u8(0..5) == 0;
            let before = content.clone();
            let happens = !unknown || random.bool();
            if happens {
                content = apply(&content, &action, None).unwrap();
            }
            let answer = match (&action, &before) {
                (Action::Set(_), _) => Answer::Stored,
                (Action::Get, Content::Value(value)) => Answer::Found(Some(value.clone())),
                (Action::Get, _) => Answer::Found(None),
                (Action::Delete, before) => Answer::Number(i64::from(*before != Content::Absent)),
                (Action::Increment, _) => match &content {
                    Content::Value(value) => Answer::Number(std::str::from_utf8(value).unwrap().parse().unwrap()),
                    _ => Answer::Number(0),
                },
                (Action::Append(_), _) => match &content {
                    Content::Value(value) => Answer::Number(value.len() as i64),
                    _ => Answer::Number(0),
                },
            };
            // Now and then an effect is lost, or comes back.
            match random.u8(0..12) {
                0 => content = before,
                1 => content = Content::Value(b"7".to_vec()),
                _ => {}
            }
            operations.push(Operation {
                key: "k".into(),
                client: number as u32,
                action,
                invoked: Duration::from_millis(invoked),
                completed: Duration::from_millis(completed),
                outcome: if unknown { Outcome::Unknown } else { Outcome::Done(answer) },
            });
        }
        sorted(&operations)
    }

    /// Wing and Gong as they wrote it: whatever nothing else has to come before may be next.
    fn plain_search(operations: &[Operation], taken: &mut Vec<bool>, content: &Content) -> bool {
        let must = |number: usize| operations[number].is_done();
        if (0..operations.len()).all(|number| taken[number] || !must(number)) {
            return true;
        }
        for number in 0..operations.len() {
            if taken[number] {
                continue;
            }
            let others_first = (0..operations.len())
                .any(|other| !taken[other] && must(other) && operations[other].completed < operations[number].invoked);
            if others_first {
                continue;
            }
            let answer = match &operations[number].outcome {
                Outcome::Done(answer) => Some(answer),
                Outcome::NotExecuted | Outcome::Unknown => None,
            };
            if let Some(after) = apply(content, &operations[number].action, answer) {
                taken[number] = true;
                let found = plain_search(operations, taken, &after);
                taken[number] = false;
                if found {
                    return true;
                }
            }
        }
        false
    }
}
