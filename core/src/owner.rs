//! What a ticket tells people about its owner.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

/// What a ticket tells about its owner. Readers must do without any of it.
#[derive(Serialize, Deserialize, Default)]
#[serde(default)]
pub(crate) struct OwnerInfo<'a> {
    pub(crate) owner: Cow<'a, str>,
    pub(crate) host: Cow<'a, str>,
    pub(crate) pid: u32,
    pub(crate) language: Cow<'a, str>,
    /// Milliseconds since 1970.
    pub(crate) since: u64,
}
