//! Seeds of random tests: printed, so that a failure can be repeated with `VASTO_SEED`.

use std::str::FromStr;

/// The generator of one random test and the seed that repeats it.
pub struct Seeded {
    pub seed: u64,
    pub random: fastrand::Rng,
}

/// Takes `VASTO_SEED`, or a new seed, and prints it.
pub fn seeded(test: &str) -> Seeded {
    let seed = number_from_environment("VASTO_SEED").unwrap_or_else(|| fastrand::u64(..1 << 32));
    eprintln!("{test}: VASTO_SEED={seed}");
    Seeded { seed, random: fastrand::Rng::with_seed(seed) }
}

/// A number from the environment; a value that is none is an error of the caller, said at once.
pub fn number_from_environment<N: FromStr>(name: &str) -> Option<N> {
    let text = std::env::var(name).ok()?;
    match text.trim().parse() {
        Ok(number) => Some(number),
        Err(_) => panic!("{name}={text} is not a number"),
    }
}
