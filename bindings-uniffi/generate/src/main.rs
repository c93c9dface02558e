//! UniFFI's generator, in the version of the library: reads the interface out of the library that ships.

fn main() {
    uniffi::uniffi_bindgen_main();
}
