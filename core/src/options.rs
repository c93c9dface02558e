//! What the user gives: the target, the options and the names, checked at once and in one place.

use std::time::Duration;

use crate::error::{Error, Result};

/// Seconds of TTL when none is given.
pub const DEFAULT_TTL: Duration = Duration::from_secs(15);
/// How long [`Session::connect`](crate::Session::connect) tries when nothing is said.
pub const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long `unlock`, `close` and guarded writes wait for an answer when nothing is said.
pub const DEFAULT_REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// The target when none is given and `$ETCDLOCK_ENDPOINTS` is not set.
pub const DEFAULT_TARGET: &str = "127.0.0.1:2379";

const MIN_TTL: Duration = Duration::from_secs(2);
/// etcd refuses more than 9,000,000,000 s; a day is more than any lock should survive its holder.
const MAX_TTL: Duration = Duration::from_secs(24 * 60 * 60);
const MAX_NAME: usize = 1024;
/// Others read it, in a terminal.
const MAX_OWNER: usize = 1024;
const MAX_HOLD: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// Options of a [`Session`](crate::Session). `Options::default()` is right for most.
///
/// ```
/// use std::time::Duration;
/// let options = etcdlock::Options::default().ttl(Duration::from_secs(10)).owner("billing");
/// ```
#[derive(Clone, PartialEq, Eq, Hash)]
#[must_use]
pub struct Options {
    pub(crate) ttl: Duration,
    pub(crate) namespace: String,
    pub(crate) user: Option<String>,
    pub(crate) password: Option<String>,
    pub(crate) ca: Option<String>,
    pub(crate) cert: Option<String>,
    pub(crate) key: Option<String>,
    pub(crate) server_name: Option<String>,
    pub(crate) owner: Option<String>,
    pub(crate) connect_timeout: Duration,
    pub(crate) max_hold: Option<Duration>,
    pub(crate) language: &'static str,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            ttl: DEFAULT_TTL,
            namespace: String::new(),
            user: None,
            password: None,
            ca: None,
            cert: None,
            key: None,
            server_name: None,
            owner: None,
            connect_timeout: DEFAULT_CONNECT_TIMEOUT,
            max_hold: None,
            language: "rust",
        }
    }
}

impl Options {
    /// How long the lease lives without a renewal: at least 2 s, at most 24 h, in whole seconds
    /// (rounded up). A crashed holder's lock is free after about this time. Default 15 s.
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl = ttl;
        self
    }

    /// A prefix for every lock name of the session, used as given. Default: none.
    pub fn namespace(mut self, prefix: impl Into<String>) -> Self {
        self.namespace = prefix.into();
        self
    }

    /// User name for etcd's own authentication; needs [`password`](Self::password).
    pub fn user(mut self, user: impl Into<String>) -> Self {
        self.user = Some(user.into());
        self
    }

    /// Password for etcd's own authentication; needs [`user`](Self::user).
    pub fn password(mut self, password: impl Into<String>) -> Self {
        self.password = Some(password.into());
        self
    }

    /// Certificates that may sign the server's: PEM text, or the path of a PEM file. Default: the
    /// system's roots.
    pub fn ca(mut self, pem_or_path: impl Into<String>) -> Self {
        self.ca = Some(pem_or_path.into());
        self
    }

    /// Client certificate: PEM text, or a path; needs [`key`](Self::key).
    pub fn cert(mut self, pem_or_path: impl Into<String>) -> Self {
        self.cert = Some(pem_or_path.into());
        self
    }

    /// Private key of the client certificate: PEM text, or a path; needs [`cert`](Self::cert).
    pub fn key(mut self, pem_or_path: impl Into<String>) -> Self {
        self.key = Some(pem_or_path.into());
        self
    }

    /// The name the server's certificate must carry, where it differs from the endpoint's host.
    pub fn server_name(mut self, name: impl Into<String>) -> Self {
        self.server_name = Some(name.into());
        self
    }

    /// A label that others see in `inspect`. Default `host:pid`.
    pub fn owner(mut self, label: impl Into<String>) -> Self {
        self.owner = Some(label.into());
        self
    }

    /// How long to try to reach the target at first. Default 5 s. It does not bound the session's life.
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout;
        self
    }

    /// Release a hold that is kept longer than this. Default: never.
    pub fn max_hold(mut self, limit: Duration) -> Self {
        self.max_hold = Some(limit);
        self
    }

    /// For bindings: the language shown in `inspect`.
    #[doc(hidden)]
    pub fn language(mut self, language: &'static str) -> Self {
        self.language = language;
        self
    }

    pub(crate) fn check(&self) -> Result<()> {
        if self.ttl < MIN_TTL {
            // Else it would be nanoseconds.
            let ttl = if self.ttl.is_zero() { "0s".to_owned() } else { format!("{:?}", self.ttl) };
            return Err(Error::invalid(format!(
                "ttl {ttl} is too short: at least {MIN_TTL:?}, which is the least that etcd grants"
            )));
        }
        if self.ttl > MAX_TTL {
            return Err(Error::invalid(format!(
                "ttl {:?} is too long: at most 24 h; a crashed holder's lock stays taken for that long",
                self.ttl
            )));
        }
        if self.connect_timeout.is_zero() {
            return Err(Error::invalid("connect_timeout 0 is too short: give it some time, such as 5 s"));
        }
        if self.max_hold.is_some_and(|limit| limit.is_zero()) {
            return Err(Error::invalid("max_hold 0 would release every hold at once: leave it out, or give it some time"));
        }
        if self.max_hold.is_some_and(|limit| limit > MAX_HOLD) {
            return Err(Error::invalid("max_hold is too long: at most 365 days; leave it out for no limit"));
        }
        match (&self.user, &self.password) {
            (Some(user), _) if user.is_empty() => return Err(Error::invalid("user \"\" is empty")),
            (Some(user), None) => return Err(Error::invalid(format!("user {user:?} is given without a password"))),
            (None, Some(_)) => return Err(Error::invalid("a password is given without a user")),
            _ => {}
        }
        match (&self.cert, &self.key) {
            (Some(_), None) => return Err(Error::invalid("cert is given without key")),
            (None, Some(_)) => return Err(Error::invalid("key is given without cert")),
            _ => {}
        }
        if self.owner.as_ref().is_some_and(|owner| owner.len() > MAX_OWNER) {
            let length = self.owner.as_ref().map_or(0, String::len);
            return Err(Error::invalid(format!("owner has {length} bytes: at most {MAX_OWNER}")));
        }
        if self.namespace.len() > MAX_NAME || self.namespace.contains('\0') {
            return Err(Error::invalid("namespace must be at most 1,024 bytes and have no NUL"));
        }
        Ok(())
    }

    /// Whole seconds, rounded up: leases are granted in seconds.
    pub(crate) fn ttl_seconds(&self) -> i64 {
        self.ttl.as_secs() as i64 + i64::from(self.ttl.subsec_nanos() > 0)
    }

    /// The parts that decide whether two sessions can share a connection.
    pub(crate) fn connection(&self) -> Connection {
        Connection {
            user: self.user.clone().zip(self.password.clone()),
            ca: self.ca.clone(),
            identity: self.cert.clone().zip(self.key.clone()),
            server_name: self.server_name.clone(),
        }
    }
}

impl std::fmt::Debug for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Options")
            .field("ttl", &self.ttl)
            .field("namespace", &self.namespace)
            .field("user", &self.user)
            .field("password", &self.password.as_ref().map(|_| "…"))
            .field("owner", &self.owner)
            .field("connect_timeout", &self.connect_timeout)
            .field("max_hold", &self.max_hold)
            .finish_non_exhaustive()
    }
}

/// How to speak to the target, without what is a session's own.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub(crate) struct Connection {
    pub(crate) user: Option<(String, String)>,
    pub(crate) ca: Option<String>,
    /// Certificate and key.
    pub(crate) identity: Option<(String, String)>,
    pub(crate) server_name: Option<String>,
}

/// What certificate files hold, as PEM texts.
pub(crate) struct Pems {
    pub(crate) ca: Option<String>,
    pub(crate) identity: Option<(String, String)>,
}

impl Connection {
    pub(crate) fn has_files(&self) -> bool {
        self.ca.is_some() || self.identity.is_some()
    }

    /// The files of certificates, for messages; not what is given as text.
    pub(crate) fn files(&self) -> Vec<String> {
        let identity = self.identity.iter().flat_map(|(cert, key)| [("cert", cert), ("key", key)]);
        let given = self.ca.iter().map(|ca| ("ca", ca)).chain(identity);
        given.filter(|(_, given)| !is_pem(given)).map(|(what, path)| format!("{what} {}", shown_path(what, path))).collect()
    }

    /// Reads the files that are named, away from the io thread: a disk or a network mount may be slow.
    pub(crate) async fn read_files(&self) -> Result<Pems> {
        let (ca, identity) = (self.ca.clone(), self.identity.clone());
        let read = move || {
            Ok(Pems {
                ca: ca.map(|ca| read_pem("ca", ca)).transpose()?,
                identity: identity.map(|(cert, key)| Ok((read_pem("cert", cert)?, read_pem("key", key)?))).transpose()?,
            })
        };
        tokio::task::spawn_blocking(read).await.unwrap_or_else(|_| Err(Error::internal("reading certificates panicked")))
    }
}

fn is_pem(pem_or_path: &str) -> bool {
    pem_or_path.contains("-----BEGIN")
}

/// A key that lacks its first line looks like a path, and is none to be shown; nor is one that was given as something else. A path
/// has a dot or begins with a slash, and the letters of a key have no dot.
fn shown_path(what: &str, path: &str) -> String {
    let is_path = path.contains('.') || path.starts_with('/');
    match path.len() {
        length if what == "key" || !is_path || length > 256 || path.contains('\n') => format!("(of {length} bytes, not shown)"),
        _ => format!("{path:?}"),
    }
}

fn read_pem(what: &str, pem_or_path: String) -> Result<String> {
    if is_pem(&pem_or_path) {
        return Ok(pem_or_path);
    }
    std::fs::read_to_string(&pem_or_path).map_err(|error| {
        let shown = shown_path(what, &pem_or_path);
        Error::invalid(format!(
            "{what} {shown} is neither PEM text with its BEGIN line nor the path of a file that can be read: {error}"
        ))
    })
}

/// A target without what may be a user and a password in it.
fn without_user(text: &str) -> String {
    let hide = |part: &str| match (part.rsplit_once('@'), part.split_once("://")) {
        (None, _) => part.to_owned(),
        (Some((_, host)), Some((scheme, _))) => format!("{scheme}://…@{host}"),
        (Some((_, host)), None) => format!("…@{host}"),
    };
    text.split(',').map(hide).collect::<Vec<_>>().join(",")
}

/// Where locks live, parsed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Address {
    /// `memory:NAME`, in this process.
    Memory(String),
    /// URLs of etcd's members, each with its scheme.
    Etcd(Vec<String>),
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Address::Memory(name) => write!(f, "memory:{name}"),
            Address::Etcd(urls) => f.write_str(&urls.join(",")),
        }
    }
}

/// One target as text, or a list of endpoints. An empty text means: `$ETCDLOCK_ENDPOINTS`, else
/// `127.0.0.1:2379`.
#[derive(Clone, Debug)]
pub struct Target(Vec<String>);

impl From<&str> for Target {
    fn from(text: &str) -> Self {
        Target(vec![text.to_owned()])
    }
}

impl From<String> for Target {
    fn from(text: String) -> Self {
        Target(vec![text])
    }
}

impl From<&String> for Target {
    fn from(text: &String) -> Self {
        Target(vec![text.clone()])
    }
}

impl<S: Into<String>> From<Vec<S>> for Target {
    fn from(list: Vec<S>) -> Self {
        Target(list.into_iter().map(Into::into).collect())
    }
}

impl Target {
    /// The target of the environment: `$ETCDLOCK_ENDPOINTS`, else `127.0.0.1:2379`.
    pub fn from_env() -> Self {
        Target(vec![String::new()])
    }

    pub(crate) fn parse(&self, connection: &Connection) -> Result<Address> {
        if self.0.is_empty() {
            return Err(Error::invalid("the list of endpoints is empty: name at least one, such as \"127.0.0.1:2379\""));
        }
        let text = self.0.join(",");
        if text.trim().is_empty() {
            let from_env = std::env::var("ETCDLOCK_ENDPOINTS").ok().filter(|v| !v.trim().is_empty());
            return parse_address(from_env.as_deref().unwrap_or(DEFAULT_TARGET), connection);
        }
        parse_address(&text, connection)
    }
}

fn parse_address(text: &str, connection: &Connection) -> Result<Address> {
    if let Some(name) = text.trim().strip_prefix("memory:") {
        if name.contains(',') {
            return Err(Error::invalid(format!("target {text:?}: a memory: target stands alone, not in a list")));
        }
        return Ok(Address::Memory(name.to_owned()));
    }
    let wants_tls = connection.has_files();
    let mut urls = Vec::new();
    for part in text.split(',') {
        let url = parse_endpoint(part.trim(), text, wants_tls)?;
        if !urls.contains(&url) {
            urls.push(url);
        }
    }
    let secure = urls.iter().filter(|url| url.starts_with("https://")).count();
    if wants_tls && secure < urls.len() {
        return Err(Error::invalid(format!(
            "target {text:?}: certificates are given, but http:// does not use them; say https://"
        )));
    }
    Ok(Address::Etcd(urls))
}

fn parse_endpoint(part: &str, text: &str, wants_tls: bool) -> Result<String> {
    let (text, part_shown) = (&without_user(text), without_user(part));
    let bad = |why: &str| {
        Error::invalid(format!(
            "target {text:?}: endpoint {part_shown:?} {why}; write host:port, http://host:port or https://host:port"
        ))
    };
    if part.is_empty() {
        return Err(bad("is empty"));
    }
    let (scheme, rest) = match part.split_once("://") {
        Some((scheme @ ("http" | "https"), rest)) => (scheme, rest),
        Some((scheme, _)) => return Err(bad(&format!("has the unknown scheme {scheme:?} (known: http, https, memory:)"))),
        None => (if wants_tls { "https" } else { "http" }, part),
    };
    let authority = rest.trim_end_matches('/');
    if authority.is_empty() {
        return Err(bad("has no host"));
    }
    if authority.contains('@') {
        return Err(bad("has a user in it; give user and password as options"));
    }
    if authority.contains(['/', '?', '#']) || authority.contains(char::is_whitespace) {
        return Err(bad("has more than a host and a port"));
    }
    let uri: tonic::codegen::http::Uri =
        format!("{scheme}://{authority}").parse().map_err(|e| bad(&format!("is no address ({e})")))?;
    let Some(host) = uri.host().filter(|host| !host.is_empty()) else { return Err(bad("has no host")) };
    let after_host = authority.strip_prefix(host).unwrap_or_default();
    let port = match after_host.strip_prefix(':') {
        None => 2379,
        Some(port) => port.parse::<u16>().ok().filter(|p| *p != 0).ok_or_else(|| bad("has a port that is not 1 to 65535"))?,
    };
    Ok(format!("{scheme}://{host}:{port}"))
}

/// Checks a lock name, which is used as given.
pub(crate) fn check_name(name: &str) -> Result<()> {
    if name.is_empty() {
        return Err(Error::invalid("the lock name \"\" is empty: give it at least one character"));
    }
    if name.len() > MAX_NAME {
        let start: String = name.chars().take(32).collect();
        return Err(Error::invalid(format!("the lock name {start:?}… has {} bytes: at most {MAX_NAME}", name.len())));
    }
    if name.contains('\0') {
        return Err(Error::invalid(format!("the lock name {name:?} contains a NUL byte, which is not allowed")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Address> {
        Target::from(text).parse(&Options::default().connection())
    }

    fn etcd(urls: &[&str]) -> Address {
        Address::Etcd(urls.iter().map(|u| (*u).to_owned()).collect())
    }

    #[test]
    fn endpoints_are_written_in_several_ways() {
        assert_eq!(parse("a:1").unwrap(), etcd(&["http://a:1"]));
        assert_eq!(parse("a").unwrap(), etcd(&["http://a:2379"]));
        assert_eq!(parse("http://a:1/, https://b:2").unwrap(), etcd(&["http://a:1", "https://b:2"]));
        assert_eq!(parse("a:1,a:1").unwrap(), etcd(&["http://a:1"]));
        assert_eq!(parse("[::1]:2379").unwrap(), etcd(&["http://[::1]:2379"]));
        assert_eq!(parse("memory:").unwrap(), Address::Memory(String::new()));
        assert_eq!(parse("memory:x").unwrap(), Address::Memory("x".into()));
        assert_eq!(
            Target::from(vec!["a:1", "b:2"]).parse(&Options::default().connection()).unwrap(),
            etcd(&["http://a:1", "http://b:2"])
        );
    }

    #[test]
    fn a_bad_target_is_named_with_the_rule() {
        for (text, part) in [
            ("redis://a:1", "unknown scheme \"redis\""),
            ("http://", "no host"),
            ("a:1,,b:1", "is empty"),
            ("a:0", "port"),
            ("a:99999", "port"),
            ("a:x", "port"),
            ("http://a:1/path", "more than a host"),
            ("http://u:p@a:1", "has a user in it"),
            ("memory:a,memory:b", "stands alone"),
            ("a b", "more than a host"),
        ] {
            let error = parse(text).expect_err(text);
            assert_eq!(error.kind(), crate::ErrorKind::Invalid, "{text}");
            assert!(error.message().contains(part), "{text}: {error}");
        }
        for text in ["http://u:hunter2@a:1", "u:hunter2@a:1", "b:1,https://u:hun,ter2@a:1", "u:hunter2@a:1 x", "x://u:hunter2@a"]
        {
            let error = parse(text).expect_err(text);
            assert!(!error.message().contains("ter2"), "{error}");
        }
        assert!(Target::from(Vec::<String>::new()).parse(&Options::default().connection()).is_err());
    }

    #[test]
    fn a_key_that_is_no_pem_is_not_shown() {
        for key in ["MC4CAQAwBQYDK2VwBCIEIHunter2", "line\nhunter2", &"hunter2".repeat(300)] {
            let error = read_pem("key", key.to_owned()).expect_err("no such file");
            assert!(!error.message().to_lowercase().contains("hunter2"), "{error}");
        }
        // Given in the place of something else.
        for what in ["ca", "cert"] {
            let error = read_pem(what, "MC4CAQAwBQYDK2VwBCIEIHunter2+/=".to_owned()).expect_err("no such file");
            assert!(!error.message().contains("Hunter2"), "{error}");
            for path in ["/no/such/file", "no/such/file.pem", "./file"] {
                let error = read_pem(what, path.to_owned()).expect_err("no such file");
                assert!(error.message().contains(path), "{error}");
            }
        }
    }

    #[test]
    fn options_are_checked_at_once() {
        let s = Duration::from_secs;
        for (options, part) in [
            (Options::default().ttl(s(1)), "too short"),
            (Options::default().ttl(s(90_000)), "too long"),
            (Options::default().connect_timeout(s(0)), "connect_timeout"),
            (Options::default().max_hold(s(0)), "max_hold"),
            (Options::default().max_hold(Duration::MAX), "max_hold"),
            (Options::default().user("u"), "without a password"),
            (Options::default().password("p"), "without a user"),
            (Options::default().cert("c"), "without key"),
            (Options::default().key("k"), "without cert"),
        ] {
            let error = options.check().expect_err(part);
            assert!(error.message().contains(part), "{error}");
        }
        assert_eq!(Options::default().ttl(Duration::from_millis(2500)).ttl_seconds(), 3);
        assert!(!format!("{:?}", Options::default().user("u").password("secret")).contains("secret"));
    }

    #[test]
    fn names_are_checked() {
        assert!(check_name("a/b ü").is_ok());
        assert!(check_name(&"x".repeat(1024)).is_ok());
        for name in ["", "a\0b", &"x".repeat(1025)] {
            assert_eq!(check_name(name).expect_err("bad").kind(), crate::ErrorKind::Invalid);
        }
    }
}
