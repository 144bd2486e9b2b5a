//! A process's three streams, between the agent and whoever is attached.
//!
//! One pump for each process takes its output from the agent, writes it to the log, acknowledges it, and hands it to those who
//! are attached, in this order. Who is attached and reads slowly slows the process down, as in Docker; who is gone is
//! forgotten.

mod fanout;
mod pump;
mod stdin;

pub(crate) use fanout::{Chunk, Fanout};
pub(crate) use pump::{Outcome, Pump};
pub(crate) use stdin::{Input, StdinPort, forward};
