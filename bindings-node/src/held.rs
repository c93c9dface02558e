//! `isHeld()`, as fast as a native call can be. The classes that napi-rs makes check and borrow their
//! receiver at each call, which takes several times as long as the answer. So this one function is
//! given a number instead: the place of the hold in a table of its thread.

use std::cell::RefCell;
use std::ptr::null_mut;
use std::rc::Rc;

use etcdlock::Hold;
use napi::bindgen_prelude::{JsObjectValue, Object};
use napi::{Env, Result, sys};
use napi_derive::napi;

thread_local! {
    static HOLDS: RefCell<Table> = const { RefCell::new(Table { holds: Vec::new(), free: Vec::new() }) };
}

struct Table {
    holds: Vec<Option<Rc<Hold>>>,
    free: Vec<u32>,
}

/// Keeps a hold in the table.
pub(crate) struct Place(pub(crate) u32);

impl Place {
    pub(crate) fn of(hold: Rc<Hold>) -> Place {
        HOLDS.with_borrow_mut(|table| {
            let place = table.free.pop().unwrap_or_else(|| {
                table.holds.push(None);
                table.holds.len() as u32 - 1
            });
            table.holds[place as usize] = Some(hold);
            Place(place)
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // It fails only when the thread ends, and then the table is dropped too.
        let hold = HOLDS.try_with(|table| {
            let mut table = table.borrow_mut();
            table.free.push(self.0);
            table.holds[self.0 as usize].take()
        });
        drop(hold);
    }
}

#[napi(module_exports)]
pub(crate) fn export_is_held(mut exports: Object, env: Env) -> Result<()> {
    exports.set_named_property("isHeld", env.create_function::<(u32,), bool>("isHeld", is_held)?)
}

unsafe extern "C" fn is_held(env: sys::napi_env, info: sys::napi_callback_info) -> sys::napi_value {
    let (mut count, mut argument, mut place, mut answer) = (1, null_mut(), u32::MAX, null_mut());
    // SAFETY: called by the engine with its own environment and arguments; room for one of them. A
    // missing argument is `undefined`, which leaves `place` as it is.
    unsafe {
        sys::napi_get_cb_info(env, info, &mut count, &mut argument, null_mut(), null_mut());
        sys::napi_get_value_uint32(env, argument, &mut place);
    }
    let held =
        HOLDS.with_borrow(|table| table.holds.get(place as usize).and_then(Option::as_ref).is_some_and(|hold| hold.is_held()));
    // SAFETY: as above.
    unsafe { sys::napi_get_boolean(env, held, &mut answer) };
    answer
}
