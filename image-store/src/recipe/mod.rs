//! A layer's tar stream, byte for byte, from its EROFS image: the recipe keeps what the image does not (headers as they
//! came, padding, ignored entries), compressed, and says where in the image each file's data lies.
//!
//! A recipe is made while the layer is converted and is written in one pass. It consists of two zstd frames between a
//! mark and a trailer: the steps, in the stream's order, and the places of the files' ends that stand behind inodes,
//! which are known only when the image is laid out. Reading it back needs memory for two zstd windows; the stream is
//! hashed on the way, and a stream that is not the layer's ends in an error. A recipe takes some
//! 23 bytes per entry as measured with 50,000 small files (0.4 % of their image), next to nothing for large ones.

mod read;
mod write;

pub use read::LayerTar;
pub(crate) use write::{RecipeStats, RecipeWriter, Tail};

/// First and last bytes of a recipe.
const MARK: [u8; 8] = *b"cortar\x00\x01";
/// Length of the first frame, length of the tar stream, mark.
const TRAILER: usize = 24;
/// More than this is not kept in one step.
const MAX_LITERAL: usize = 64 * 1024;

/// What a step's number says in its two lowest bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// So many bytes follow in the recipe.
    Literal = 0,
    /// So many bytes stand in the image; a number follows that says how far from where they were expected.
    Data = 1,
    /// So many bytes are the next of the ends that the second frame lists.
    Tail = 2,
}

/// Signed numbers with small ones first.
fn zigzag(number: i64) -> u64 {
    ((number << 1) ^ (number >> 63)) as u64
}

fn unzigzag(number: u64) -> i64 {
    (number >> 1) as i64 ^ -((number & 1) as i64)
}

/// Where the data of the next file is expected: after the last one's, at a block.
fn expected_after(end: u64) -> u64 {
    end.checked_next_multiple_of(crate::erofs::BLOCK).unwrap_or(end)
}
