//! What can be asked for with a keyspace as a whole, why it is refused, and what it is called.

use std::fmt;

use thiserror::Error;
use vasto_proto::id::StoreId;
use vasto_proto::topology::{KeyspaceRecord, Operation, OperationKind, Phase};

use crate::state::StoreList;

/// An operation that is to begin or to end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OperationWish {
    /// To another number of shards.
    Resize { name: String, shards: u32 },
    /// The copies of one store are to go to another, or to whichever are best.
    Replace { name: String, store: StoreId, with: Option<StoreId> },
    /// What goes on is to end as if it had not begun.
    Abort { name: String },
}

impl OperationWish {
    pub fn name(&self) -> &str {
        match self {
            Self::Resize { name, .. } | Self::Replace { name, .. } | Self::Abort { name } => name,
        }
    }
}

/// Why an operation does not begin or end, whatever its kind. Nothing was changed.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum OperationError {
    #[error("keyspace {name} is being {doing}; nothing was changed")]
    Busy { name: String, doing: Doing },
    #[error("stores {0} run an older version that knows nothing of resizing; nothing was changed")]
    StoresOlder(StoreList),
    #[error("nothing is being done with keyspace {name} that could be aborted; nothing was changed")]
    Nothing { name: String },
    #[error(
        "keyspace {name} is being {doing}, and that is past the point where it can be aborted: it goes on to its end; nothing was changed"
    )]
    TooLate { name: String, doing: Doing },
}

/// An operation in words: what is being done with a keyspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Doing {
    kind: OperationKind,
    phase: Phase,
}

impl From<&Operation> for Doing {
    fn from(operation: &Operation) -> Self {
        Self { kind: operation.kind, phase: operation.phase }
    }
}

impl fmt::Display for Doing {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let phase = self.phase.word();
        match self.kind {
            OperationKind::Resize { from, to } => {
                write!(formatter, "resized from {from} to {to} shards (phase {phase})")
            }
            OperationKind::Replace { store, with: Some(with) } => {
                write!(formatter, "moved from store {store} to store {with}")
            }
            OperationKind::Replace { store, with: None } => write!(formatter, "moved away from store {store}"),
        }
    }
}

/// Refused while an operation goes on: what it builds on would change under it.
pub fn require_none(record: &KeyspaceRecord) -> Result<(), OperationError> {
    match record.active_operation() {
        Some(operation) => Err(OperationError::Busy { name: record.name.clone(), doing: operation.into() }),
        None => Ok(()),
    }
}

/// The version of the record that ends its operation because somebody wants that.
pub fn abort(record: &KeyspaceRecord) -> Result<KeyspaceRecord, OperationError> {
    let name = record.name.clone();
    let Some(operation) = record.active_operation() else { return Err(OperationError::Nothing { name }) };
    let reason = match operation.kind {
        OperationKind::Resize { .. } => "it was asked for",
        OperationKind::Replace { .. } => "it was asked for; copies that have changed places stay where they are",
    };
    record.abort(reason).map_err(|_| OperationError::TooLate { name, doing: operation.into() })
}
