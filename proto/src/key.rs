//! How keys lie on disk: the slot first, so that one slot is one contiguous range.
//!
//! ```text
//! column family keys       [slot u16 BE][user key]
//! column family elements   [slot u16 BE][length of user key u32 BE][user key][version 20 bytes][element key]
//! ```

use crate::row::Stamp;
use crate::slot::slot_of;

/// Bytes of the slot before each user key.
pub const SLOT_BYTES: usize = 2;

/// Appends the physical key of a user key.
pub fn encode_key_into(out: &mut Vec<u8>, user_key: &[u8]) {
    encode_key_of_slot_into(out, slot_of(user_key), user_key);
}

/// Appends the physical key of a user key whose slot is known.
pub fn encode_key_of_slot_into(out: &mut Vec<u8>, slot: u16, user_key: &[u8]) {
    out.extend_from_slice(&slot.to_be_bytes());
    out.extend_from_slice(user_key);
}

/// Splits a physical key into slot and user key; `None` if it is too short to be one.
pub fn decode_key(physical: &[u8]) -> Option<(u16, &[u8])> {
    let (slot, user_key) = physical.split_first_chunk::<SLOT_BYTES>()?;
    Some((u16::from_be_bytes(*slot), user_key))
}

/// Appends the prefix that all element rows of one version of a collection share.
pub fn encode_element_prefix_into(out: &mut Vec<u8>, user_key: &[u8], version: &Stamp) {
    let length = u32::try_from(user_key.len()).expect("a key is shorter than 512 MB");
    out.extend_from_slice(&slot_of(user_key).to_be_bytes());
    out.extend_from_slice(&length.to_be_bytes());
    out.extend_from_slice(user_key);
    out.extend_from_slice(&version.to_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_round_trips() {
        let mut out = Vec::new();
        encode_key_into(&mut out, b"foo");
        assert_eq!(out, [0x2f, 0x96, b'f', b'o', b'o']);
        assert_eq!(decode_key(&out), Some((12182, b"foo".as_slice())));
        assert_eq!(decode_key(b"x"), None);
    }

    #[test]
    fn element_keys_of_different_collections_never_share_a_prefix() {
        let stamp = Stamp { ns: 1, origin: 2, sequence: 3 };
        let (mut a, mut b) = (Vec::new(), Vec::new());
        encode_element_prefix_into(&mut a, b"{t}k", &stamp);
        encode_element_prefix_into(&mut b, b"{t}k\0", &stamp);
        assert!(!b.starts_with(&a) && !a.starts_with(&b));
    }
}
