//! Two questions that are asked too often for UniFFI's way of calling, which takes a hundred times as
//! long as their answers. The layers over this call them directly.

use crate::handles::NativeHold;

/// Whether a hold still owns its lock, as far as is known here. 1: yes, 0: no.
///
/// # Safety
///
/// `hold` is what came with the hold as its address, and its object has not been freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn etcdlock_uniffi_is_held(hold: u64) -> i8 {
    // SAFETY: as the caller promises.
    i8::from(unsafe { &*(hold as *const NativeHold) }.is_held())
}

/// Whether a thread that waits here could ever go on. 1: yes, 0: it is one of the library's own.
#[unsafe(no_mangle)]
pub extern "C" fn etcdlock_uniffi_may_block() -> i8 {
    i8::from(etcdlock::check_may_block().is_ok())
}
