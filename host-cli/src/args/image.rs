//! Commands on images.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::registry::{PullArgs, PushArgs};

/// Commands on images, as `docker image` groups them.
#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// Get an image from a registry
    Pull(PullArgs),
    /// Send an image to a registry
    Push(PushArgs),
    /// List images
    #[command(name = "ls", alias = "list")]
    List(ImagesArgs),
    /// Show how an image came to be
    History(HistoryArgs),
    /// Make an image of a file system's tar stream
    Import(ImportArgs),
    /// Load images from a tar archive or from standard input
    Load(LoadArgs),
    /// Remove images that nothing uses
    Prune(PruneArgs),
    /// Remove images
    Rm(RmiArgs),
    /// Write images as a tar archive to a file or to standard output
    Save(SaveArgs),
    /// Give an image a further name
    Tag(TagArgs),
}

#[derive(Debug, Args)]
pub(crate) struct LoadArgs {
    /// Read from this file instead of standard input
    #[arg(short, long)]
    pub(crate) input: Option<PathBuf>,
    /// Print nothing but errors and the images' names
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

#[derive(Debug, Args)]
pub(crate) struct SaveArgs {
    /// Write to this file instead of standard output
    #[arg(short, long)]
    pub(crate) output: Option<PathBuf>,
    /// Names or ids
    #[arg(required = true, value_name = "IMAGE")]
    pub(crate) images: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct ImportArgs {
    /// A tar archive (plain, gzip or zstd), or - for standard input
    pub(crate) file: String,
    /// The image's name
    pub(crate) name: Option<String>,
    /// Apply a Dockerfile instruction to the image, for example 'CMD ["sh"]'
    #[arg(short, long, value_name = "INSTRUCTION")]
    pub(crate) change: Vec<String>,
    /// The remark in the image's history
    #[arg(short, long)]
    pub(crate) message: Option<String>,
    /// The platform that the image is for, if not this machine's
    #[arg(long)]
    pub(crate) platform: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct ImagesArgs {
    /// Only this repository or image
    pub(crate) name: Option<String>,
    /// Show all images (images without a name are always shown)
    #[arg(short, long)]
    pub(crate) all: bool,
    /// Only ids
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Do not cut ids
    #[arg(long)]
    pub(crate) no_trunc: bool,
    /// Show digests
    #[arg(long)]
    pub(crate) digests: bool,
    /// Only those that match: dangling=, label=, before=, since=, until=, reference=
    #[arg(short, long, value_name = "KEY=VALUE")]
    pub(crate) filter: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct HistoryArgs {
    /// The image's name or id
    pub(crate) image: String,
    /// Only ids
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Do not cut ids and commands
    #[arg(long)]
    pub(crate) no_trunc: bool,
}

#[derive(Debug, Args)]
pub(crate) struct PruneArgs {
    /// Also images with names
    #[arg(short, long)]
    pub(crate) all: bool,
    /// Do not ask
    #[arg(short, long)]
    pub(crate) force: bool,
    /// Only those that match: until=, label=, label!=
    #[arg(long, value_name = "KEY=VALUE")]
    pub(crate) filter: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct RmiArgs {
    /// Names or ids
    #[arg(required = true, value_name = "IMAGE")]
    pub(crate) images: Vec<String>,
    /// Also if it has several names or stopped containers use it
    #[arg(short, long)]
    pub(crate) force: bool,
}

#[derive(Debug, Args)]
pub(crate) struct TagArgs {
    /// The image's name or id
    pub(crate) image: String,
    /// The further name
    pub(crate) name: String,
}
