//! Interrupting a processor: a signal whose handler sets the `immediate_exit` flag of the thread's processor, so that a
//! kick that comes just before `KVM_RUN` is not lost.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::os::unix::thread::JoinHandleExt;
use std::ptr;
use std::sync::Once;
use std::thread::JoinHandle;

thread_local! {
    /// The `immediate_exit` byte of the processor that runs on this thread.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

/// Makes kicks to this thread set `flag`.
///
/// # Safety
/// `flag` must stay valid until [`unregister`] was called on the same thread.
pub(super) unsafe fn register(flag: *mut u8) {
    static INSTALL: Once = Once::new();
    INSTALL.call_once(install_handler);
    IMMEDIATE_EXIT.set(flag);
}

/// Makes kicks to this thread harmless.
pub(super) fn unregister() {
    IMMEDIATE_EXIT.set(ptr::null_mut());
}

/// Interrupts the processor on this thread.
pub(crate) fn kick<T>(thread: &JoinHandle<T>) {
    // SAFETY: a thread that was not joined yet has a valid pthread handle; the signal's handler is installed before any
    // processor runs, and a thread whose handle we hold has registered or will never run a processor.
    unsafe { libc::pthread_kill(thread.as_pthread_t(), libc::SIGRTMIN()) };
}

fn install_handler() {
    // SAFETY: an all-zero `sigaction` is a valid value, and `on_kick` only does what a signal handler may: it reads a
    // thread-local without destructor and writes one byte.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_kick as *const () as usize;
        libc::sigaction(libc::SIGRTMIN(), &action, ptr::null_mut());
    }
}

extern "C" fn on_kick(_signal: libc::c_int) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: `register`'s caller promised that the flag is valid; it is shared only with the kernel and with code on
        // this same thread.
        unsafe { flag.write_volatile(1) };
    }
}

/// Installs the handler without a processor, so that an early kick does not end the process.
pub(super) fn install() {
    // SAFETY: a null flag is never written to.
    unsafe { register(ptr::null_mut()) };
}
