//! EROFS images of layers: the format, a writer that makes an image in one pass over a tar stream, and a reader. The
//! images are uncompressed, with 4096-byte blocks, so that every Linux since 5.4 mounts them; equal layers give equal
//! bytes. Files of equal content share their blocks, and short files stand behind their inodes.
//!
//! Memory: what a layer's tree needs, some 200 bytes per entry besides its name, link target and attributes, 1 GiB at
//! most (about five million entries, then the layer is refused); and a few megabytes whatever else the layer holds.
//! Nothing in here needs Linux or root.

pub(crate) mod convert;
mod dirs;
pub(crate) mod format;
mod path;
pub mod reader;
mod spool;
mod tree;
mod writer;
mod xattr;

pub use convert::ConvertError;
pub(crate) use format::BLOCK;
pub(crate) use path::display as display_path;
pub use writer::ImageOutput;
pub(crate) use writer::MAX_IMAGE;
