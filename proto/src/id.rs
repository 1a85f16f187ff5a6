//! Newtypes for the numbers that could be mixed up.

use std::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty), $format:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(formatter, $format, self.0)
            }
        }
    };
}

id!(
    /// A keyspace; never reused within a cluster.
    KeyspaceId(u32),
    "{}"
);
id!(
    /// A shard number within its keyspace, 0 based.
    ShardId(u16),
    "{}"
);
id!(
    /// A store; drawn at random at its first start and kept in its data folder. Printed as 8 hexadecimal digits.
    StoreId(u32),
    "{:08x}"
);
id!(
    /// A cluster; drawn at bootstrap. 0 = none yet. Printed as 16 hexadecimal digits.
    ClusterId(u64),
    "{:016x}"
);
id!(
    /// The version of a keyspace's record or of one of its shards; grows with each change.
    Epoch(u64),
    "{}"
);

/// Names one shard of one keyspace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ShardKey {
    pub keyspace: KeyspaceId,
    pub shard: ShardId,
}

impl fmt::Display for ShardKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.keyspace, self.shard)
    }
}
