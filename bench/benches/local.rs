//! What touches no network: `cargo bench -p etcdlock-bench`.

#![allow(clippy::unwrap_used, missing_docs)]

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use etcdlock::{Options, blocking::Session};

fn local(criterion: &mut Criterion) {
    let session = Session::connect("memory:bench", Options::default()).unwrap();
    let mutex = session.mutex("/bench/a").unwrap();
    let hold = mutex.lock().unwrap();
    criterion.bench_function("Hold::is_held", |b| b.iter(|| black_box(hold.is_held())));
    criterion.bench_function("Hold::remaining", |b| b.iter(|| black_box(hold.remaining())));
    criterion
        .bench_function("Mutex::try_lock, held in this process", |b| b.iter(|| assert!(mutex.try_lock().unwrap().is_none())));
    criterion.bench_function("Session::mutex", |b| b.iter(|| session.mutex(black_box("/bench/b")).unwrap()));
    hold.unlock().unwrap();
    criterion.bench_function("lock + unlock in memory: two crossings of threads each", |b| {
        b.iter(|| mutex.lock().unwrap().unlock().unwrap())
    });
}

criterion_group!(benches, local);
criterion_main!(benches);
