//! The Corefile's syntax: lines of words, some with a block of lines. What the words mean is `plan`'s business. Pure.
//!
//! Source: the Caddyfile grammar that CoreDNS uses. Words are separated by blanks, `"` begins a word that may hold blanks
//! and line ends, `#` a comment, `{` at the end of a line a block that `}` on a line of its own ends.

/// Blocks within blocks; a Corefile needs two.
const MAX_DEPTH: usize = 8;

/// One line and the block behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Line {
    /// Counted from one.
    pub(super) number: usize,
    /// Never empty.
    pub(super) words: Vec<String>,
    /// `None` where there is no `{`.
    pub(super) block: Option<Vec<Line>>,
}

/// Why a text, or a line that is well-formed by itself, cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {what}")]
pub(super) struct Fault {
    pub(super) line: usize,
    pub(super) what: String,
}

impl Fault {
    pub(super) fn new(line: usize, what: impl Into<String>) -> Self {
        Self { line, what: what.into() }
    }
}

/// Every line of the text, or the first fault.
pub(super) fn parse(text: &str) -> Result<Vec<Line>, Fault> {
    let mut lines = words(text)?.into_iter().peekable();
    let mut open: Vec<(Line, Vec<Line>)> = Vec::new();
    let mut top = Vec::new();
    for (number, mut words) in lines.by_ref() {
        if words == ["}"] {
            let Some((mut line, block)) = open.pop() else {
                return Err(Fault::new(number, "'}' ends no block; remove it"));
            };
            line.block = Some(block);
            open.last_mut().map_or(&mut top, |(_, block)| block).push(line);
            continue;
        }
        if let Some(at) = words
            .iter()
            .position(|word| word == "}" || word == "{")
            .filter(|at| at + 1 < words.len() || words[*at] == "}")
        {
            return Err(Fault::new(
                number,
                format!(
                    "{:?} stands within a line; write '{{' at its end and '}}' on one of its own",
                    words[at]
                ),
            ));
        }
        let opens = words.last().is_some_and(|word| word == "{");
        if opens {
            words.pop();
            if words.is_empty() {
                return Err(Fault::new(
                    number,
                    "'{' begins a block of nothing; write what it is of before it",
                ));
            }
            if open.len() == MAX_DEPTH {
                return Err(Fault::new(number, "blocks within blocks within blocks: too many"));
            }
            open.push((Line { number, words, block: None }, Vec::new()));
        } else {
            open.last_mut().map_or(&mut top, |(_, block)| block).push(Line { number, words, block: None });
        }
    }
    match open.pop() {
        Some((line, _)) => Err(Fault::new(
            line.number,
            "the block that begins here does not end; write '}' on a line of its own",
        )),
        None => Ok(top),
    }
}

/// Words by line; lines without any are left out.
fn words(text: &str) -> Result<Vec<(usize, Vec<String>)>, Fault> {
    let mut lines: Vec<(usize, Vec<String>)> = Vec::new();
    let mut number = 1;
    let mut fresh = true;
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        let word = match character {
            '\n' => {
                number += 1;
                // A comma at the end of a line goes on in the next.
                fresh =
                    !lines.last().and_then(|(_, words)| words.last()).is_some_and(|word| word.ends_with(','));
                continue;
            }
            blank if blank.is_whitespace() => continue,
            '#' => {
                while characters.next_if(|next| *next != '\n').is_some() {}
                continue;
            }
            '"' => {
                let begun_at = number;
                let mut word = String::new();
                loop {
                    match characters.next() {
                        Some('"') => break,
                        Some('\\') if characters.next_if_eq(&'"').is_some() => word.push('"'),
                        Some(other) => {
                            number += usize::from(other == '\n');
                            word.push(other);
                        }
                        None => {
                            return Err(Fault::new(begun_at, "the quotation that begins here does not end"));
                        }
                    }
                }
                word
            }
            first => {
                let mut word = String::from(first);
                while let Some(next) = characters.next_if(|next| !next.is_whitespace()) {
                    word.push(next);
                }
                word
            }
        };
        match lines.last_mut() {
            Some((_, words)) if !fresh => words.push(word),
            _ => lines.push((number, vec![word])),
        }
        fresh = false;
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lines_words_blocks_quotations_and_comments_are_told_apart() {
        let text = "# ours\nexample.com:53,\n  example.org {\n  errors # all\n  template IN A {\n    answer \"{{ .Name }} 60\n IN \\\"A\\\"\"\n  }\n}\n";
        let lines = parse(text).unwrap();
        assert_eq!(lines.len(), 1);
        assert_eq!(
            (lines[0].number, lines[0].words.as_slice()),
            (2, &["example.com:53,".to_owned(), "example.org".to_owned()][..])
        );
        let block = lines[0].block.as_ref().unwrap();
        assert_eq!(block[0], Line { number: 4, words: vec!["errors".to_owned()], block: None });
        let answer = &block[1].block.as_ref().unwrap()[0];
        assert_eq!(answer.words, ["answer", "{{ .Name }} 60\n IN \"A\""]);
    }

    #[test]
    fn a_fault_is_told_with_its_line() {
        let faults = [
            ("a {\n b\n", "line 1: the block that begins here does not end"),
            ("a\n}\n", "line 2: '}' ends no block"),
            ("\n{\n}\n", "line 2: '{' begins a block of nothing"),
            ("a { b\n}\n", "line 1: \"{\" stands within a line"),
            ("a {\n b }\n}\n", "line 2: \"}\" stands within a line"),
            ("a\n\"b\nc", "line 2: the quotation that begins here does not end"),
        ];
        for (text, expected) in faults {
            let fault = parse(text).unwrap_err().to_string();
            assert!(fault.starts_with(expected), "{text:?}: {fault}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "[a-z{}\"#\\\\ \n,.]{0,80}") {
            let _ = parse(&text);
        }
    }
}
