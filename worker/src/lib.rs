//! What the daemon's confined helper processes (the virtual machine monitor, the file server) have in common: the framing of their control
//! sockets, the calls over them, and the pieces of their jails. Nothing here knows what the processes do.

pub mod control;
pub mod jail;
pub mod socket;
