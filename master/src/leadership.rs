//! Whether this master leads: when it asks for a term, what it asks of which store, and who shall be in the group of holders.
//! No clock, no chance but the number that it was given at its start, no I/O.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use vasto_proto::id::{Epoch, KeyspaceId, StoreId};
use vasto_proto::slot::splitmix64;
use vasto_proto::topology::ballot::{Accepted, Answer, Refusal, Request, Term, Versioned};
use vasto_proto::topology::entry::GROUP;
use vasto_proto::topology::proposer::{Formation, Progress, ProposeError, Proposer};
use vasto_proto::topology::{Entry, HolderGroup, KeyspaceRecord};

/// A leader that no store has heard for so long is gone: four of its acknowledgements.
pub const LEADER_SILENCE_MAX: Duration = Duration::from_secs(2);

/// Before a term is asked for, drawn at random: two masters that see the same seldom ask at the same time.
const PAUSE_MIN: Duration = Duration::from_millis(200);
const PAUSE_MAX: Duration = Duration::from_millis(1000);

/// A term that has not come by then, or a first group that is not kept by then, is given up; and asked for anew.
const CAMPAIGN_PATIENCE: Duration = Duration::from_secs(3);

/// A request that a store has not answered is sent again: some synced files later.
const REPEAT_PAUSE: Duration = Duration::from_secs(2);

/// Records on their way to one holder: its queue of directives takes more, and a new leader writes all of them again.
const VOTES_UNDER_WAY_MAX: usize = 64;
/// Above so many no further message leaves, so that votes in single messages do not fill the queue.
const VOTES_UNDER_WAY_FEW: usize = 16;

/// Most holders: with five, two may be down.
const HOLDERS_MAX: usize = 5;

/// What a store says of terms, in every report.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ballot {
    /// The highest term that it has promised or whose master it has heard.
    pub follows: Term,
    /// How long ago it has heard the master of that term, if their session is open.
    pub leader_heard: Option<Duration>,
    pub leader: String,
    pub group: Option<Accepted<Entry>>,
    pub answers: Vec<Result<Answer<Entry>, Refusal>>,
    /// The masters that have a session with it.
    pub masters: Vec<String>,
}

/// A store, as far as it matters here.
#[derive(Clone, Debug)]
pub struct Voter {
    pub is_up: bool,
    /// It knows terms.
    pub votes: bool,
    /// Since when it is up or down.
    pub since: Duration,
    /// The highest term that it follows.
    pub follows: Term,
    /// It hears another master that leads.
    pub hears_leader: bool,
}

/// What is to be written in the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    Leads(Term),
    GroupChanges(HolderGroup),
    SteppedBack { own: Term, newer: Term },
}

/// The stores that must be there before a cluster gets its first group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Founding {
    /// They hold shards of known records, or are all that an empty cluster waits for.
    pub owners: BTreeSet<StoreId>,
    pub is_ready: bool,
}

#[derive(Debug)]
pub struct Leadership {
    life: u64,
    proposer: Proposer<Entry>,
    /// When to ask for a term, while it is due.
    campaign_at: Option<Duration>,
    /// How often a pause was drawn.
    draws: u64,
    since: Duration,
    /// What was sent and is not answered.
    asked: BTreeMap<StoreId, BTreeMap<KeyspaceId, Asked>>,
    notices: Vec<Notice>,
    /// Everything that was adopted was chosen under the present term.
    is_settled: bool,
    overruled_by: Option<Term>,
}

#[derive(Clone, Copy, Debug)]
struct Asked {
    term: Term,
    epoch: Epoch,
    at: Duration,
}

/// Under this key it is noted when a promise was asked for: no keyspace has it, and not the group.
const PROMISE: KeyspaceId = KeyspaceId(u32::MAX - 1);

impl Leadership {
    /// `life` is drawn at random by each start of a master.
    pub fn new(life: u64) -> Self {
        Self {
            life,
            proposer: Proposer::of_cluster(life),
            campaign_at: None,
            draws: 0,
            since: Duration::ZERO,
            asked: BTreeMap::new(),
            notices: Vec::new(),
            is_settled: false,
            overruled_by: None,
        }
    }

    pub fn life(&self) -> u64 {
        self.life
    }

    pub fn leads(&self) -> bool {
        self.proposer.leads()
    }

    /// The term under which it leads.
    pub fn term(&self) -> Option<Term> {
        self.proposer.term().filter(|_| self.proposer.leads())
    }

    /// Whether everything that was adopted has been chosen under its own term, so that changes may be made.
    pub fn is_settled(&self) -> bool {
        self.is_settled && self.leads()
    }

    /// The term of the master that has overruled this one, once.
    pub fn take_overruling(&mut self) -> Option<Term> {
        self.overruled_by.take()
    }

    /// The group that is in force, as far as this master knows for sure.
    pub fn group(&self) -> Option<&HolderGroup> {
        self.proposer.chosen(GROUP)?.group()
    }

    /// The group of which it has heard last.
    pub fn heard_group(&self) -> Option<&HolderGroup> {
        self.group().or_else(|| self.proposer.heard_group())
    }

    /// The newest version of each record under its term, and whether it is chosen.
    pub fn records(&self) -> impl Iterator<Item = (&KeyspaceRecord, bool)> {
        self.proposer.registers().filter_map(|(entry, is_chosen)| Some((entry.record()?, is_chosen)))
    }

    /// The holders that have not voted for the newest version of a record.
    pub fn awaited(&self, keyspace: KeyspaceId) -> BTreeSet<StoreId> {
        self.proposer.awaited(keyspace)
    }

    /// Makes the next version of a record, from the one that it has.
    pub fn propose(&mut self, record: KeyspaceRecord) -> Result<(), ProposeError> {
        let known = self.records().find(|(known, _)| known.id == record.id);
        let expected = known.map_or(Epoch(0), |(known, _)| known.epoch);
        self.proposer.propose(expected, Entry::Keyspace(record))
    }

    pub fn take_notices(&mut self) -> Vec<Notice> {
        std::mem::take(&mut self.notices)
    }

    /// Takes in what a store says, and takes its answers out.
    pub fn hear(&mut self, store: StoreId, ballot: &mut Ballot, now: Duration) {
        if let Some(group) = &ballot.group {
            self.proposer.hear_group(group.clone());
        }
        let progress = self.proposer.hear_term(ballot.follows);
        self.note(progress, now);
        for answer in std::mem::take(&mut ballot.answers) {
            let asked = self.asked.entry(store).or_default();
            match &answer {
                Ok(Answer::Promised { .. }) => drop(asked.remove(&PROMISE)),
                Ok(Answer::Voted { term, keyspace, epoch }) => {
                    if asked.get(keyspace).is_some_and(|asked| (asked.term, asked.epoch) == (*term, *epoch)) {
                        asked.remove(keyspace);
                    }
                }
                Err(_) => {}
            }
            let progress = self.proposer.hear(store, answer);
            self.note(progress, now);
        }
        self.is_settled |=
            self.leads() && self.group().is_some() && self.proposer.registers().all(|(_, is_chosen)| is_chosen);
    }

    /// What was sent to a store in a session that is over did not arrive, or is answered in vain.
    pub fn forget_session(&mut self, store: StoreId) {
        self.asked.remove(&store);
    }

    fn note(&mut self, progress: Progress, now: Duration) {
        match progress {
            Progress::Nothing | Progress::Chosen(..) => {}
            Progress::Leads(term) => {
                self.since = now;
                self.is_settled = false;
                self.notices.push(Notice::Leads(term));
            }
            Progress::SteppedBack { own, newer } => {
                self.campaign_at = None;
                self.overruled_by = Some(newer);
                self.notices.push(Notice::SteppedBack { own, newer });
            }
        }
    }

    /// Asks for a term if it is time to.
    pub fn campaign(&mut self, voters: &BTreeMap<StoreId, Voter>, founding: &Founding, now: Duration) {
        if self.proposer.term().is_some() {
            let is_late = now.saturating_sub(self.since) > CAMPAIGN_PATIENCE;
            // A leader that has lost its majority waits for it: nobody else can have it.
            if !is_late || self.leads() && !self.proposer.is_forming() {
                return;
            }
            self.proposer.stand_by();
            self.campaign_at = None;
        }
        if !self.may_campaign(voters, founding) {
            self.campaign_at = None;
            return;
        }
        let at = match self.campaign_at {
            Some(at) => at,
            None => {
                // Where there has never been a term there is most likely no other master.
                let is_first = voters.values().all(|voter| voter.follows == Term::NONE) && self.draws == 0;
                let pause = if is_first { Duration::ZERO } else { self.draw_pause() };
                self.draws += 1;
                *self.campaign_at.insert(now + pause)
            }
        };
        if now < at {
            return;
        }
        self.campaign_at = None;
        self.since = now;
        self.asked.clear();
        if self.proposer.heard_group().is_some() {
            self.proposer.campaign();
        } else if let Some(formation) = formation(voters, founding) {
            self.proposer.form(formation);
        }
    }

    fn draw_pause(&self) -> Duration {
        let span = (PAUSE_MAX - PAUSE_MIN).as_millis() as u64;
        PAUSE_MIN + Duration::from_millis(splitmix64(self.life ^ self.draws) % span)
    }

    /// A majority of the holders is there and hears nobody else who leads.
    fn may_campaign(&self, voters: &BTreeMap<StoreId, Voter>, founding: &Founding) -> bool {
        match self.proposer.heard_group() {
            Some(group) => {
                let is_free = |store: &&StoreId| {
                    voters.get(*store).is_some_and(|voter| voter.is_up && voter.votes && !voter.hears_leader)
                };
                group.members.iter().filter(is_free).count() >= group.quorum()
            }
            None => {
                let can_vote = |voter: &Voter| voter.is_up && voter.votes && !voter.hears_leader;
                let owners_are_there = founding.owners.iter().all(|owner| voters.get(owner).is_some_and(can_vote));
                founding.is_ready && owners_are_there && !voters.values().any(|voter| voter.hears_leader)
            }
        }
    }

    /// What is to be sent to a store now: nothing, one promise, or votes on several records.
    pub fn requests(&mut self, store: StoreId, now: Duration) -> Vec<Request<Entry>> {
        let requests = self.proposer.requests(store);
        if requests.is_empty() {
            return requests;
        }
        let asked = self.asked.entry(store).or_default();
        asked.retain(|_, asked| now.saturating_sub(asked.at) < REPEAT_PAUSE);
        let mut room = match asked.len() {
            0 => VOTES_UNDER_WAY_MAX,
            under_way => VOTES_UNDER_WAY_FEW.saturating_sub(under_way),
        };
        let mut due = Vec::new();
        for request in requests {
            let (key, term, epoch) = match &request {
                Request::Prepare { term } => (PROMISE, *term, Epoch(0)),
                Request::Accept(accepted) => (accepted.record.keyspace(), accepted.term, accepted.record.epoch()),
            };
            let is_under_way = asked.get(&key).is_some_and(|asked| (asked.term, asked.epoch) == (term, epoch));
            if !is_under_way && room > 0 {
                room -= 1;
                asked.insert(key, Asked { term, epoch, at: now });
                due.push(request);
            }
        }
        due
    }

    /// Changes the group by one store if it is time to: grows to three and five with the cluster, and replaces a holder that stays away.
    pub fn tend_group(&mut self, voters: &BTreeMap<StoreId, Voter>, replace_after: Duration, now: Duration) {
        if !self.proposer.registers().all(|(_, is_chosen)| is_chosen) {
            return;
        }
        let Some(group) = self.group() else { return };
        let Some(members) = next_members(&group.members, voters, self.since, replace_after, now) else { return };
        let next = HolderGroup { version: group.version + 1, members };
        let expected = Epoch(group.version);
        // Everything is chosen, and one store is changed: it is not refused.
        if self.proposer.propose(expected, Entry::Group(next.clone())).is_ok() {
            self.notices.push(Notice::GroupChanges(next));
        }
    }
}

/// The largest odd number of holders among so many stores.
fn group_size(stores: usize) -> usize {
    match stores.min(HOLDERS_MAX) {
        0 => 0,
        stores => stores - (stores + 1) % 2,
    }
}

fn formation(voters: &BTreeMap<StoreId, Voter>, founding: &Founding) -> Option<Formation<Entry>> {
    let electors: BTreeSet<StoreId> =
        voters.iter().filter(|(_, voter)| voter.is_up && voter.votes).map(|(store, _)| *store).collect();
    // Those with shards first: another master that forms a group must ask them too.
    let owners = electors.iter().filter(|store| founding.owners.contains(store));
    let others = electors.iter().filter(|store| !founding.owners.contains(store));
    let ordered: Vec<StoreId> = owners.chain(others).copied().collect();
    let first = *ordered.first()?;
    let members = ordered.into_iter().take(group_size(electors.len())).collect();
    Some(Formation { electors, group: Entry::Group(HolderGroup { version: 1, members }), first })
}

/// The next group, if it is to be another; it differs by one store.
fn next_members(
    members: &BTreeSet<StoreId>,
    voters: &BTreeMap<StoreId, Voter>,
    leads_since: Duration,
    replace_after: Duration,
    now: Duration,
) -> Option<BTreeSet<StoreId>> {
    let is_up = |store: &StoreId| voters.get(store).is_some_and(|voter| voter.is_up && voter.votes);
    let is_lost = |store: &StoreId| {
        // One that has never come is away since this master leads, as far as it knows.
        let since = voters.get(store).map_or(leads_since, |voter| voter.since.max(leads_since));
        !is_up(store) && now.saturating_sub(since) >= replace_after
    };
    let candidates: Vec<StoreId> =
        voters.keys().filter(|store| !members.contains(store) && is_up(store)).copied().collect();
    let with = |store: StoreId| Some(members.iter().copied().chain([store]).collect());
    let without = |store: StoreId| Some(members.iter().copied().filter(|member| *member != store).collect());
    let lost = members.iter().copied().find(|member| is_lost(member));
    let size = members.len();
    let all_up = members.iter().all(is_up);
    let target = group_size(size + candidates.len());
    if size.is_multiple_of(2) {
        return match (lost, candidates.first()) {
            (Some(lost), _) => without(lost),
            (None, Some(candidate)) if target > size => with(*candidate),
            // Nobody came to make it odd again, or the one that was replaced is back.
            (None, _) => members
                .iter()
                .copied()
                .filter(|member| !is_up(member))
                .chain(members.last().copied())
                .next()
                .and_then(without),
        };
    }
    match (lost, candidates.first()) {
        (Some(_), Some(candidate)) => with(*candidate),
        // By two: with an even number no more may be lost than with one less.
        (None, Some(candidate)) if target > size && all_up => with(*candidate),
        (Some(_) | None, _) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn voter(is_up: bool, since_s: u64) -> Voter {
        Voter { is_up, votes: true, since: Duration::from_secs(since_s), follows: Term::NONE, hears_leader: false }
    }

    fn next(members: &[u32], up: &[u32], down: &[u32], now_s: u64) -> Option<Vec<u32>> {
        let members = members.iter().copied().map(StoreId).collect();
        let up = up.iter().map(|store| (StoreId(*store), voter(true, 0)));
        let voters = up.chain(down.iter().map(|store| (StoreId(*store), voter(false, 0)))).collect();
        let (replace_after, now) = (Duration::from_secs(300), Duration::from_secs(now_s));
        let next = next_members(&members, &voters, Duration::ZERO, replace_after, now)?;
        Some(next.into_iter().map(|store| store.0).collect())
    }

    #[test]
    fn the_group_grows_with_the_cluster_and_replaces_who_stays_away() {
        assert_eq!(next(&[1], &[1], &[], 1), None);
        assert_eq!(next(&[1], &[1, 2], &[], 1), None, "two are worse than one");
        assert_eq!(next(&[1], &[1, 2, 3], &[], 1), Some(vec![1, 2]));
        assert_eq!(next(&[1, 2], &[1, 2, 3], &[], 1), Some(vec![1, 2, 3]));
        assert_eq!(next(&[1, 2, 3], &[1, 2, 3, 4], &[], 1), None);
        assert_eq!(next(&[1, 2, 3], &[1, 2, 3, 4, 5], &[], 1), Some(vec![1, 2, 3, 4]));
        assert_eq!(next(&[1, 2, 3, 4, 5], &[1, 2, 3, 4, 5, 6, 7], &[], 1), None);
        // One is down: first for a while, then for good.
        assert_eq!(next(&[1, 2, 3], &[1, 2, 4], &[3], 299), None);
        assert_eq!(next(&[1, 2, 3], &[1, 2, 4], &[3], 300), Some(vec![1, 2, 3, 4]));
        assert_eq!(next(&[1, 2, 3, 4], &[1, 2, 4], &[3], 301), Some(vec![1, 2, 4]));
        assert_eq!(next(&[1, 2, 3], &[1, 2], &[3], 900), None, "never fewer without need");
        // It came back in the middle: one too many.
        assert_eq!(next(&[1, 2, 3, 4], &[1, 2, 3, 4], &[], 301), Some(vec![1, 2, 3]));
        assert_eq!(next(&[1, 2], &[1, 2], &[], 301), Some(vec![1]));
        // One that has never been seen is away since this master leads.
        assert_eq!(next(&[1, 2, 3], &[1, 2, 4], &[], 300), Some(vec![1, 2, 3, 4]));
    }

    #[test]
    fn a_group_has_an_odd_number_of_stores() {
        assert_eq!((0..8).map(group_size).collect::<Vec<_>>(), [0, 1, 1, 3, 3, 5, 5, 5]);
    }
}
