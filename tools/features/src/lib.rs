//! Empty: what counts are the dependencies.
