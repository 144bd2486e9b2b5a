//! EROFS images of layers: the format, a writer that makes an image in one pass over a tar stream, and a reader. The
//! images are uncompressed, with 4096-byte blocks, so that every Linux since 5.4 mounts them; equal layers give equal
//! bytes. Nothing in here needs Linux or root.

pub(crate) mod convert;
mod dirs;
pub(crate) mod format;
mod path;
pub mod reader;
mod tree;
mod writer;
mod xattr;

pub use convert::ConvertError;
pub(crate) use path::display as display_path;
pub(crate) use writer::MAX_IMAGE;
