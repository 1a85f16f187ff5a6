//! Which key a command chooses: uniform, zipfian or one after the other.

use std::str::FromStr;

use fastrand::Rng;

/// As YCSB chooses it: the hottest of a million keys gets about 7 % of the commands.
const ZIPF_EXPONENT_DEFAULT: f64 = 0.99;

/// Multiplying by a prime larger than any number of keys in use spreads the hot ranks over the key space, one to one.
const RANK_SPREAD: u128 = 0x9e37_79b9_7f4a_7c55;

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Distribution {
    Uniform,
    Zipfian { exponent: f64 },
    Sequential,
}

impl FromStr for Distribution {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, parameter) = match text.split_once(':') {
            Some((name, parameter)) => (name, Some(parameter)),
            None => (text, None),
        };
        match (name, parameter) {
            ("uniform", None) => Ok(Self::Uniform),
            ("sequential", None) => Ok(Self::Sequential),
            ("zipfian", None) => Ok(Self::Zipfian { exponent: ZIPF_EXPONENT_DEFAULT }),
            ("zipfian", Some(number)) => match number.parse() {
                Ok(exponent) if (0.01..=10.0).contains(&exponent) => Ok(Self::Zipfian { exponent }),
                Ok(_) | Err(_) => Err("the exponent must lie between 0.01 and 10".into()),
            },
            _ => Err("expected uniform, zipfian, zipfian:EXPONENT or sequential".into()),
        }
    }
}

impl std::fmt::Display for Distribution {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Uniform => formatter.write_str("uniform"),
            Self::Zipfian { exponent } => write!(formatter, "zipfian:{exponent}"),
            Self::Sequential => formatter.write_str("sequential"),
        }
    }
}

/// Draws numbers below a fixed count.
#[derive(Clone, Debug)]
pub enum Chooser {
    Uniform { count: u64 },
    Zipfian(Zipf),
    Sequential { count: u64, next: u64 },
}

impl Chooser {
    pub fn new(distribution: Distribution, count: u64) -> Self {
        assert!(count > 0, "there is at least one key");
        match distribution {
            Distribution::Uniform => Self::Uniform { count },
            Distribution::Zipfian { exponent } => Self::Zipfian(Zipf::new(count, exponent)),
            Distribution::Sequential => Self::Sequential { count, next: 0 },
        }
    }

    pub fn choose(&mut self, random: &mut Rng) -> u64 {
        match self {
            Self::Uniform { count } => random.u64(0..*count),
            Self::Zipfian(zipf) => {
                let rank = zipf.rank(random);
                (u128::from(rank) * RANK_SPREAD % u128::from(zipf.count)) as u64
            }
            Self::Sequential { count, next } => {
                let chosen = *next;
                *next = if chosen + 1 == *count { 0 } else { chosen + 1 };
                chosen
            }
        }
    }
}

/// Zipf's law by rejection-inversion (Hörmann and Derflinger 1996): exact, no table, about 40 ns a draw.
///
/// The sum of the weights `k^-e` lies under the integral of `x^-e` shifted by a half; a point under that curve is drawn
/// by inverting the integral and is rejected (rarely) where the curve stands above the step of its rank.
#[derive(Clone, Debug)]
pub struct Zipf {
    count: u64,
    exponent: f64,
    integral_first: f64,
    integral_last: f64,
    accepted_at_once: f64,
}

impl Zipf {
    fn new(count: u64, exponent: f64) -> Self {
        let integral_first = integral(1.5, exponent) - 1.0;
        let integral_last = integral(count as f64 + 0.5, exponent);
        let accepted_at_once = 2.0 - inverse_integral(integral(2.5, exponent) - 2f64.powf(-exponent), exponent);
        Self { count, exponent, integral_first, integral_last, accepted_at_once }
    }

    /// A rank from 0, the most frequent.
    fn rank(&self, random: &mut Rng) -> u64 {
        loop {
            let area = self.integral_last + random.f64() * (self.integral_first - self.integral_last);
            let point = inverse_integral(area, self.exponent);
            let rank = point.round().clamp(1.0, self.count as f64);
            let accepted = rank - point <= self.accepted_at_once
                || area >= integral(rank + 0.5, self.exponent) - rank.powf(-self.exponent);
            if accepted {
                return rank as u64 - 1;
            }
        }
    }
}

/// The integral of `t^-e` from 1 to `x`.
fn integral(x: f64, exponent: f64) -> f64 {
    let log = x.ln();
    let scaled = (1.0 - exponent) * log;
    // Near an exponent of 1 both sides of the quotient vanish; the limit is the logarithm.
    if scaled.abs() < 1e-8 { log * (1.0 + scaled / 2.0) } else { scaled.exp_m1() / scaled * log }
}

fn inverse_integral(area: f64, exponent: f64) -> f64 {
    let scaled = (area * (1.0 - exponent)).max(-1.0);
    if scaled.abs() < 1e-8 { (area * (1.0 - scaled / 2.0)).exp() } else { (scaled.ln_1p() / scaled * area).exp() }
}

#[cfg(test)]
mod tests {

    use super::*;

    fn frequencies(distribution: &str, count: u64, draws: u64) -> Vec<u64> {
        let mut chooser = Chooser::new(distribution.parse().unwrap(), count);
        let mut random = Rng::with_seed(7);
        let mut frequencies = vec![0; count as usize];
        for _ in 0..draws {
            frequencies[chooser.choose(&mut random) as usize] += 1;
        }
        frequencies
    }

    #[test]
    fn uniform_reaches_all_keys_about_equally() {
        for frequency in frequencies("uniform", 100, 100_000) {
            assert!((800..1200).contains(&frequency), "{frequency}");
        }
    }

    #[test]
    fn sequential_visits_each_key_once_per_round() {
        assert_eq!(frequencies("sequential", 10, 20), [2; 10]);
    }

    #[test]
    fn zipfian_follows_its_law() {
        for exponent in [0.5, 0.99, 1.0, 1.0 + 1e-9, 2.0] {
            let (count, draws) = (50, 200_000);
            let mut seen = frequencies(&format!("zipfian:{exponent}"), count, draws);
            seen.sort_unstable_by(|a, b| b.cmp(a));
            let weight = |rank: u64| (rank as f64).powf(-exponent);
            let sum: f64 = (1..=count).map(weight).sum();
            for rank in [1, 2, 3, 10, 30] {
                let expected = draws as f64 * weight(rank) / sum;
                let found = seen[rank as usize - 1] as f64;
                let tolerance = expected * 0.05 + 5.0 * expected.sqrt();
                assert!((found - expected).abs() < tolerance, "exponent {exponent} rank {rank}: {found} of {expected}");
            }
        }
    }

    #[test]
    fn zipfian_ranks_are_spread_one_to_one() {
        for count in [1u64, 2, 1000, 4096] {
            let mut keys: Vec<u64> =
                (0..count).map(|rank| (u128::from(rank) * RANK_SPREAD % u128::from(count)) as u64).collect();
            keys.sort_unstable();
            assert_eq!(keys, (0..count).collect::<Vec<_>>());
        }
    }

    #[test]
    fn names_are_read_and_written_alike() {
        for name in ["uniform", "sequential", "zipfian:0.99", "zipfian:1.2"] {
            assert_eq!(name.parse::<Distribution>().unwrap().to_string(), name);
        }
        assert!("zipfian:0".parse::<Distribution>().is_err());
        assert!("zipfian:NaN".parse::<Distribution>().is_err());
    }
}
