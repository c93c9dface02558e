//! The house of core: lib.rs lists its modules from the roof to the ground, floor by floor, and each uses those below it alone.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

fn sources(folder: &Path, into: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, into);
        } else if path.extension().is_some_and(|end| end == "rs") && !path.ends_with("tests.rs") {
            into.push(path);
        }
    }
}

#[test]
fn every_import_points_down() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let lib = std::fs::read_to_string(src.join("lib.rs")).unwrap();
    // A blank line ends a floor: what stands on one does not use each other.
    let mut floors = BTreeMap::new();
    for (floor, text) in lib.split("\n\n").enumerate() {
        let shipped = text.lines().filter(|_| !text.contains("#[cfg(test)]"));
        let names = shipped.filter_map(|line| line.trim_start_matches("pub ").strip_prefix("mod ")?.strip_suffix(';'));
        floors.extend(names.map(|name| (name.to_owned(), floor)));
    }
    assert!(floors.len() > 20, "{floors:?}");
    let mut files = Vec::new();
    sources(&src, &mut files);
    let mut wrong = Vec::new();
    for path in files {
        let module = path.strip_prefix(&src).unwrap().iter().next().unwrap().to_string_lossy().replace(".rs", "");
        let Some(floor) = floors.get(&module) else { continue };
        let text = std::fs::read_to_string(&path).unwrap();
        let shipped = text.split("#[cfg(test)]\nmod tests").next().unwrap();
        let code = shipped.lines().filter(|line| !line.trim_start().starts_with("//"));
        for line in code {
            for used in line.split("crate::").skip(1) {
                let used: String = used.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                if used != module && floors.get(&used).is_some_and(|below| below <= floor) {
                    wrong.push(format!("{}: {}", path.display(), line.trim()));
                }
            }
        }
    }
    // What belongs to a store knows its brothers, and not the store that is made of them.
    let store = src.join("store/etcd");
    for entry in std::fs::read_dir(&store).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        for line in text.split("#[cfg(test)]\nmod tests").next().unwrap().lines() {
            let Some(used) = line.split("super::").nth(1) else { continue };
            let used: String = used.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            if !store.join(format!("{used}.rs")).exists() {
                wrong.push(format!("{}: {}", path.display(), line.trim()));
            }
        }
    }
    assert!(wrong.is_empty(), "these imports do not point down:\n{}", wrong.join("\n"));
}

/// Nothing in the protocol asks a clock, waits, sends or locks.
#[test]
fn the_protocol_is_pure() {
    let mut files = Vec::new();
    sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src/proto"), &mut files);
    assert!(files.len() >= 4, "{files:?}");
    for path in files {
        let text = std::fs::read_to_string(&path).unwrap();
        for word in ["tokio", "Instant", "SystemTime", "async ", "Mutex", "Atomic", "std::thread", "tracing", "fastrand"] {
            let used = text.lines().find(|line| line.contains(word) && !line.trim_start().starts_with("//"));
            assert!(used.is_none(), "{}: {}", path.display(), used.unwrap_or_default());
        }
    }
}
