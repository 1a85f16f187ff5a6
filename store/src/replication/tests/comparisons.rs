//! Copies that are compared by their digests.

use super::*;
use crate::engine::log_batch::Family;

fn slot_of(physical_key: &[u8]) -> u16 {
    u16::from_be_bytes(*physical_key.first_chunk().unwrap())
}

/// Another value in a row, behind everybody's back.
fn change(shard: &Shard, key: &[u8], row: &[u8]) {
    let mut changed = row.to_vec();
    *changed.last_mut().unwrap() ^= 1;
    let mut writes = shard.database.writes(1, 100);
    writes.put_row(key, &changed);
    shard.database.write(writes, Tier::Disk).unwrap();
}

#[test]
fn copies_are_equal_at_one_place_of_the_log_while_writes_go_on() {
    let cluster = Cluster::new(3, replicated(0));
    let mut client = cluster.client(0);
    client.insist(&["set", "first", "1"]);
    cluster.equal(0);
    let (core, shard) = (Arc::clone(cluster.handle(0).core()), cluster.shard(0).unwrap());
    let comparing = std::thread::spawn(move || {
        let compared = std::iter::repeat_with(|| compare(&core, &shard, Haste::AtOnce).unwrap()).take(30);
        compared.collect::<Vec<_>>()
    });
    let mut number = 0;
    while !comparing.is_finished() {
        number += 1;
        let key = format!("key{}", fastrand::u32(..2000));
        match number % 1000 {
            // Each store drops its dead rows when it likes.
            500 => cluster.shard(number / 1000 % 3).unwrap().database.compact(),
            999 => drop(client.call(&["flushdb"])),
            _ if number % 5 == 0 => drop(client.call(&["del", &key])),
            _ if number % 7 == 0 => drop(client.call(&["set", &key, "expires", "PX", "3"])),
            _ => drop(client.call(&["set", &key, &number.to_string()])),
        }
    }
    let compared = comparing.join().unwrap();
    assert!(compared.iter().all(|compared| compared.slots_differing == 0), "{compared:?}");
    let all = compared.iter().filter(|compared| (compared.copies, compared.text.as_str()) == (2, "")).count();
    assert!(all > 20, "{compared:?}");
    println!("{all} comparisons during {number} writes, of {} rows and more", compared.last().unwrap().rows);
    let (comparisons, differing, repaired) = cluster.handle(0).core().counters.comparisons();
    assert!(comparisons >= 2 * all as u64);
    assert_eq!((differing, repaired), (0, 0));
}

#[test]
fn a_copy_that_differs_is_found_by_its_slots_and_made_anew() {
    let cluster = Cluster::new(2, replicated(0));
    let mut client = cluster.client(0);
    for number in 0..300 {
        client.insist(&["set", &format!("key{number}"), "value"]);
    }
    let before = cluster.equal(0);
    let counted = cluster.handle(0).core().counters.comparisons();
    let copies = cluster.figures(0).full_copies;
    let damaged = cluster.shard(1).unwrap();
    change(&damaged, &before[7].0, &before[7].1);
    let missing = before.iter().find(|(key, _)| slot_of(key) != slot_of(&before[7].0)).unwrap();
    let mut writes = damaged.database.writes(1, 100);
    writes.delete(Family::Keys, &missing.0);
    damaged.database.write(writes, Tier::Disk).unwrap();
    drop(damaged);

    let compared = cluster.compare(0).unwrap();
    let mut slots = [slot_of(&before[7].0), slot_of(&missing.0)];
    slots.sort_unstable();
    let expected = format!("store {} differs in 2 slots: {slots:?}", cluster.ids[1]);
    assert_eq!(compared, Comparison { rows: 300, copies: 1, slots_differing: 2, text: expected });
    // Nothing was written since, and nobody says more.
    eventually("it is made anew", || cluster.handle(0).core().counters.comparisons().2 == 1);
    assert_eq!(cluster.equal(0), before);
    assert_eq!(cluster.figures(0).full_copies, copies + 1);
    let (comparisons, differing, repaired) = cluster.handle(0).core().counters.comparisons();
    assert!(comparisons >= counted.0 + 2);
    assert_eq!((differing, repaired), (2, 1));
    client.call(&["set", "key1", "after"]);
    cluster.equal(0);
    assert_eq!(cluster.figures(0).full_copies, copies + 1, "once is enough");
}

#[test]
fn a_copy_that_differs_is_made_anew_also_if_it_goes_away_before() {
    let mut cluster = Cluster::new(2, replicated(0));
    let mut client = cluster.client(0);
    let value = "v".repeat(100 << 10);
    for number in 0..200 {
        client.insist(&["set", &format!("key{number}"), &value]);
    }
    let before = cluster.equal(0);
    change(&cluster.shard(1).unwrap(), &before[7].0, &before[7].1);
    assert_eq!(cluster.compare(0).unwrap().slots_differing, 1);
    // In the middle of the copy, or after it, before it is opened.
    cluster.kill(1);
    client.call(&["set", "key1", "after"]);
    cluster.start(1);
    assert_eq!(cluster.equal(0).len(), before.len());
    assert_eq!(cluster.handle(0).core().counters.comparisons().2, 1);
}

#[test]
fn a_follower_that_goes_away_in_the_middle_is_no_difference() {
    let mut cluster = Cluster::new(2, replicated(0));
    let mut client = cluster.client(0);
    let value = "v".repeat(100 << 10);
    for number in 0..300 {
        client.insist(&["set", &format!("key{number}"), &value]);
    }
    cluster.equal(0);
    let (core, shard) = (Arc::clone(cluster.handle(0).core()), cluster.shard(0).unwrap());
    let comparing = std::thread::spawn(move || compare(&core, &shard, Haste::InBackground));
    eventually("it is under way", || cluster.shard(0).unwrap().replication.comparing.is_locked());
    assert!(cluster.compare(0).is_err_and(|reason| reason.ends_with("already")));
    cluster.stop(1);
    let compared = comparing.join().unwrap().unwrap();
    let went = format!("store {} was not compared: it went away", cluster.ids[1]);
    assert_eq!(compared, Comparison { rows: 300, copies: 0, slots_differing: 0, text: went });
    let compared = cluster.compare(0).unwrap();
    assert_eq!(compared.text, format!("store {} was not compared: it is not in sync", cluster.ids[1]));
    cluster.start(1);
    cluster.equal(0);
    let refused = compare(cluster.handle(1).core(), &cluster.shard(1).unwrap(), Haste::AtOnce);
    assert_eq!(refused, Err("shard 0/0 is not led here".to_owned()));
}

#[test]
fn copies_are_compared_when_nobody_asks_too() {
    let mut cluster = Cluster::new(2, replicated(0));
    let mut client = cluster.client(0);
    client.insist(&["set", "key", "value"]);
    let before = cluster.equal(0);
    drop(client);
    cluster.stop(0);
    let running = Running::start_with(&cluster.data[0], |config| config.verify_interval = Duration::from_secs(1));
    cluster.running[0] = Some(running);
    cluster.spread();
    let comparisons = |cluster: &Cluster| cluster.handle(0).core().counters.comparisons();
    eventually("they are compared", || comparisons(&cluster).0 >= 2);
    change(&cluster.shard(1).unwrap(), &before[0].0, &before[0].1);
    eventually("it is made anew", || comparisons(&cluster).2 == 1);
    assert_eq!(cluster.equal(0), before);
    assert_eq!(comparisons(&cluster).1, 1);
}
