//! What is said on standard error. It is never in the way of what has to be done: a full disk, a reader that is gone and one that
//! does not read hold up nobody and bring nobody down.

use std::io::Write;
use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};
use std::time::Duration;

/// More than this is not kept for a reader that does not read.
const KEPT: usize = 1000;
/// How long the end waits for such a reader.
const PATIENCE: Duration = Duration::from_millis(300);

/// Says something at once, for those who have nothing else to do.
pub(crate) fn complain(text: &str) {
    let _ = writeln!(std::io::stderr(), "etcdlock: {}", plain(text));
}

/// What others have written, for a terminal or a log: what would move the cursor, colour, turn the writing round or begin a line
/// of its own is spelled out.
pub(crate) fn plain(text: &str) -> String {
    let spell = |c: char| match c {
        '"' | '\'' | '\\' => String::from(c),
        c => c.escape_debug().to_string(),
    };
    text.chars().map(spell).collect()
}

/// The same, not longer than a person reads.
pub(crate) fn short(text: &str) -> String {
    const MOST: usize = 100;
    let start: String = text.chars().take(MOST).collect();
    plain(&start) + if start.len() < text.len() { "…" } else { "" }
}

/// Says things from a thread of its own.
pub(crate) struct Speaker {
    words: Option<SyncSender<String>>,
    all_said: Receiver<()>,
}

impl Speaker {
    pub(crate) fn start() -> std::io::Result<Speaker> {
        let (words, inbox) = sync_channel::<String>(KEPT);
        let (done, all_said) = channel();
        std::thread::Builder::new().name("etcdlock-speak".into()).spawn(move || {
            for text in inbox {
                let mut stderr = std::io::stderr();
                let _ = stderr.write_all(text.as_bytes()).and_then(|()| stderr.flush());
            }
            let _ = done.send(());
        })?;
        Ok(Speaker { words: Some(words), all_said })
    }

    pub(crate) fn say(&self, text: impl Into<String>) {
        let _ = self.words.as_ref().map(|words| words.try_send(text.into()));
    }

    pub(crate) fn line(&self, text: &str) {
        self.say(format!("etcdlock: {}\n", plain(text)));
    }
}

impl Drop for Speaker {
    fn drop(&mut self) {
        self.words = None;
        let _ = self.all_said.recv_timeout(PATIENCE);
    }
}

#[cfg(test)]
mod tests {
    use super::{plain, short};

    #[test]
    fn what_others_have_written_is_shown_harmlessly() {
        assert_eq!(plain("worker-7 \"a\" 'b' c\\d é 日本"), "worker-7 \"a\" 'b' c\\d é 日本");
        for hostile in ["\x1b[2J", "a\nholds  me", "\r", "\u{202e}txt", "\u{200b}", "\u{9b}31m", "\u{2028}", "\0"] {
            let shown = plain(hostile);
            assert!(shown.chars().all(|c| !c.is_control() && !"\u{202e}\u{200b}\u{2028}".contains(c)), "{shown:?}");
        }
        assert_eq!(short(&"x".repeat(70_000)).chars().count(), 101);
    }
}
