//! Handles that can be checked. What C sees as a pointer is a number: a place in a table and the
//! generation of what was put there. Nothing is ever read through it, so a handle that is stale,
//! of another kind, or no handle at all is found out.
//!
//! ```text
//! bits  63..60  59..52       51..28      27..4   3..0
//!       0xE     fork epoch   generation  place   kind
//! ```

use std::collections::VecDeque;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once, OnceLock, PoisonError, RwLock};

use etcdlock::{Canceller, ErrorKind, Options};

use crate::status::{Failure, Outcome};

const _: () = assert!(usize::BITS == 64, "handles need 64-bit pointers");

/// No address of a program's memory begins like this.
const MAGIC: usize = 0xE;
const GENERATIONS: u32 = 1 << 24;
const FIRST_CHUNK: usize = 256;
const CHUNKS: usize = 16;
/// Places rest before they are used again, so that a stale handle is found out for longer.
const RESTING: usize = 64;

pub(crate) enum Object {
    Options(Box<Options>),
    Session(etcdlock::Session),
    Mutex(etcdlock::Mutex),
    Op(Arc<OnceLock<Canceller>>),
}

/// A kind of object that a handle can name.
pub(crate) trait Kind: Sized {
    const TAG: usize;
    const NAME: &str;
    fn of(object: &mut Object) -> Option<&mut Self>;
    fn of_ref(object: &Object) -> Option<&Self>;
}

macro_rules! kind {
    ($tag:literal, $name:literal, $variant:ident, $type:ty) => {
        impl Kind for $type {
            const TAG: usize = $tag;
            const NAME: &str = $name;

            fn of(object: &mut Object) -> Option<&mut Self> {
                if let Object::$variant(it) = object { Some(it) } else { None }
            }

            fn of_ref(object: &Object) -> Option<&Self> {
                if let Object::$variant(it) = object { Some(it) } else { None }
            }
        }
    };
}

// Odd, because the addresses of objects are even.
kind!(1, "etcdlock_options", Options, Options);
kind!(3, "etcdlock_session", Session, etcdlock::Session);
kind!(5, "etcdlock_mutex", Mutex, etcdlock::Mutex);
kind!(7, "etcdlock_op", Op, Arc<OnceLock<Canceller>>);

fn name_of(tag: usize) -> &'static str {
    match tag {
        1 => Options::NAME,
        3 => etcdlock::Session::NAME,
        5 => etcdlock::Mutex::NAME,
        7 => <Arc<OnceLock<Canceller>> as Kind>::NAME,
        _ => "no handle",
    }
}

struct Slot {
    generation: u32,
    object: Option<Object>,
}

/// The handles of one process. It is never freed: a lock of it may be taken at any time.
struct Table {
    /// Each twice as long as the one before, so that places never move.
    chunks: [OnceLock<Box<[RwLock<Slot>]>>; CHUNKS],
    places: Mutex<Places>,
}

struct Places {
    used: usize,
    free: VecDeque<usize>,
}

static TABLE: AtomicPtr<Table> = AtomicPtr::new(null_mut());
static EPOCH: AtomicU8 = AtomicU8::new(0);

/// After a fork the child begins with an empty table: locks of the old one may be held for ever by
/// threads that are not there, and everything in it is the parent's.
extern "C" fn in_the_child() {
    etcdlock::note_process_id();
    EPOCH.fetch_add(1, Ordering::Relaxed);
    TABLE.store(null_mut(), Ordering::Release);
}

fn table() -> &'static Table {
    let mut table = TABLE.load(Ordering::Acquire);
    if table.is_null() {
        static REGISTERED: Once = Once::new();
        REGISTERED.call_once(|| {
            etcdlock::note_process_id();
            // SAFETY: the function lives as long as the process, since the library is never unloaded,
            // and does nothing that is unsafe between fork and exec.
            unsafe { libc::pthread_atfork(None, None, Some(in_the_child)) };
        });
        let new = Box::into_raw(Box::new(Table {
            chunks: Default::default(),
            places: Mutex::new(Places { used: 0, free: VecDeque::new() }),
        }));
        table = match TABLE.compare_exchange(null_mut(), new, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => new,
            Err(other) => {
                // SAFETY: `new` was made above and nobody else has seen it.
                drop(unsafe { Box::from_raw(new) });
                other
            }
        };
    }
    // SAFETY: it came from a Box that is never freed.
    unsafe { &*table }
}

impl Table {
    fn slot(&self, place: usize) -> Option<&RwLock<Slot>> {
        let chunk = (place / FIRST_CHUNK + 1).ilog2() as usize;
        self.chunks.get(chunk)?.get()?.get(place - FIRST_CHUNK * ((1 << chunk) - 1))
    }

    fn places(&self) -> MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a new object: the one that has rested longest, or one that was never used.
    fn free_place(&self) -> Option<usize> {
        let mut places = self.places();
        if places.free.len() > RESTING {
            return places.free.pop_front();
        }
        let place = places.used;
        let chunk = (place / FIRST_CHUNK + 1).ilog2() as usize;
        let Some(chunk_of_place) = self.chunks.get(chunk) else { return places.free.pop_front() };
        chunk_of_place
            .get_or_init(|| (0..FIRST_CHUNK << chunk).map(|_| RwLock::new(Slot { generation: 1, object: None })).collect());
        places.used += 1;
        Some(place)
    }
}

/// Puts an object into the table and returns its handle.
pub(crate) fn insert(object: Object) -> Outcome<usize> {
    let table = table();
    let place = table.free_place();
    let Some((place, slot)) = place.and_then(|place| Some((place, table.slot(place)?))) else {
        return Err(Failure::new(ErrorKind::Unavailable, "there are too many handles: free those that are not needed"));
    };
    let tag = match &object {
        Object::Options(_) => Options::TAG,
        Object::Session(_) => etcdlock::Session::TAG,
        Object::Mutex(_) => etcdlock::Mutex::TAG,
        Object::Op(_) => <Arc<OnceLock<Canceller>> as Kind>::TAG,
    };
    let mut slot = slot.write().unwrap_or_else(PoisonError::into_inner);
    slot.object = Some(object);
    let epoch = usize::from(EPOCH.load(Ordering::Relaxed));
    Ok(MAGIC << 60 | epoch << 52 | (slot.generation as usize) << 28 | place << 4 | tag)
}

/// The place and the generation that a handle names, if it is one of this kind and process.
fn decode<K: Kind>(handle: usize) -> Outcome<(usize, u32)> {
    if handle == 0 {
        return Err(Failure::invalid(format!("the {} is NULL", K::NAME)));
    }
    let tag = handle & 0xF;
    if handle >> 60 != MAGIC || tag != K::TAG {
        let what = if handle >> 60 == MAGIC { name_of(tag) } else { "no handle" };
        return Err(Failure::invalid(format!("{handle:#x} is {what} where an {} is needed", K::NAME)));
    }
    if handle >> 52 & 0xFF != usize::from(EPOCH.load(Ordering::Relaxed)) {
        return Err(Failure::new(
            ErrorKind::Forked,
            format!("this {} was made before fork() and belongs to the parent process; connect anew in the child", K::NAME),
        ));
    }
    Ok((handle >> 4 & 0xFF_FFFF, (handle >> 28 & 0xFF_FFFF) as u32))
}

fn stale<K: Kind>(handle: usize) -> Failure {
    Failure::invalid(format!("the {} {handle:#x} has been freed", K::NAME))
}

/// Runs something quick on the object of a handle.
pub(crate) fn with<K: Kind, T>(handle: usize, run: impl FnOnce(&K) -> T) -> Outcome<T> {
    let (place, generation) = decode::<K>(handle)?;
    let slot = table().slot(place).ok_or_else(|| stale::<K>(handle))?;
    let slot = slot.read().unwrap_or_else(PoisonError::into_inner);
    match slot.object.as_ref().filter(|_| slot.generation == generation).and_then(K::of_ref) {
        Some(object) => Ok(run(object)),
        None => Err(stale::<K>(handle)),
    }
}

/// The object itself, for a call that takes longer: the handle may be freed meanwhile.
pub(crate) fn get<K: Kind + Clone>(handle: usize) -> Outcome<K> {
    with(handle, K::clone)
}

/// Changes the object of a handle.
pub(crate) fn change<K: Kind>(handle: usize, run: impl FnOnce(&mut K)) -> Outcome<()> {
    let (place, generation) = decode::<K>(handle)?;
    let slot = table().slot(place).ok_or_else(|| stale::<K>(handle))?;
    let mut slot = slot.write().unwrap_or_else(PoisonError::into_inner);
    let fits = slot.generation == generation;
    match slot.object.as_mut().filter(|_| fits).and_then(K::of) {
        Some(object) => {
            run(object);
            Ok(())
        }
        None => Err(stale::<K>(handle)),
    }
}

/// Ends a handle and returns what it named, to be dropped outside the table.
pub(crate) fn remove<K: Kind>(handle: usize) -> Outcome<Object> {
    let (place, generation) = decode::<K>(handle)?;
    let table = table();
    let slot = table.slot(place).ok_or_else(|| stale::<K>(handle))?;
    let mut slot = slot.write().unwrap_or_else(PoisonError::into_inner);
    if slot.generation != generation || slot.object.as_ref().and_then(K::of_ref).is_none() {
        return Err(stale::<K>(handle));
    }
    let object = slot.object.take().ok_or_else(|| stale::<K>(handle))?;
    slot.generation += 1;
    let worn_out = slot.generation == GENERATIONS;
    drop(slot);
    if !worn_out {
        table.places().free.push_back(place);
    }
    Ok(object)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status<T>(outcome: Outcome<T>) -> i32 {
        outcome.err().map_or(0, |failure| failure.status)
    }

    #[test]
    fn a_handle_is_good_until_it_is_freed_and_never_again() {
        let mut seen = std::collections::HashSet::new();
        for _ in 0..10_000 {
            let handle = insert(Object::Options(Box::default())).ok().expect("room");
            assert!(seen.insert(handle), "{handle:#x} came twice");
            assert_eq!(status(get::<Options>(handle)), 0);
            assert_eq!(status(with::<etcdlock::Mutex, _>(handle, |_| ())), ErrorKind::Invalid.code());
            assert_eq!(status(remove::<Options>(handle)), 0);
            assert_eq!(status(get::<Options>(handle)), ErrorKind::Invalid.code());
            assert_eq!(status(remove::<Options>(handle)), ErrorKind::Invalid.code());
        }
    }

    #[test]
    fn a_stale_handle_does_not_reach_what_has_its_place_now() {
        let stale = insert(Object::Options(Box::default())).ok().expect("room");
        assert_eq!(status(remove::<Options>(stale)), 0);
        let mut others = Vec::new();
        while !others.iter().any(|other| other & 0xFFF_FFFF == stale & 0xFFF_FFFF) {
            others.push(insert(Object::Options(Box::default())).ok().expect("room"));
            // Freed places rest until there are more of them.
            let passing = insert(Object::Options(Box::default())).ok().expect("room");
            assert_eq!(status(remove::<Options>(passing)), 0);
            assert!(others.len() < 100_000, "its place never came back");
        }
        assert_eq!(status(with::<Options, _>(stale, |_| ())), ErrorKind::Invalid.code());
        assert_eq!(status(change::<Options>(stale, |_| ())), ErrorKind::Invalid.code());
        assert_eq!(status(remove::<Options>(stale)), ErrorKind::Invalid.code());
        for other in others {
            assert_eq!(status(remove::<Options>(other)), 0);
        }
    }

    #[test]
    fn places_do_not_move_while_many_are_added() {
        let handles: Vec<_> = (0..5_000)
            .map(|n| insert(Object::Options(Box::new(Options::default().owner(n.to_string())))).ok().expect("room"))
            .collect();
        for (n, handle) in handles.iter().enumerate() {
            assert!(get::<Options>(*handle).is_ok_and(|options| options == Options::default().owner(n.to_string())));
        }
        for handle in handles {
            assert_eq!(status(remove::<Options>(handle)), 0);
        }
    }

    #[test]
    fn any_number_at_all_is_taken_without_harm() {
        for handle in [0, 1, 7, usize::MAX, 0xE << 60, 0xE << 60 | 5, 0xE << 60 | 0xFF_FFFF << 4 | 5, &raw const EPOCH as usize] {
            assert_ne!(status(with::<etcdlock::Mutex, _>(handle, |_| ())), 0, "{handle:#x}");
            assert_ne!(status(remove::<Options>(handle)), 0, "{handle:#x}");
        }
    }
}
