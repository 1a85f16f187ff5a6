//! Makes one reply of the replies of several shards.

use vasto_proto::command::{Merge, Reply, ReplyWriter};

/// What a client gets when shards of different versions do not answer alike.
const MISMATCH: &str = "ERR the shards answered in different forms";

/// Shares of a split command and the answers that are in.
#[derive(Debug)]
pub struct Gather {
    merge: Merge,
    /// For each part the key groups it answers for, in its order.
    groups: Vec<Vec<u32>>,
    answers: Vec<Option<Vec<u8>>>,
    left: usize,
}

impl Gather {
    /// `groups`: for each part the key groups it answers for (empty where the merge does not care).
    pub fn new(merge: Merge, groups: Vec<Vec<u32>>) -> Self {
        Self { merge, answers: vec![None; groups.len()], left: groups.len(), groups }
    }

    /// What a part asked for comes from several shards now: `shares` are places among its key groups. Returns their parts, of which the
    /// first is the part itself.
    pub fn split(&mut self, part: usize, shares: &[Vec<u32>]) -> Vec<u32> {
        let groups = std::mem::take(&mut self.groups[part]);
        let mut parts = Vec::with_capacity(shares.len());
        for (place, share) in shares.iter().enumerate() {
            let own = share.iter().map(|place| groups[*place as usize]).collect();
            if place == 0 {
                self.groups[part] = own;
                parts.push(part as u32);
            } else {
                parts.push(self.groups.len() as u32);
                self.groups.push(own);
                self.answers.push(None);
                self.left += 1;
            }
        }
        parts
    }

    /// Notes the packed answer of a part; true when it was the last one missing.
    pub fn put(&mut self, part: usize, answer: &[u8]) -> bool {
        if self.answers[part].replace(answer.to_vec()).is_none() {
            self.left -= 1;
        }
        self.left == 0
    }

    /// Writes the merged packed reply. An error of any part is the reply: a failing shard never looks like success.
    pub fn finish(&self, random: usize, out: &mut Vec<u8>) {
        let answers: Vec<&[u8]> = self.answers.iter().flatten().map(Vec::as_slice).collect();
        if let Some(error) = answers.iter().find(|answer| answer.first() == Some(&b'-')) {
            out.extend_from_slice(error);
            return;
        }
        let start = out.len();
        let merged = match self.merge {
            Merge::InKeyOrder => self.in_key_order(&answers, out),
            Merge::Sum => sum(&answers, out),
            Merge::AllOk => {
                ReplyWriter::new(out).ok();
                Some(())
            }
            Merge::Concat => concat(&answers, out),
            Merge::AnyNonNull => {
                let found: Vec<&&[u8]> =
                    answers.iter().filter(|answer| !matches!(answer.first(), Some(b'_' | b'0'))).collect();
                match found.len() {
                    0 => ReplyWriter::new(out).null(),
                    count => out.extend_from_slice(found[random % count]),
                }
                Some(())
            }
        };
        if merged.is_none() {
            out.truncate(start);
            ReplyWriter::new(out).error(MISMATCH);
        }
    }

    fn in_key_order(&self, answers: &[&[u8]], out: &mut Vec<u8>) -> Option<()> {
        let total: usize = self.groups.iter().map(Vec::len).sum();
        let mut elements: Vec<&[u8]> = vec![&[]; total];
        for (groups, answer) in self.groups.iter().zip(answers) {
            let mut rest = *answer;
            let Reply::Array(count) = Reply::take(&mut rest)? else { return None };
            if count != groups.len() {
                return None;
            }
            for group in groups {
                elements[*group as usize] = Reply::take_whole(&mut rest)?;
            }
        }
        ReplyWriter::new(out).array(total);
        elements.iter().for_each(|element| out.extend_from_slice(element));
        Some(())
    }
}

fn sum(answers: &[&[u8]], out: &mut Vec<u8>) -> Option<()> {
    let mut total = 0i64;
    for answer in answers {
        let Reply::Integer(value) = Reply::take(&mut &**answer)? else { return None };
        total = total.saturating_add(value);
    }
    ReplyWriter::new(out).integer(total);
    Some(())
}

fn concat(answers: &[&[u8]], out: &mut Vec<u8>) -> Option<()> {
    let mut bodies = Vec::with_capacity(answers.len());
    let mut total = 0;
    for answer in answers {
        let mut rest = *answer;
        let Reply::Array(count) = Reply::take(&mut rest)? else { return None };
        total += count;
        bodies.push(rest);
    }
    ReplyWriter::new(out).array(total);
    bodies.iter().for_each(|body| out.extend_from_slice(body));
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packed(write: impl Fn(&mut ReplyWriter<'_>)) -> Vec<u8> {
        let mut out = Vec::new();
        write(&mut ReplyWriter::new(&mut out));
        out
    }

    fn merged(merge: Merge, groups: Vec<Vec<u32>>, answers: &[Vec<u8>]) -> Vec<u8> {
        let mut gather = Gather::new(merge, groups);
        for (part, answer) in answers.iter().enumerate() {
            assert_eq!(gather.put(part, answer), part + 1 == answers.len());
        }
        let mut out = Vec::new();
        gather.finish(3, &mut out);
        out
    }

    fn array(elements: &[&[u8]]) -> Vec<u8> {
        packed(|reply| {
            reply.array(elements.len());
            elements.iter().for_each(|element| reply.bulk(element));
        })
    }

    #[test]
    fn elements_come_back_in_the_order_of_the_keys() {
        let out =
            merged(Merge::InKeyOrder, vec![vec![0, 3], vec![1, 2]], &[array(&[b"a", b"d"]), array(&[b"b", b"c"])]);
        assert_eq!(out, array(&[b"a", b"b", b"c", b"d"]));
    }

    #[test]
    fn a_part_that_is_split_anew_keeps_the_places_of_its_keys() {
        let mut gather = Gather::new(Merge::InKeyOrder, vec![vec![0, 3, 4, 6], vec![1, 2, 5]]);
        assert!(!gather.put(1, &array(&[b"b", b"c", b"f"])));
        assert_eq!(gather.split(0, &[vec![1, 3], vec![0, 2]]), [0, 2]);
        assert_eq!(gather.split(2, &[vec![0], vec![1]]), [2, 3]);
        assert!(!gather.put(3, &array(&[b"e"])));
        assert!(!gather.put(0, &array(&[b"d", b"g"])));
        assert!(gather.put(2, &array(&[b"a"])));
        let mut out = Vec::new();
        gather.finish(0, &mut out);
        assert_eq!(out, array(&[b"a", b"b", b"c", b"d", b"e", b"f", b"g"]));
    }

    #[test]
    fn one_failing_shard_is_the_answer() {
        let error = packed(|reply| reply.error("ERR disk"));
        for merge in [Merge::InKeyOrder, Merge::Sum, Merge::AllOk, Merge::Concat, Merge::AnyNonNull] {
            let out = merged(merge, vec![vec![], vec![]], &[packed(|reply| reply.integer(1)), error.clone()]);
            assert_eq!(out, error, "{merge:?}");
        }
    }

    #[test]
    fn sums_lists_and_choices() {
        let (one, two) = (packed(|reply| reply.integer(1)), packed(|reply| reply.integer(2)));
        assert_eq!(merged(Merge::Sum, vec![vec![]; 2], &[one, two]), packed(|reply| reply.integer(3)));
        assert_eq!(merged(Merge::Concat, vec![vec![]; 2], &[array(&[b"x"]), array(&[b"y"])]), array(&[b"x", b"y"]));
        let (null, key) = (packed(|reply| reply.null()), packed(|reply| reply.bulk(b"k")));
        assert_eq!(merged(Merge::AnyNonNull, vec![vec![]; 2], &[null.clone(), key.clone()]), key);
        assert_eq!(merged(Merge::AnyNonNull, vec![vec![]; 2], &[null.clone(), null.clone()]), null);
    }

    #[test]
    fn a_short_answer_is_an_error_not_a_short_reply() {
        let out = merged(Merge::InKeyOrder, vec![vec![0], vec![1, 2]], &[array(&[b"a"]), array(&[b"b"])]);
        assert_eq!(out, packed(|reply| reply.error(MISMATCH)));
    }
}
