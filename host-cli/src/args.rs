//! The command line: the words and options of Docker's CLI where it has them.

mod container;
mod image;
mod isolation;
mod mount;
mod network;
mod registry;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

pub(crate) use container::{CreateOptions, ExecArgs, PullPolicy, RunArgs, TimingsFormat};
pub(crate) use image::{
    HistoryArgs, ImageCommand, ImagesArgs, ImportArgs, LoadArgs, PruneArgs, RmiArgs, SaveArgs, TagArgs,
};
pub(crate) use mount::{VolumeArgs, VolumeCommand};
pub(crate) use network::{NetworkArgs, NetworkCommand, endpoint};
pub(crate) use registry::{LoginArgs, LogoutArgs, PullArgs, PushArgs, SearchArgs};

/// What the environment can say.
const ENVIRONMENT: &str = "\
Environment:
  CORACLE_HOME       where images, containers and the virtual machine are kept (~/.local/share/coracle)
  CORACLE_LOG        what the daemon logs, for example debug (info)
  CORACLE_TRACE      a file for the timings of `coracle run`, as JSON
  CORACLE_GUEST_DIR  a folder with vmlinux, initramfs.cpio and data.ext4.zst instead of the guest in the executable
  CORACLE_SERIAL     if set, the guest's serial port is written to vms/default/serial.log (and slows it down)

The daemon has the environment of the command that started it.";

/// Linux containers inside a tiny virtual machine.
#[derive(Debug, Parser)]
#[command(
    name = "coracle",
    version,
    after_help = ENVIRONMENT,
    subcommand_required = true,
    arg_required_else_help = true
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start the daemon and make the docker context `coracle`
    Up(UpArgs),
    /// Stop all containers, the virtual machine and the daemon
    Down(DownArgs),
    /// Show what runs
    Status(JsonFlag),
    /// Show the versions of the client and the daemon
    Version(JsonFlag),
    /// Say whether coracle can work here, and what is missing
    Doctor,
    /// Get an image from a registry
    Pull(PullArgs),
    /// Send an image to a registry
    Push(PushArgs),
    /// Log in to a registry
    Login(LoginArgs),
    /// Log out from a registry
    Logout(LogoutArgs),
    /// Search for images in a registry
    Search(SearchArgs),
    /// Load images from a tar archive or from standard input
    Load(LoadArgs),
    /// Write images as a tar archive to a file or to standard output
    Save(SaveArgs),
    /// Make an image of a file system's tar stream
    Import(ImportArgs),
    /// List images
    Images(ImagesArgs),
    /// Show how an image came to be
    History(HistoryArgs),
    /// Work on images
    #[command(subcommand)]
    Image(ImageCommand),
    /// Create and run a container
    Run(Box<RunArgs>),
    /// Create a container without starting it
    Create(Box<CreateOptions>),
    /// List containers
    Ps(PsArgs),
    /// Show the output of a container, or the log of the guest's kernel
    Logs(LogsArgs),
    /// Show the connections to the outside that containers asked for
    Egress(EgressArgs),
    /// Run a further command in a running container
    Exec(ExecArgs),
    /// Connect to the streams of a running container
    Attach(AttachArgs),
    /// Stop containers
    Stop(StopArgs),
    /// Stop containers and start them again
    Restart(StopArgs),
    /// Send a signal to containers
    Kill(KillArgs),
    /// Start stopped containers
    Start(StartArgs),
    /// Wait until containers have ended, and print their exit codes
    Wait(Containers),
    /// Remove containers
    Rm(RmArgs),
    /// Remove images
    Rmi(RmiArgs),
    /// Give a container another name
    Rename(RenameArgs),
    /// Give an image a further name
    Tag(TagArgs),
    /// Show everything known of containers or images as JSON
    Inspect(InspectArgs),
    /// Make, list, connect and remove networks
    Network(NetworkArgs),
    /// Make, list and remove volumes
    Volume(VolumeArgs),
    /// The daemon itself
    #[command(hide = true)]
    Daemon(DaemonArgs),
    /// The virtual machine monitor itself
    #[command(hide = true)]
    Vmm,
    /// The file server itself
    #[command(hide = true)]
    Fsd,
    /// Put the guest into the executable
    #[command(hide = true)]
    Bundle(BundleArgs),
}

#[derive(Debug, Args)]
pub(crate) struct UpArgs {
    /// Processors of the virtual machine; at first as many as this computer has, but at most 8
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..))]
    pub(crate) cpus: Option<u8>,
    /// Most memory of the virtual machine, for example 4g; at first half of this computer's, but at most 8g
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(crate) memory: Option<u64>,
    /// Size of the data disk, for example 100g; at first 64g; it takes the room that is used, and can only grow
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(crate) disk: Option<u64>,
    /// Registries (HOST[:PORT] or NETWORK/BITS) whose certificate is not checked and that may speak plain HTTP; replaces
    /// those of before, and an empty value removes them
    #[arg(long, value_name = "REGISTRY")]
    pub(crate) insecure_registry: Vec<String>,
    /// Registries, by URL, to be asked before Docker Hub; replaces those of before, and an empty value removes them
    #[arg(long, value_name = "URL", value_parser = mirror)]
    pub(crate) registry_mirror: Vec<String>,
    /// Make no docker context
    #[arg(long)]
    pub(crate) no_context: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DownArgs {
    /// Seconds to wait for containers before they are killed, instead of each one's own time
    #[arg(short = 't', long)]
    pub(crate) timeout: Option<u32>,
}

#[derive(Debug, Args)]
pub(crate) struct EgressArgs {
    /// Only those of this container, which must exist
    pub(crate) container: Option<String>,
    /// Only those that were not let out
    #[arg(long)]
    pub(crate) denied: bool,
    /// Print a JSON object for each
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct JsonFlag {
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct PsArgs {
    /// Also those that have ended
    #[arg(short, long)]
    pub(crate) all: bool,
    /// Only ids
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Do not cut ids and commands
    #[arg(long)]
    pub(crate) no_trunc: bool,
    /// Only those that match, for example status=exited
    #[arg(short, long, value_name = "KEY=VALUE")]
    pub(crate) filter: Vec<String>,
    /// Only the newest N, whatever their state
    #[arg(short = 'n', long, value_name = "N")]
    pub(crate) last: Option<u32>,
    /// Only the newest, whatever its state
    #[arg(short, long)]
    pub(crate) latest: bool,
}

#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    /// The container
    #[arg(required_unless_present = "vm", conflicts_with = "vm")]
    pub(crate) container: Option<String>,
    /// The log of the guest's kernel
    #[arg(long, conflicts_with_all = ["tail", "timestamps", "since", "until"])]
    pub(crate) vm: bool,
    /// Show what comes, too
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// Only the last N lines
    #[arg(short = 'n', long, value_name = "N", default_value = "all")]
    pub(crate) tail: String,
    /// Show when each line was written
    #[arg(short, long)]
    pub(crate) timestamps: bool,
    /// Only lines after this time (Unix seconds or RFC 3339)
    #[arg(long)]
    pub(crate) since: Option<String>,
    /// Only lines before this time (Unix seconds or RFC 3339)
    #[arg(long)]
    pub(crate) until: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct AttachArgs {
    /// The container
    pub(crate) container: String,
    /// Do not pass on standard input
    #[arg(long)]
    pub(crate) no_stdin: bool,
    #[command(flatten)]
    pub(crate) session: SessionArgs,
}

/// How a terminal session behaves.
#[derive(Debug, Args)]
pub(crate) struct SessionArgs {
    /// The keys that leave the container running
    #[arg(long, value_name = "KEYS", default_value = crate::terminal::DetachKeys::DEFAULT)]
    pub(crate) detach_keys: String,
    /// Pass signals on to the container
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub(crate) sig_proxy: bool,
}

/// One or more containers.
#[derive(Debug, Args)]
pub(crate) struct Containers {
    /// Names or ids
    #[arg(required = true, value_name = "CONTAINER")]
    pub(crate) containers: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct StopArgs {
    #[command(flatten)]
    pub(crate) targets: Containers,
    /// Seconds to wait before it is killed; -1 is forever
    #[arg(short = 't', long, alias = "time", allow_negative_numbers = true)]
    pub(crate) timeout: Option<i32>,
    /// The signal to send
    #[arg(short, long)]
    pub(crate) signal: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct KillArgs {
    #[command(flatten)]
    pub(crate) targets: Containers,
    /// The signal to send
    #[arg(short, long, default_value = "KILL")]
    pub(crate) signal: String,
}

#[derive(Debug, Args)]
pub(crate) struct StartArgs {
    #[command(flatten)]
    pub(crate) targets: Containers,
    /// Show its output, pass on signals, end with its exit code
    #[arg(short, long)]
    pub(crate) attach: bool,
    /// Pass on standard input, too
    #[arg(short, long)]
    pub(crate) interactive: bool,
    #[command(flatten)]
    pub(crate) session: SessionArgs,
}

#[derive(Debug, Args)]
pub(crate) struct RmArgs {
    #[command(flatten)]
    pub(crate) targets: Containers,
    /// Also if it runs
    #[arg(short, long)]
    pub(crate) force: bool,
    /// Also its anonymous volumes
    #[arg(short, long)]
    pub(crate) volumes: bool,
}

#[derive(Debug, Args)]
pub(crate) struct RenameArgs {
    /// Its name or id
    pub(crate) container: String,
    /// Its new name
    pub(crate) name: String,
}

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// Names or ids
    #[arg(required = true, value_name = "NAME")]
    pub(crate) names: Vec<String>,
    /// Only containers or only images
    #[arg(long = "type", value_enum)]
    pub(crate) kind: Option<ObjectKind>,
}

/// What `inspect` looks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ObjectKind {
    Container,
    Image,
}

#[derive(Debug, Args)]
pub(crate) struct DaemonArgs {
    /// Leave the terminal and log to the daemon's own file
    #[arg(long)]
    pub(crate) detached: bool,
    /// Write a line to this inherited file descriptor when the socket listens; only 1 can be used
    #[arg(long, value_name = "FD", value_parser = clap::value_parser!(i32).range(1..=1))]
    pub(crate) ready_fd: Option<i32>,
}

#[derive(Debug, Args)]
pub(crate) struct BundleArgs {
    /// The guest's kernel (vmlinux)
    #[arg(long)]
    pub(crate) kernel: PathBuf,
    /// The guest's initramfs (cpio)
    #[arg(long)]
    pub(crate) initramfs: PathBuf,
    /// The data disk's template (ext4, zstd)
    #[arg(long)]
    pub(crate) data: PathBuf,
    /// The executable to write
    #[arg(long)]
    pub(crate) output: PathBuf,
    /// The executable to put them into; without it, this one
    #[arg(long)]
    pub(crate) base: Option<PathBuf>,
}

/// A mirror on the command line.
fn mirror(text: &str) -> Result<String, String> {
    if !text.is_empty() {
        coracle_image_store::registry::check_mirror(text).map_err(|error| error.to_string())?;
    }
    Ok(text.to_owned())
}

/// A size on the command line.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    crate::units::parse_size(text).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn what_follows_the_image_belongs_to_the_container() {
        let cli =
            Cli::try_parse_from(["coracle", "run", "--rm", "-it", "busybox", "sh", "-c", "exit 3", "--rm"])
                .unwrap();
        let Command::Run(run) = cli.command else { panic!("not run") };
        assert!(run.create.rm && run.create.interactive && run.create.tty && !run.detach);
        assert_eq!(run.create.image_and_command, ["busybox", "sh", "-c", "exit 3", "--rm"]);
    }

    #[test]
    fn an_option_right_after_the_image_belongs_to_the_container() {
        let cli = Cli::try_parse_from(["coracle", "run", "busybox", "-d"]).unwrap();
        let Command::Run(run) = cli.command else { panic!("not run") };
        assert_eq!(run.create.image_and_command, ["busybox", "-d"]);
        assert!(!run.detach);
    }

    #[test]
    fn what_is_not_there_yet_is_refused() {
        for options in [["--gpus", "all"], ["--restart", "always"]] {
            assert!(
                Cli::try_parse_from(["coracle", "run", options[0], options[1], "busybox"]).is_err(),
                "{options:?}"
            );
        }
    }
}
