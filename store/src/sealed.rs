//! Small files of messages with a checksum in front: after a crash they have either their old or their new content, and damage is found.

use prost::Message;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

/// Writes a message into a file.
pub fn save(folder: &Path, name: &str, message: &impl Message) -> io::Result<()> {
    let message = message.encode_to_vec();
    let mut content = checksum(&message).to_be_bytes().to_vec();
    content.extend_from_slice(&message);
    replace_file(folder, name, &content)
}

/// The message in the content of such a file, or what is wrong with it.
pub fn unseal(content: &[u8]) -> Result<&[u8], String> {
    let (sum, message) = content.split_first_chunk::<8>().ok_or("it is too short")?;
    if u64::from_be_bytes(*sum) != checksum(message) {
        return Err("its checksum is wrong".to_owned());
    }
    Ok(message)
}

/// Writes a file so that after a crash it has either its old or its new content.
pub fn replace_file(folder: &Path, name: &str, content: &[u8]) -> io::Result<()> {
    let new = folder.join(format!("{name}.new"));
    let mut file = File::create(&new)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&new, folder.join(name))?;
    File::open(folder)?.sync_all()
}

/// FNV-1a: finds a torn or flipped file, not an attacker.
pub fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}
