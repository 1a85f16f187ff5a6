//! BGSAVE, SAVE, LASTSAVE: every store is asked by way of one of its shards, and each makes a folder of the same name.

use super::{Ask, Context, Next, Round, ShardRequest};
use crate::clients::unix_ms;
use vasto_proto::command::table::StoreCommand;
use vasto_proto::command::{Args, Reply};
use vasto_proto::error::{self, CommandError};
use vasto_proto::id::{ShardKey, StoreId};

const MALFORMED_ANSWER: CommandError =
    CommandError::fixed("ERR the store answered something that is not about backups");

/// BGSAVE [SCHEDULE]; nothing else ever runs that it would be scheduled behind.
pub fn bgsave(_context: &mut Context<'_>, mut args: Args<'_>) -> Result<Next, CommandError> {
    let _ = args.option("SCHEDULE");
    args.end()?;
    Ok(Next::Ask(Box::new(Backup::new(Wait::UntilBegun))))
}

pub fn save(_context: &mut Context<'_>, _args: Args<'_>) -> Result<Next, CommandError> {
    Ok(Next::Ask(Box::new(Backup::new(Wait::UntilDone))))
}

pub fn lastsave(_context: &mut Context<'_>, _args: Args<'_>) -> Result<Next, CommandError> {
    Ok(Next::Ask(Box::new(LastSave)))
}

/// One shard of each store, by which it is asked.
pub fn one_shard_each(context: &Context<'_>) -> Vec<ShardKey> {
    stores_and_shards(context).into_iter().map(|(_, shard)| shard).collect()
}

/// The stores in order: all gateways ask the same one first.
fn stores_and_shards(context: &Context<'_>) -> Vec<(StoreId, ShardKey)> {
    let mut shards: Vec<(StoreId, ShardKey)> = context
        .routing
        .keyspaces()
        .flat_map(|routes| routes.shard_keys().filter_map(|key| Some((routes.owner(key.shard)?.0, key))))
        .collect();
    shards.sort_unstable();
    shards.dedup_by_key(|(store, _)| *store);
    shards
}

pub fn ask_status(shard: &ShardKey) -> ShardRequest {
    ShardRequest { target: *shard, command: StoreCommand::InternalSaves, arguments: Vec::new() }
}

/// What a store says of its backups.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreStatus {
    pub is_running: bool,
    /// Unix seconds; 0 = never.
    pub last_done_s: i64,
    pub has_failed: bool,
}

impl StoreStatus {
    /// Of all stores together; one that does not answer is left out.
    pub fn of_all(answers: &[Vec<u8>]) -> Self {
        let statuses = answers.iter().filter_map(|answer| Self::parse(answer).ok());
        let together = statuses.reduce(|one, other| Self {
            is_running: one.is_running || other.is_running,
            // What every store has.
            last_done_s: one.last_done_s.min(other.last_done_s),
            has_failed: one.has_failed || other.has_failed,
        });
        together.unwrap_or_default()
    }

    fn parse(mut answer: &[u8]) -> Result<Self, CommandError> {
        if let Some(error) = as_error(answer) {
            return Err(error);
        }
        let mut status = Self::default();
        let Some(Reply::Map(count)) = Reply::take(&mut answer) else { return Err(MALFORMED_ANSWER) };
        for _ in 0..count {
            let (Some(Reply::Bulk(name)), Some(Reply::Integer(value))) =
                (Reply::take(&mut answer), Reply::take(&mut answer))
            else {
                return Err(MALFORMED_ANSWER);
            };
            match name {
                b"in_progress" => status.is_running = value != 0,
                b"last_done" => status.last_done_s = value,
                b"failed" => status.has_failed = value != 0,
                // Of a later version.
                _ => {}
            }
        }
        Ok(status)
    }
}

fn as_error(answer: &[u8]) -> Option<CommandError> {
    match Reply::take(&mut &*answer)? {
        Reply::Error(text) => Some(String::from_utf8_lossy(text).into_owned().into()),
        _ => None,
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wait {
    UntilBegun,
    UntilDone,
}

/// Where a backup stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Every store was asked whether it is free.
    Looking,
    /// The first store was told: two gateways that begin at one time meet there.
    First,
    /// All others were.
    Others,
}

#[derive(Debug)]
struct Backup {
    wait: Wait,
    name: String,
    /// With a shard each, by which they are told.
    stores: Vec<(StoreId, ShardKey)>,
    stage: Stage,
}

impl Backup {
    fn new(wait: Wait) -> Self {
        let name = format!("{}-{:04x}", utc(unix_ms() / 1000), fastrand::u16(..));
        Self { wait, name, stores: Vec::new(), stage: Stage::Looking }
    }

    fn request(&self, shard: &ShardKey) -> ShardRequest {
        let wait = match self.wait {
            Wait::UntilBegun => b"start".to_vec(),
            Wait::UntilDone => b"wait".to_vec(),
        };
        let arguments = vec![self.name.clone().into_bytes(), wait];
        ShardRequest { target: *shard, command: StoreCommand::InternalSave, arguments }
    }
}

impl Ask for Backup {
    fn start(&mut self, context: &mut Context<'_>) -> Result<Vec<ShardRequest>, CommandError> {
        self.stores = stores_and_shards(context);
        if self.stores.is_empty() {
            return Err(error::NO_KEYSPACE);
        }
        Ok(self.stores.iter().map(|(_, shard)| ask_status(shard)).collect())
    }

    fn next(&mut self, context: &mut Context<'_>, answers: Vec<Vec<u8>>) -> Result<Round, CommandError> {
        let ((_, first), others) = self.stores.split_first().ok_or(MALFORMED_ANSWER)?;
        match self.stage {
            Stage::Looking => {
                for answer in &answers {
                    if StoreStatus::parse(answer)?.is_running {
                        return Err(error::SAVE_IN_PROGRESS);
                    }
                }
                self.stage = Stage::First;
                return Ok(Round::Again(vec![self.request(first)]));
            }
            Stage::First | Stage::Others => {
                if let Some(error) = answers.iter().find_map(|answer| as_error(answer)) {
                    return Err(error);
                }
            }
        }
        if self.stage == Stage::First && !others.is_empty() {
            self.stage = Stage::Others;
            return Ok(Round::Again(others.iter().map(|(_, shard)| self.request(shard)).collect()));
        }
        match self.wait {
            Wait::UntilBegun => context.reply().simple("Background saving started"),
            Wait::UntilDone => context.reply().ok(),
        }
        Ok(Round::Done)
    }

    /// Who has begun is not told twice; the others may have other shards now, or none, and then nothing to save.
    fn again(&mut self, context: &mut Context<'_>, answered: &[Option<Vec<u8>>]) -> Result<Round, CommandError> {
        let told_before = match self.stage {
            Stage::Looking => return self.start(context).map(Round::Again),
            Stage::First => 0,
            Stage::Others => 1,
        };
        if let Some(error) = answered.iter().flatten().find_map(|answer| as_error(answer)) {
            return Err(error);
        }
        let known = stores_and_shards(context);
        let missing = self.stores.split_off(told_before.min(self.stores.len()));
        let is_missing = |(place, _): &(usize, (StoreId, ShardKey))| {
            self.stage == Stage::First || answered.get(*place).is_none_or(Option::is_none)
        };
        let missing: Vec<StoreId> =
            missing.into_iter().enumerate().filter(is_missing).map(|(_, (store, _))| store).collect();
        self.stores.extend(known.into_iter().filter(|(store, _)| missing.contains(store)));
        let asked = match self.stage {
            Stage::Looking | Stage::First => self.stores.get(..1),
            Stage::Others => self.stores.get(1..),
        };
        Ok(Round::Again(asked.unwrap_or_default().iter().map(|(_, shard)| self.request(shard)).collect()))
    }
}

/// The time of the last backup that every store has.
#[derive(Debug)]
struct LastSave;

impl Ask for LastSave {
    fn start(&mut self, context: &mut Context<'_>) -> Result<Vec<ShardRequest>, CommandError> {
        Ok(one_shard_each(context).iter().map(ask_status).collect())
    }

    fn next(&mut self, context: &mut Context<'_>, answers: Vec<Vec<u8>>) -> Result<Round, CommandError> {
        let statuses = answers.iter().map(|answer| StoreStatus::parse(answer)).collect::<Result<Vec<_>, _>>()?;
        // A client that waits for a change of this sees one when the slowest store is done.
        let last = statuses.iter().map(|status| status.last_done_s).min().unwrap_or(0);
        context.reply().integer(last);
        Ok(Round::Done)
    }
}

/// `20261124T061500Z`
fn utc(unix_s: u64) -> String {
    let (days, second) = (unix_s / 86_400, unix_s % 86_400);
    // Years begin in March and 400 of them have 146,097 days, so that the odd day is the last one of each period.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}{month:02}{day:02}T{hour:02}{minute:02}{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::harness::{Harness, packed};
    use std::collections::BTreeMap;

    #[test]
    fn times_are_those_of_the_calendar() {
        for (unix_s, text) in [
            (0, "19700101T000000Z"),
            (951_782_399, "20000228T235959Z"),
            (951_782_400, "20000229T000000Z"),
            (951_868_800, "20000301T000000Z"),
            (1_795_500_900, "20261124T061500Z"),
            (4_107_542_399, "21000228T235959Z"),
            (4_107_542_400, "21000301T000000Z"),
        ] {
            assert_eq!(utc(unix_s), text);
        }
    }

    /// Two stores by their first shards: what they were asked, and what they answer.
    #[derive(Default)]
    struct Stores {
        running: bool,
        last_done_s: BTreeMap<ShardKey, i64>,
        refusing: Option<&'static str>,
        asked: Vec<(ShardKey, String)>,
    }

    impl Stores {
        fn answer(&mut self, request: &ShardRequest) -> Vec<u8> {
            if request.command == StoreCommand::InternalSaves {
                let last = self.last_done_s.get(&request.target).copied().unwrap_or(0);
                return packed(|reply| {
                    reply.map(2);
                    reply.bulk(b"in_progress");
                    reply.integer(i64::from(self.running));
                    reply.bulk(b"last_done");
                    reply.integer(last);
                });
            }
            assert_eq!(request.command, StoreCommand::InternalSave);
            let words: Vec<_> =
                request.arguments.iter().map(|word| String::from_utf8_lossy(word).into_owned()).collect();
            self.asked.push((request.target, words.join(" ")));
            match self.refusing {
                Some(text) => packed(|reply| reply.error(text)),
                None => packed(|reply| reply.ok()),
            }
        }

        fn run(&mut self, line: &str) -> String {
            Harness::new().run_with(line, &mut |request| self.answer(request))
        }
    }

    #[test]
    fn every_store_is_asked_once_and_by_the_same_name() {
        let mut stores = Stores::default();
        assert_eq!(stores.run("BGSAVE"), "+Background saving started");
        let [(first, name), (second, other)] = stores.asked.as_slice() else { panic!("{:?}", stores.asked) };
        assert_ne!(first, second);
        assert_eq!(name, other);
        assert!(name.ends_with(" start") && name.contains('T'), "{name}");
        stores.asked.clear();
        assert_eq!(stores.run("SAVE"), "OK");
        assert!(stores.asked.len() == 2 && stores.asked.iter().all(|(_, words)| words.ends_with(" wait")));
    }

    #[test]
    fn answers_are_those_of_redis() {
        let mut stores = Stores::default();
        assert_eq!(stores.run("BGSAVE SCHEDULE"), "+Background saving started");
        assert_eq!(stores.run("BGSAVE x"), "-ERR syntax error");
        assert_eq!(stores.run("BGSAVE SCHEDULE x"), "-ERR syntax error");
        assert_eq!(stores.run("LASTSAVE"), "0");
        stores.asked.clear();
        stores.running = true;
        for line in ["BGSAVE", "SAVE"] {
            assert_eq!(stores.run(line), "-ERR Background save already in progress");
        }
        assert_eq!(stores.asked, [], "nothing is begun while one store is busy");
    }

    #[test]
    fn a_backup_that_meets_a_change_of_the_shards_is_told_to_each_store_once() {
        let mut harness = Harness::new();
        let mut reply = Vec::new();
        let context = &mut harness.context(&mut reply);
        let mut backup = Backup::new(Wait::UntilBegun);
        let ok = packed(|reply| reply.ok());
        assert_eq!(backup.start(context).expect("two stores").len(), 2);
        let targets = |round: Result<Round, CommandError>| match round {
            Ok(Round::Again(requests)) => requests.iter().map(|request| request.target).collect::<Vec<_>>(),
            other => panic!("{other:?}"),
        };
        let idle = packed(|reply| reply.map(0));
        let first = targets(backup.next(context, vec![idle.clone(), idle]));
        assert_eq!((first.len(), targets(backup.again(context, &[None]))), (1, first));
        let others = targets(backup.next(context, vec![ok.clone()]));
        assert_eq!((others.len(), targets(backup.again(context, &[None]))), (1, others));
        assert_eq!(targets(backup.again(context, &[Some(ok)])), []);
        assert!(matches!(backup.next(context, Vec::new()), Ok(Round::Done)));
    }

    #[test]
    fn the_first_store_decides() {
        let mut stores = Stores { refusing: Some("ERR Background save already in progress"), ..Stores::default() };
        assert_eq!(stores.run("BGSAVE"), "-ERR Background save already in progress");
        assert_eq!(stores.asked.len(), 1);
    }

    #[test]
    fn the_last_save_is_the_last_that_every_store_has() {
        let mut stores = Stores::default();
        stores.run("BGSAVE");
        let shards: Vec<ShardKey> = stores.asked.iter().map(|(shard, _)| *shard).collect();
        stores.last_done_s = [(shards[0], 200), (shards[1], 100)].into();
        assert_eq!(stores.run("LASTSAVE"), "100");
        stores.last_done_s = [(shards[0], 200)].into();
        assert_eq!(stores.run("LASTSAVE"), "0");
    }
}
