//! The file that remembers where the other stores are and who holds the records, so that a store gets along without a master.

use crate::node::OpenError;
use crate::sealed;
use prost::Message;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;
use tokio::sync::watch;
use vasto_proto::pb;
use vasto_proto::topology::Peers;

const FILE: &str = "peers";

/// What the file says, for all who follow it.
pub struct PeerFile {
    latest: watch::Sender<Arc<Peers>>,
}

impl PeerFile {
    /// Nothing is known yet if there is no file.
    pub fn load(folder: &Path) -> Result<Self, OpenError> {
        let path = folder.join(FILE);
        let peers = match fs::read(&path) {
            Ok(content) => decode(&content).map_err(|reason| OpenError::Damaged { path, reason })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Peers::default(),
            Err(source) => return Err(OpenError::Io { path, source }),
        };
        Ok(Self { latest: watch::Sender::new(Arc::new(peers)) })
    }

    pub fn latest(&self) -> watch::Receiver<Arc<Peers>> {
        self.latest.subscribe()
    }

    /// Keeps it on the disk first.
    pub fn set(&self, folder: &Path, peers: Peers) -> io::Result<()> {
        if **self.latest.borrow() == peers {
            return Ok(());
        }
        sealed::save(folder, FILE, &pb::Peers::from(&peers))?;
        self.latest.send_replace(Arc::new(peers));
        Ok(())
    }
}

fn decode(content: &[u8]) -> Result<Peers, String> {
    pb::Peers::decode(sealed::unseal(content)?).map(Peers::from).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vasto_proto::id::StoreId;
    use vasto_proto::topology::HolderGroup;

    #[test]
    fn peers_are_there_at_the_next_start_and_damage_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let file = PeerFile::load(folder.path()).unwrap();
        assert_eq!(**file.latest().borrow(), Peers::default());
        let peers = Peers {
            addresses: [(StoreId(7), "seven:7".to_owned())].into(),
            group: HolderGroup { version: 1, members: [StoreId(7)].into() },
        };
        let followed = file.latest();
        file.set(folder.path(), peers.clone()).unwrap();
        assert_eq!(**followed.borrow(), peers);
        assert_eq!(**PeerFile::load(folder.path()).unwrap().latest().borrow(), peers);
        let path = folder.path().join(FILE);
        let mut content = fs::read(&path).unwrap();
        *content.last_mut().unwrap() ^= 1;
        fs::write(&path, content).unwrap();
        assert!(matches!(PeerFile::load(folder.path()), Err(OpenError::Damaged { .. })));
    }
}
