//! Empty: the test is what there is.
