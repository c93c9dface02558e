//! Tells the linker what makes a Rust library a system library.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if std::env::var("CARGO_CFG_TARGET_OS").as_deref() != Ok("linux") {
        return;
    }
    let major = std::env::var("CARGO_PKG_VERSION_MAJOR").unwrap_or_default();
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libetcdlock.so.{major}");
    // Its threads run its code until the process ends, so dlclose() must leave it in place.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
}
