//! Cutting the byte stream of an OCS connection into messages.

/// The byte that ends a message: ASCII end of transmission. It has no escape.
pub const EOT: u8 = 0x04;

/// What OCS sends to show that it is there. It is not a message.
const HEARTBEAT: &[u8] = b"HEARTBEAT";

/// One frame of the stream, without its end byte.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// An OCS message: text in practice, any bytes in principle.
    Message(Vec<u8>),
    /// The sender is alive.
    Heartbeat,
    /// Two end bytes in a row.
    Empty,
    /// A message longer than the limit. What follows its end byte is framed as usual.
    Oversized {
        /// Its first bytes, as many as the limit allows.
        head: Vec<u8>,
        /// How long it was.
        length_bytes: u64,
    },
}

/// Cuts bytes into frames, however the network split or joined them.
///
/// It holds at most one unfinished message, and of that no more than the size limit.
#[derive(Debug)]
pub struct Framer {
    limit_bytes: usize,
    unfinished: Vec<u8>,
    /// Length of the unfinished message, beyond the limit too.
    length_bytes: u64,
}

impl Framer {
    /// A framer for messages of at most `limit_bytes` without the end byte.
    pub fn new(limit_bytes: usize) -> Self {
        Self { limit_bytes, unfinished: Vec::new(), length_bytes: 0 }
    }

    /// Takes what one read returned and gives the frames that it completes.
    pub fn push(&mut self, mut bytes: &[u8]) -> Vec<Frame> {
        let mut frames = Vec::new();
        while let Some(end) = bytes.iter().position(|&byte| byte == EOT) {
            self.hold(&bytes[..end]);
            frames.push(self.finish());
            bytes = &bytes[end + 1..];
        }
        self.hold(bytes);
        frames
    }

    /// Whether a message has begun that has not ended.
    pub fn is_unfinished(&self) -> bool {
        self.length_bytes > 0
    }

    /// The bytes after the last end byte, when the connection has closed.
    pub fn into_unfinished(self) -> Vec<u8> {
        self.unfinished
    }

    fn hold(&mut self, bytes: &[u8]) {
        let room = self.limit_bytes - self.unfinished.len();
        self.unfinished.extend_from_slice(&bytes[..bytes.len().min(room)]);
        self.length_bytes += bytes.len() as u64;
    }

    fn finish(&mut self) -> Frame {
        let body = std::mem::take(&mut self.unfinished);
        let length_bytes = std::mem::take(&mut self.length_bytes);
        match body.as_slice() {
            _ if length_bytes > body.len() as u64 => Frame::Oversized { head: body, length_bytes },
            [] => Frame::Empty,
            HEARTBEAT => Frame::Heartbeat,
            _ => Frame::Message(body),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(text: &str) -> Frame {
        Frame::Message(text.as_bytes().to_vec())
    }

    #[test]
    fn a_read_may_hold_several_messages_and_part_of_one() {
        let mut framer = Framer::new(64);
        assert_eq!(
            framer.push(b"one\x04two\x04HEARTBEAT\x04\x04thr"),
            vec![message("one"), message("two"), Frame::Heartbeat, Frame::Empty]
        );
        assert_eq!(framer.push(b"ee"), vec![]);
        assert_eq!(framer.push(b"\x04"), vec![message("three")]);
    }

    #[test]
    fn p9_an_oversized_message_is_told_and_the_next_one_is_framed() {
        let mut framer = Framer::new(4);
        assert_eq!(framer.push(b"1234\x04123"), vec![message("1234")]);
        assert_eq!(framer.push(b"45"), vec![]);
        assert_eq!(
            framer.push(b"6\x04ok\x04"),
            vec![Frame::Oversized { head: b"1234".to_vec(), length_bytes: 6 }, message("ok")]
        );
    }

    #[test]
    fn an_endless_message_takes_no_more_memory_than_the_limit() {
        let mut framer = Framer::new(1024);
        for _ in 0..1000 {
            assert_eq!(framer.push(&[b'x'; 1000]), vec![]);
        }
        assert_eq!(framer.into_unfinished().len(), 1024);
    }

    proptest! {
        #[test]
        fn the_frames_do_not_depend_on_how_the_stream_was_split(
            stream in prop::collection::vec(
                prop_oneof![3 => any::<u8>(), 1 => Just(EOT), 1 => prop::sample::select(b"HEARTBEAT".to_vec())],
                0..300,
            ),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
            limit in 1usize..40,
        ) {
            let whole = Framer::new(limit).push(&stream);

            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(stream.len() + 1)).collect();
            cuts.extend([0, stream.len()]);
            cuts.sort_unstable();
            let mut framer = Framer::new(limit);
            let split: Vec<Frame> =
                cuts.windows(2).flat_map(|cut| framer.push(&stream[cut[0]..cut[1]])).collect();

            prop_assert_eq!(split, whole);
        }
    }
}
