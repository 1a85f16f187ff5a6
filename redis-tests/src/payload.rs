//! Seals bytes as DUMP payloads, right or mutilated ones alike.
//!
//! Written apart from the code under test on purpose: a mistake there must not be repeated here.

/// The reversed polynomial of Redis's CRC-64.
const POLYNOMIAL: u64 = 0x95ac_9329_ac4b_c9b5;

fn checksum(bytes: &[u8]) -> u64 {
    let step = |sum: u64| if sum & 1 == 1 { (sum >> 1) ^ POLYNOMIAL } else { sum >> 1 };
    bytes.iter().fold(0, |sum, byte| (0..8).fold(sum ^ u64::from(*byte), |sum, _| step(sum)))
}

/// Type byte and value, followed by a version and the checksum that is right for all of it.
pub fn sealed(body: &[u8], version: u16) -> Vec<u8> {
    let mut payload = [body, &version.to_le_bytes()].concat();
    let sum = checksum(&payload);
    payload.extend(sum.to_le_bytes());
    payload
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redis_server_takes_it() {
        let redis = crate::RedisServer::start();
        let mut connection = redis.connect();
        connection.done(&[&b"RESTORE"[..], b"k", b"0", &sealed(b"\0\x03abc", 10)]);
        assert_eq!(connection.call(&["GET", "k"]), crate::Value::bulk("abc"));
    }
}
