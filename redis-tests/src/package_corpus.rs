//! Real texts to store: the package records that apt knows, or records made up alike where there is no apt.

use std::collections::BTreeMap;
use std::process::Command;

/// At most `count` packages, name to record; of several records of one name the last one counts.
pub fn packages(count: usize) -> BTreeMap<String, Vec<u8>> {
    let mut packages = from_apt();
    while packages.len() > count {
        packages.pop_last();
    }
    let mut number = 0;
    while packages.len() < count {
        packages.insert(format!("made-up-{number}"), made_up(number));
        number += 1;
    }
    packages
}

fn from_apt() -> BTreeMap<String, Vec<u8>> {
    let Ok(output) = Command::new("apt-cache").arg("dumpavail").output() else {
        return BTreeMap::new();
    };
    let text = output.stdout;
    let mut packages = BTreeMap::new();
    let mut start = 0;
    while start < text.len() {
        let rest = &text[start..];
        let length = rest.windows(2).position(|pair| pair == b"\n\n");
        let record = &rest[..length.map_or(rest.len(), |length| length + 1)];
        if let Some(name) = package_name(record) {
            packages.insert(name, record.to_vec());
        }
        start += record.len() + 1;
    }
    packages
}

fn package_name(record: &[u8]) -> Option<String> {
    let name = record.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(b"Package: "))?;
    String::from_utf8(name.to_vec()).ok()
}

fn made_up(number: usize) -> Vec<u8> {
    let mut record = format!("Package: made-up-{number}\nDescription: stands for a package\n").into_bytes();
    for line in 0..number % 97 {
        record.extend_from_slice(format!(" line {line} of record {number} \u{e9}\u{20ac}\n").as_bytes());
    }
    record
}

#[cfg(test)]
mod tests {
    #[test]
    fn there_are_as_many_packages_as_asked_for() {
        let packages = super::packages(500);
        assert_eq!(packages.len(), 500);
        for (name, record) in packages {
            let first = record.split(|byte| *byte == b'\n').next().map(<[u8]>::to_vec);
            assert_eq!(first, Some(format!("Package: {name}").into_bytes()));
        }
    }
}
