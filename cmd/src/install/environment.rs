//! `/etc/weft/agent.env`: the agent's flags for its unit. systemd's EnvironmentFile= and a POSIX shell read it alike.
//!
//! In: words. Out: the file's text, and back. Pure.

/// What the units read.
const VARIABLE: &str = "WEFT_AGENT_ARGS=";

const HEADER: &str = "\
# Flags of `weft agent` on this node; see `weft agent --help`. After a change restart weft-agent.
# `weft install` without flags keeps this file; with flags it writes it anew, and so does the DaemonSet.
";

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum EnvironmentError {
    #[error(
        "the value {0:?} cannot be passed on to a service: only letters, digits and any of - _ . , : / = @ % + [ ] may stand in it"
    )]
    Unsafe(String),
    #[error("there is no line {VARIABLE}\"...\"")]
    Missing,
}

/// Both readers split the value at blanks; what they would read in any other way is refused.
fn is_safe(word: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.,:/=@%+[]".contains(c);
    !word.is_empty() && word.chars().all(allowed)
}

/// The file's text for these flags.
pub(crate) fn render(words: &[String]) -> Result<String, EnvironmentError> {
    match words.iter().find(|word| !is_safe(word)) {
        Some(word) => Err(EnvironmentError::Unsafe(word.clone())),
        None => Ok(format!("{HEADER}{VARIABLE}\"{}\"\n", words.join(" "))),
    }
}

/// The flags in a file that a person may have edited; of several lines the last counts, as for both readers.
pub(crate) fn parse(text: &str) -> Result<Vec<&str>, EnvironmentError> {
    let value = text.lines().rev().find_map(|line| line.trim().strip_prefix(VARIABLE));
    let value = value.ok_or(EnvironmentError::Missing)?.trim();
    let unquoted = ['"', '\''].into_iter().find_map(|q| value.strip_prefix(q)?.strip_suffix(q));
    let words: Vec<&str> = unquoted.unwrap_or(value).split_whitespace().collect();
    match words.iter().find(|word| !is_safe(word)) {
        Some(word) => Err(EnvironmentError::Unsafe((*word).to_owned())),
        None => Ok(words),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owned(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn what_was_written_is_read_back() {
        let words = ["--api-server", "https://[fd00::1]:6443", "--log-level", "weft_dns=debug,info"];
        let text = render(&owned(&words)).unwrap();
        assert!(text.ends_with(
            "\nWEFT_AGENT_ARGS=\"--api-server https://[fd00::1]:6443 --log-level weft_dns=debug,info\"\n"
        ));
        assert_eq!(parse(&text).unwrap(), words);
    }

    #[test]
    fn what_a_service_manager_would_read_otherwise_is_refused() {
        for word in ["a b", "a\"b", "a'b", "a\\b", "$HOME", "a`b", "a;b", "a#b", "a*", "a\nb", "(a)", ""] {
            assert_eq!(render(&owned(&[word])), Err(EnvironmentError::Unsafe(word.to_owned())), "{word:?}");
        }
    }

    #[test]
    fn an_edited_file_is_read_as_its_readers_do() {
        let edited =
            "# WEFT_AGENT_ARGS=--no\nWEFT_AGENT_ARGS=--first\nOTHER=x\n  WEFT_AGENT_ARGS='--last  one' \n";
        assert_eq!(parse(edited).unwrap(), ["--last", "one"]);
        assert_eq!(parse("WEFT_AGENT_ARGS=").unwrap(), [""; 0]);
        assert_eq!(parse("#nothing\n"), Err(EnvironmentError::Missing));
        assert_eq!(
            parse("WEFT_AGENT_ARGS=\"--a 'b'\"").unwrap_err(),
            EnvironmentError::Unsafe("'b'".to_owned())
        );
    }
}
