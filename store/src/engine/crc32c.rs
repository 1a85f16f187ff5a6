//! CRC-32C, the checksum of Castagnoli, as RocksDB stores it in logs and manifests; and whether one flipped bit explains a wrong one.

/// RocksDB stores checksums so, since a checksum of data with checksums in them would be weak.
pub fn mask(sum: u32) -> u32 {
    sum.rotate_right(15).wrapping_add(MASK_DELTA)
}

fn unmask(stored: u32) -> u32 {
    stored.wrapping_sub(MASK_DELTA).rotate_left(15)
}

const MASK_DELTA: u32 = 0xa282_ead8;

/// Tables for eight bytes at a time: about 2 GB/s, so that a log of 256 MiB costs a restart an eighth of a second.
static CRC_TABLES: [[u32; 256]; 8] = crc_tables();

const fn crc_tables() -> [[u32; 256]; 8] {
    // The polynomial of Castagnoli, bits reversed.
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    let mut tables = [[0; 256]; 8];
    let mut byte = 0;
    while byte < 256 {
        let mut sum = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            sum = if sum & 1 == 1 { sum >> 1 ^ POLYNOMIAL } else { sum >> 1 };
            bit += 1;
        }
        tables[0][byte] = sum;
        byte += 1;
    }
    let mut table = 1;
    while table < 8 {
        let mut byte = 0;
        while byte < 256 {
            let before = tables[table - 1][byte];
            tables[table][byte] = before >> 8 ^ tables[0][(before & 0xff) as usize];
            byte += 1;
        }
        table += 1;
    }
    tables
}

/// The CRC-32C of several parts in a row.
pub fn crc32c(parts: &[&[u8]]) -> u32 {
    extend(0, parts)
}

/// The CRC-32C of something with the checksum `sum` and more parts behind it; that of nothing is 0.
pub fn extend(sum: u32, parts: &[&[u8]]) -> u32 {
    let mut sum = !sum;
    for part in parts {
        let (chunks, rest) = part.as_chunks::<8>();
        for chunk in chunks {
            let [a, b, c, d, e, f, g, h] = *chunk;
            let [a, b, c, d] = (u32::from_le_bytes([a, b, c, d]) ^ sum).to_le_bytes();
            let bytes = [h, g, f, e, d, c, b, a];
            sum = (0..8).fold(0, |sum, table| sum ^ CRC_TABLES[table][usize::from(bytes[table])]);
        }
        for byte in rest {
            sum = sum >> 8 ^ CRC_TABLES[0][usize::from(*byte ^ sum as u8)];
        }
    }
    !sum
}

/// Whether one flipped bit, of the bytes or of their stored checksum, is all that is wrong. `sum` is the checksum of the bytes as they
/// are, `length` their number.
pub fn is_one_bit_off(sum: u32, stored: u32, length: usize) -> bool {
    if (mask(sum) ^ stored).count_ones() == 1 {
        return true;
    }
    let difference = sum ^ unmask(stored);
    // What a flip of each bit of the last byte does to the sum, then of the byte before it, and so on: no two bits of a block
    // do the same.
    let mut effects: [u32; 8] = std::array::from_fn(|bit| CRC_TABLES[0][1 << bit]);
    (0..length).any(|_| {
        let explains = effects.contains(&difference);
        for effect in &mut effects {
            *effect = *effect >> 8 ^ CRC_TABLES[0][(*effect & 0xff) as usize];
        }
        explains
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_that_of_castagnoli() {
        assert_eq!(crc32c(&[b"123456789"]), 0xe306_9283);
        assert_eq!(crc32c(&[b"1", b"23456789"]), 0xe306_9283);
        assert_eq!(crc32c(&[&[0; 32]]), 0x8a91_36aa);
        assert_eq!(crc32c(&[]), 0);
    }

    #[test]
    fn one_flipped_bit_is_told_from_more() {
        let whole: Vec<u8> = (0..300_u32).map(|byte| (byte * 7) as u8).collect();
        let stored = mask(crc32c(&[&whole]));
        assert_eq!(unmask(stored), crc32c(&[&whole]));
        let is_off = |bytes: &[u8], stored| is_one_bit_off(crc32c(&[bytes]), stored, bytes.len());
        assert!(!is_off(&whole, stored), "nothing is wrong");
        for bit in 0..whole.len() * 8 {
            let mut flipped = whole.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(is_off(&flipped, stored), "bit {bit}");
            let other = (bit * 31 + 1) % (whole.len() * 8);
            if other != bit {
                flipped[other / 8] ^= 1 << (other % 8);
                assert!(!is_off(&flipped, stored), "bits {bit} and {other}");
            }
        }
        for bit in 0..32 {
            assert!(is_off(&whole, stored ^ 1 << bit), "bit {bit} of the checksum");
        }
        let mut torn = whole.clone();
        torn[200..].fill(0);
        assert!(!is_off(&torn, stored));
    }
}
