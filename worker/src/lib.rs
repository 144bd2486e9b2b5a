//! What the daemon's confined helper processes (the virtual machine monitor, the file server) have in common: the framing of their control
//! sockets, the calls over them, the pieces of their jails, and how they log. Nothing here knows what the processes do.

pub mod clock;
pub mod control;
pub mod jail;
pub mod limit;
pub mod socket;

/// An error and its causes in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text = format!("{text}: {source}");
        next = source.source();
    }
    text
}
