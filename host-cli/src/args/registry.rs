//! The options of the commands that ask registries.

use clap::Args;

#[derive(Debug, Args)]
pub(crate) struct PullArgs {
    /// NAME[:TAG|@DIGEST]
    #[arg(value_name = "NAME")]
    pub(crate) image: String,
    /// All tags of the repository
    #[arg(short, long)]
    pub(crate) all_tags: bool,
    /// For this platform, for example linux/arm64, instead of this computer's
    #[arg(long)]
    pub(crate) platform: Option<String>,
    /// Print nothing but the name
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

#[derive(Debug, Args)]
pub(crate) struct PushArgs {
    /// NAME[:TAG]
    #[arg(value_name = "NAME")]
    pub(crate) image: String,
    /// All tags of the repository
    #[arg(short, long)]
    pub(crate) all_tags: bool,
    /// Print nothing but the name
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

#[derive(Debug, Args)]
pub(crate) struct LoginArgs {
    /// The registry; without it, Docker Hub
    pub(crate) server: Option<String>,
    /// User name
    #[arg(short, long)]
    pub(crate) username: Option<String>,
    /// Password
    #[arg(short, long, conflicts_with = "password_stdin")]
    pub(crate) password: Option<String>,
    /// Read the password from standard input
    #[arg(long)]
    pub(crate) password_stdin: bool,
}

#[derive(Debug, Args)]
pub(crate) struct LogoutArgs {
    /// The registry; without it, Docker Hub
    pub(crate) server: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct SearchArgs {
    /// What to look for; HOST/TERM asks another registry than Docker Hub
    pub(crate) term: String,
    /// Only those that match: is-official=true, stars=3
    #[arg(short, long, value_name = "KEY=VALUE")]
    pub(crate) filter: Vec<String>,
    /// At most so many
    #[arg(long, default_value_t = 25)]
    pub(crate) limit: u32,
    /// Do not cut descriptions
    #[arg(long)]
    pub(crate) no_trunc: bool,
}
