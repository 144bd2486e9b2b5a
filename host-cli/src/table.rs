//! Tables as Docker's CLI prints them: columns at least ten wide, three blanks between them, nothing after the last.

/// A table with a line of headings.
#[derive(Debug)]
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these headings.
    pub(crate) fn new(headings: &[&str]) -> Self {
        Self { rows: vec![headings.iter().map(|&heading| heading.to_owned()).collect()] }
    }

    /// Adds a line.
    pub(crate) fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.map(|cell| printable(&cell)).into());
    }

    /// The text of the table.
    pub(crate) fn render(&self) -> String {
        const PADDING: usize = 3;
        const MIN_WIDTH: usize = 10;
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns)
            .map(|i| self.rows.iter().filter_map(|row| row.get(i)).map(|cell| cell.chars().count()).max())
            .map(|width| (width.unwrap_or(0) + PADDING).max(MIN_WIDTH))
            .collect();
        let mut text = String::new();
        for row in &self.rows {
            for (i, cell) in row.iter().enumerate() {
                text.push_str(cell);
                if i + 1 < row.len() {
                    text.extend(std::iter::repeat_n(' ', widths[i] - cell.chars().count()));
                }
            }
            text.push('\n');
        }
        text
    }
}

/// Names and commands come from images: what could steer a terminal is not shown.
pub(crate) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// At most `width` characters, with an ellipsis where something was cut.
pub(crate) fn ellipsis(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    text.chars().take(width.saturating_sub(1)).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_looks_like_dockers() {
        let mut table = Table::new(&["CONTAINER ID", "IMAGE", "NAMES"]);
        table.row(["0123456789ab".into(), "busybox".into(), "a".into()]);
        assert_eq!(table.render(), "CONTAINER ID   IMAGE     NAMES\n0123456789ab   busybox   a\n");
    }

    #[test]
    fn a_name_cannot_steer_the_terminal() {
        let mut table = Table::new(&["A"]);
        table.row(["\u{1b}[2Jx".into()]);
        assert!(!table.render().contains('\u{1b}'));
    }

    #[test]
    fn what_is_too_long_is_cut() {
        assert_eq!(ellipsis("abcdef", 4), "abc…");
        assert_eq!(ellipsis("abcd", 4), "abcd");
    }
}
