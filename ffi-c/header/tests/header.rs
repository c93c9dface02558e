//! The header that is checked in is the one that the code gives.

use std::path::Path;

#[test]
fn the_checked_in_header_is_the_one_the_code_gives() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut config = cbindgen::Config::from_file(here.join("cbindgen.toml")).expect("cbindgen.toml");
    config.header = Some(std::fs::read_to_string(here.join("src/header.txt")).expect("the first lines of the header"));
    config.after_includes = Some(format!("\n{}", version_macros()));
    let bindings = cbindgen::Builder::new()
        .with_config(config)
        .with_src(here.join("src/status.rs"))
        .with_src(here.join("src/lib.rs"))
        .generate()
        .expect("the code is one that cbindgen understands");
    let mut text = Vec::new();
    bindings.write(&mut text);
    let text = String::from_utf8(text).expect("UTF-8");
    let path = here.join("include/etcdlock.h");
    if std::env::var_os("ETCDLOCK_WRITE_HEADER").is_some() {
        std::fs::write(&path, text).expect("the header can be written");
        return;
    }
    let checked_in = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        checked_in == text,
        "include/etcdlock.h is not what the code gives: run `make -C ffi-c header` and look at the difference"
    );
}

fn version_macros() -> String {
    let [version, major, minor, patch] = [
        env!("CARGO_PKG_VERSION"),
        env!("CARGO_PKG_VERSION_MAJOR"),
        env!("CARGO_PKG_VERSION_MINOR"),
        env!("CARGO_PKG_VERSION_PATCH"),
    ];
    format!(
        "/* The version of this header; etcdlock_version() has that of the library. */\n\
         #define ETCDLOCK_VERSION \"{version}\"\n\
         #define ETCDLOCK_VERSION_MAJOR {major}\n\
         #define ETCDLOCK_VERSION_MINOR {minor}\n\
         #define ETCDLOCK_VERSION_PATCH {patch}\n"
    )
}
