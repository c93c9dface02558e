//! Says how an addon for Node is linked.

fn main() {
    napi_build::setup();
}
