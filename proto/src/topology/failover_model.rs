//! The failover of one shard, every course of it within bounds: record, terms, leases, copies and their positions.
//!
//! Two models, since one of both has too many states:
//!
//! - `leases`: terms, votes, changes of the record, leases. Any store may be named primary. Shows that chosen versions of the record are one
//!   line, that no two stores have a lease at once, and that no answer leaves after one of a later primary. It knows nothing of data.
//! - `copies`: writes, logs, eras, vacancies, planned changes, removed replicas, returns. Takes from `leases` what it shows, and that a lease
//!   is given only under the newest chosen record; it may run out at any time. Shows that what a client was told, by an acknowledgement or a
//!   read, is in every store that serves from then on (so reads are never stale and show nothing that is gone later), and that no copy has a gap.
//!
//! Both say which way they are too generous. Each thing that the protocol does is taken out once, and the model must miss it.
//! `VASTO_MODEL=wide` looks at larger bounds: minutes, and up to 4 GB.

use std::fmt::Debug;
use std::hash::Hash;

use stateright::{Checker, HasDiscoveries, Model};

mod copies;
mod leases;

/// The bounds that are asked for.
pub(super) fn bounds<B>(narrow: B, wide: B) -> B {
    match std::env::var("VASTO_MODEL") {
        Ok(asked) if asked == "wide" => wide,
        Ok(asked) => panic!("VASTO_MODEL is {asked:?}: it may be \"wide\" or left out"),
        Err(_) => narrow,
    }
}

/// Looks at all states.
pub(super) fn check<M>(model: M)
where
    M: Model + Debug + Clone + Send + Sync + 'static,
    M::State: Clone + Debug + Hash + PartialEq + Send + Sync,
    M::Action: Clone + Debug + PartialEq + Send + Sync,
{
    let checker = model.clone().checker().spawn_bfs().join();
    eprintln!("{model:?}: {} states", checker.unique_state_count());
    checker.assert_properties();
}

/// Looks for the shortest way to a state in which one of the properties does not hold.
pub(super) fn refute<M>(model: M, properties: &[&'static str])
where
    M: Model + Debug + Clone + Send + Sync + 'static,
    M::State: Clone + Debug + Hash + PartialEq + Send + Sync,
    M::Action: Clone + Debug + PartialEq + Send + Sync,
{
    let found = HasDiscoveries::AnyOf(properties.iter().copied().collect());
    let checker = model.clone().checker().finish_when(found).spawn_bfs().join();
    let path = properties.iter().find_map(|name| checker.discovery(name));
    let steps = path.unwrap_or_else(|| panic!("{model:?}: nothing goes wrong")).into_actions();
    eprintln!("{model:?}: {} steps: {steps:?}", steps.len());
}
