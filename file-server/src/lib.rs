//! The file server: serves exactly the directories and files that the daemon granted to a virtual machine, over virtio-fs
//! (FUSE messages in a vhost-user device). It knows nothing of containers.

pub mod control;
