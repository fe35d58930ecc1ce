//! A screen that is drawn again and again, in the terminal of stdout.

use std::io::{self, IsTerminal as _, Write};

use terminal_size::{Height, Width, terminal_size};

/// Where the size of the terminal is not known.
const SIZE: (usize, usize) = (80, 24);

/// The terminal's other screen, without a cursor, until this is dropped: then the terminal is as it was.
pub(super) struct Screen(());

impl Screen {
    /// `None` if stdout is no terminal.
    pub(super) fn open() -> io::Result<Option<Self>> {
        if !io::stdout().is_terminal() {
            return Ok(None);
        }
        write("\x1b[?1049h\x1b[?25l")?;
        Ok(Some(Self(())))
    }

    /// Draws a text over the one before.
    pub(super) fn draw(&self, text: &str) -> io::Result<()> {
        let size = terminal_size();
        let size =
            size.map_or(SIZE, |(Width(width), Height(height))| (width.into(), height.into()));
        write(&drawn(text, size))
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // There is nobody left to tell.
        let _ = write("\x1b[?25h\x1b[?1049l");
    }
}

fn write(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

/// The text from the upper left corner on. Nothing is cleared that is not written again at once, and nothing
/// is written beyond the edges: that would move what is there.
fn drawn(text: &str, (width, height): (usize, usize)) -> String {
    let all: Vec<&str> = text.lines().collect();
    let mut lines: Vec<String> =
        all.iter().take(height).map(|line| line.chars().take(width).collect()).collect();
    if all.len() > height
        && let Some(last) = lines.last_mut()
    {
        let more = all.len() + 1 - height;
        *last =
            format!("… {more} more lines: the terminal is too low").chars().take(width).collect();
    }
    format!("\x1b[H{}\x1b[K\x1b[J", lines.join("\x1b[K\r\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_screen_is_drawn_over_the_one_before_and_within_its_edges() {
        assert_eq!(drawn("a\nb\n", (80, 24)), "\x1b[Ha\x1b[K\r\nb\x1b[K\x1b[J");
        assert_eq!(drawn("äbc", (2, 24)), "\x1b[Häb\x1b[K\x1b[J");
        // As many lines as there is room for are no reason to leave some out.
        assert_eq!(drawn("a\nb\n", (80, 2)), "\x1b[Ha\x1b[K\r\nb\x1b[K\x1b[J");
        let cut = drawn("a\nb\nc\n", (80, 2));
        assert_eq!(cut, "\x1b[Ha\x1b[K\r\n… 2 more lines: the terminal is too low\x1b[K\x1b[J");
    }
}
