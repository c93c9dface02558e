use std::time::*;
use etcdlock::*;
fn main() {
    let etcd = etcdlock_rig::Etcd::start();
    let s = blocking::Session::connect(etcd.endpoint(), Options::default()).unwrap();
    let m = s.mutex("x").unwrap();
    for _ in 0..2 {
    let r0 = s.stats().requests;
    let t = Instant::now();
    let n = 2000;
    for _ in 0..n { m.lock().unwrap().unlock().unwrap(); }
    println!("lock+unlock {:?} rpcs {}", t.elapsed()/n, s.stats().requests - r0);
    }
    let h = m.lock().unwrap();
    let t = Instant::now();
    for _ in 0..1000000 { std::hint::black_box(h.is_held()); }
    println!("is_held {:?}", t.elapsed()/1000000);
    let t = Instant::now();
    for _ in 0..100000 { std::hint::black_box(m.try_lock().unwrap()); }
    println!("try busy {:?}", t.elapsed()/100000);
    h.unlock().unwrap();
    // two sessions, same process
    let t = Instant::now();
    let r0 = s.stats().requests;
    std::thread::scope(|sc| { for _ in 0..2 { sc.spawn(|| { let m = s.mutex("y").unwrap(); for _ in 0..1000 { m.lock().unwrap().unlock().unwrap(); } }); } });
    println!("2 threads handover {:?} rpcs {}", t.elapsed()/2000, s.stats().requests-r0);
    let s2 = blocking::Session::connect(vec![format!("http://localhost:{}", etcd.endpoint().rsplit(':').next().unwrap())], Options::default()).unwrap();
    let t = Instant::now();
    let r0 = s.stats().requests + s2.stats().requests;
    std::thread::scope(|sc| { for s in [&s, &s2] { sc.spawn(move || { let m = s.mutex("z").unwrap(); for _ in 0..1000 { m.lock().unwrap().unlock().unwrap(); } }); } });
    println!("2 services handover {:?} rpcs {}", t.elapsed()/2000, s.stats().requests + s2.stats().requests-r0);
    println!("{:?}", s.stats());
}
