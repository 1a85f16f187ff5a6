//! Batches in frames: long ones travel in pieces, each on a lane of its own, so that short ones get between.

use bytes::{Bytes, BytesMut};
use std::collections::{HashMap, VecDeque};
use thiserror::Error;
use vasto_proto::net::{FRAME_BYTES_MAX, LARGE_VALUES_IN_FLIGHT};
use vasto_proto::pb::Frame;

/// What unfinished batches may take beside the large values that a gateway may have in flight.
const PARTIAL_BYTES_MAX: usize = 64 << 20;

#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("unfinished batches of this stream take more than {limit} bytes")]
pub struct TooMuchUnfinished {
    limit: usize,
}

/// Puts incoming pieces together.
#[derive(Debug)]
pub struct Assembler {
    partial: HashMap<u32, BytesMut>,
    bytes: usize,
    limit: usize,
}

impl Assembler {
    /// For values up to `value_bytes_max`.
    pub fn new(value_bytes_max: usize) -> Self {
        let limit = LARGE_VALUES_IN_FLIGHT.saturating_mul(value_bytes_max).saturating_add(PARTIAL_BYTES_MAX);
        Self { partial: HashMap::new(), bytes: 0, limit }
    }

    /// Takes a piece; returns the batch that it completes.
    pub fn take(&mut self, frame: Frame) -> Result<Option<Bytes>, TooMuchUnfinished> {
        if !frame.more && (self.partial.is_empty() || !self.partial.contains_key(&frame.lane)) {
            return Ok(Some(frame.packed));
        }
        self.bytes += frame.packed.len();
        if self.bytes > self.limit {
            return Err(TooMuchUnfinished { limit: self.limit });
        }
        let batch = self.partial.entry(frame.lane).or_default();
        batch.extend_from_slice(&frame.packed);
        if frame.more {
            return Ok(None);
        }
        let batch = self.partial.remove(&frame.lane).unwrap_or_default();
        self.bytes -= batch.len();
        Ok(Some(batch.freeze()))
    }
}

/// Answers on their way out.
#[derive(Debug, Default)]
pub struct Outgoing {
    whole: VecDeque<Bytes>,
    /// Lane and what is left of its batch.
    split: VecDeque<(u32, Bytes)>,
    last_lane: u32,
    /// Pieces and whole batches take turns.
    piece_is_next: bool,
}

impl Outgoing {
    pub fn push(&mut self, answers: Bytes) {
        if answers.len() <= FRAME_BYTES_MAX {
            self.whole.push_back(answers);
        } else {
            // Lane 0 is that of whole batches.
            self.last_lane = self.last_lane.checked_add(1).unwrap_or(1);
            self.split.push_back((self.last_lane, answers));
        }
    }

    pub fn pop(&mut self) -> Option<Frame> {
        let piece_first = self.piece_is_next || self.whole.is_empty();
        if piece_first && let Some((lane, mut rest)) = self.split.pop_front() {
            self.piece_is_next = false;
            let packed = rest.split_to(rest.len().min(FRAME_BYTES_MAX));
            let more = !rest.is_empty();
            if more {
                self.split.push_back((lane, rest));
            }
            return Some(Frame { packed, lane, more });
        }
        self.piece_is_next = true;
        self.whole.pop_front().map(|packed| Frame { packed, lane: 0, more: false })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn batches_of_all_sizes_arrive_whole(sizes in prop::collection::vec(prop_oneof![1..100usize, 1..4 * FRAME_BYTES_MAX], 1..6)) {
            let batches: Vec<Bytes> = sizes.iter().enumerate().map(|(index, size)| vec![index as u8; *size].into()).collect();
            let mut outgoing = Outgoing::default();
            batches.iter().for_each(|batch| outgoing.push(batch.clone()));
            let mut assembler = Assembler::new(1 << 20);
            let mut arrived = Vec::new();
            while let Some(frame) = outgoing.pop() {
                prop_assert!(frame.packed.len() <= FRAME_BYTES_MAX);
                arrived.extend(assembler.take(frame).unwrap());
            }
            arrived.sort();
            prop_assert_eq!(arrived, batches);
            prop_assert_eq!(assembler.bytes, 0);
        }
    }

    #[test]
    fn unfinished_batches_are_bounded() {
        let mut assembler = Assembler::new(0);
        let piece = |lane| Frame { packed: vec![0; FRAME_BYTES_MAX].into(), lane, more: true };
        let taken = (1..).map_while(|lane| assembler.take(piece(lane)).ok()).count();
        assert_eq!(taken, PARTIAL_BYTES_MAX / FRAME_BYTES_MAX);
    }
}
