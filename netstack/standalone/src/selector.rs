//! Label and field selectors: parsed once per request, then asked about objects. In: query text. Out: yes or no.
//! Grammar: Kubernetes "Labels and Selectors" (equality and set based) and "Field Selectors".

use std::collections::BTreeMap;

use crate::status::ApiError;

/// One requirement; an object matches when all of its selector's requirements hold.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Requirement {
    In(String, Vec<String>),
    /// Also true when the key is absent.
    NotIn(String, Vec<String>),
    Exists(String),
    Absent(String),
    /// Numeric comparison: the label is an integer greater (or less) than the value.
    Greater(String, i64),
    Less(String, i64),
}

/// A parsed label selector; the empty one matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct LabelSelector(Vec<Requirement>);

impl LabelSelector {
    /// # Errors
    /// 400 with the part that cannot be read.
    pub(crate) fn parse(text: &str) -> Result<Self, ApiError> {
        split_top(text).into_iter().map(|it| requirement(it.trim())).collect::<Result<_, _>>().map(Self)
    }

    #[must_use]
    pub(crate) fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.0.iter().all(|requirement| match requirement {
            Requirement::In(key, values) => labels.get(key).is_some_and(|it| values.contains(it)),
            Requirement::NotIn(key, values) => labels.get(key).is_none_or(|it| !values.contains(it)),
            Requirement::Exists(key) => labels.contains_key(key),
            Requirement::Absent(key) => !labels.contains_key(key),
            Requirement::Greater(key, bound) => integer(labels, key).is_some_and(|it| it > *bound),
            Requirement::Less(key, bound) => integer(labels, key).is_some_and(|it| it < *bound),
        })
    }
}

fn integer(labels: &BTreeMap<String, String>, key: &str) -> Option<i64> {
    labels.get(key)?.parse().ok()
}

/// Splits at commas that are not inside parentheses; empty text has no parts.
fn split_top(text: &str) -> Vec<&str> {
    let (mut parts, mut start, mut depth) = (Vec::new(), 0, 0_i32);
    for (index, character) in text.char_indices() {
        match character {
            '(' => depth += 1,
            ')' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&text[start..index]);
                start = index + 1;
            }
            _ => {}
        }
    }
    if !text.trim().is_empty() {
        parts.push(&text[start..]);
    }
    parts
}

fn requirement(text: &str) -> Result<Requirement, ApiError> {
    let unreadable = || ApiError::bad_request(format!("unable to parse requirement: {text:?}"));
    if let Some(key) = text.strip_prefix('!') {
        return label_key(key.trim()).map(Requirement::Absent).ok_or_else(unreadable);
    }
    if let Some(list) = text.strip_suffix(')') {
        return set_requirement(list).ok_or_else(unreadable);
    }
    comparison(text).ok_or_else(unreadable)
}

fn comparison(text: &str) -> Option<Requirement> {
    if let Some((key, value)) = text.split_once("!=") {
        return Some(Requirement::NotIn(label_key(key.trim())?, vec![label_value(value)?]));
    }
    if let Some((key, value)) = text.split_once('=') {
        let value = value.strip_prefix('=').unwrap_or(value);
        return Some(Requirement::In(label_key(key.trim())?, vec![label_value(value)?]));
    }
    if let Some((key, value)) = text.split_once('>') {
        return Some(Requirement::Greater(label_key(key.trim())?, value.trim().parse().ok()?));
    }
    if let Some((key, value)) = text.split_once('<') {
        return Some(Requirement::Less(label_key(key.trim())?, value.trim().parse().ok()?));
    }
    label_key(text).map(Requirement::Exists)
}

/// `key in (a, b` or `key notin (a, b`, the closing parenthesis already taken.
fn set_requirement(text: &str) -> Option<Requirement> {
    let (head, list) = text.split_once('(')?;
    let (key, operator) = head.trim().rsplit_once(char::is_whitespace)?;
    let key = label_key(key.trim())?;
    let values = list.split(',').map(label_value).collect::<Option<Vec<_>>>()?;
    match operator {
        "in" => Some(Requirement::In(key, values)),
        "notin" => Some(Requirement::NotIn(key, values)),
        _ => None,
    }
}

fn label_key(text: &str) -> Option<String> {
    let legal = |it: char| it.is_ascii_alphanumeric() || "-_./".contains(it);
    (!text.is_empty() && text.chars().all(legal)).then(|| text.to_owned())
}

fn label_value(text: &str) -> Option<String> {
    let text = text.trim();
    let legal = |it: char| it.is_ascii_alphanumeric() || "-_.".contains(it);
    (text.len() <= 63 && text.chars().all(legal)).then(|| text.to_owned())
}

/// A parsed field selector: pairs of path and value, each to be equal or not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct FieldSelector(Vec<(String, bool, String)>);

impl FieldSelector {
    /// `supported` are the paths that objects of the resource carry.
    ///
    /// # Errors
    /// 400 for text that cannot be read or a path that is not supported.
    pub(crate) fn parse(text: &str, supported: &[&str]) -> Result<Self, ApiError> {
        let mut terms = Vec::new();
        for part in text.split(',').filter(|it| !it.is_empty()) {
            let (path, equal, value) = field_term(part)
                .ok_or_else(|| ApiError::bad_request(format!("invalid field selector: {part:?}")))?;
            if !supported.contains(&path) {
                return Err(ApiError::bad_request(format!("field label not supported: {path}")));
            }
            terms.push((path.to_owned(), equal, value.to_owned()));
        }
        Ok(Self(terms))
    }

    #[must_use]
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The value `path` must equal, where the selector says so: lets a list by name become a look-up.
    #[must_use]
    pub(crate) fn required(&self, path: &str) -> Option<&str> {
        self.0.iter().find(|(it, equal, _)| it == path && *equal).map(|(_, _, value)| value.as_str())
    }

    /// `field` returns the value at a supported path, empty where absent.
    pub(crate) fn matches<'a>(&self, field: impl Fn(&str) -> &'a str) -> bool {
        self.0.iter().all(|(path, equal, value)| (field(path) == value) == *equal)
    }
}

fn field_term(part: &str) -> Option<(&str, bool, &str)> {
    if let Some((path, value)) = part.split_once("!=") {
        return Some((path, false, value));
    }
    let (path, value) = part.split_once('=')?;
    Some((path, true, value.strip_prefix('=').unwrap_or(value)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    fn holds(selector: &str, pairs: &[(&str, &str)]) -> bool {
        LabelSelector::parse(selector).unwrap().matches(&labels(pairs))
    }

    #[test]
    fn equality_set_and_existence_requirements_are_all_joined() {
        let web = [("app", "web"), ("tier", "front")];
        assert!(holds("", &web));
        assert!(holds("app=web,tier==front,app in (web, db),!missing,tier", &web));
        assert!(!holds("app=web,tier=back", &web));
        assert!(!holds("app notin (web)", &web));
        assert!(holds("missing notin (x),missing!=y", &web));
        assert!(!holds("missing in (x)", &web));
        assert!(holds("size>3,size<5", &[("size", "4")]));
    }

    #[test]
    fn an_unreadable_selector_is_a_bad_request() {
        for text in ["a b", "a in x)", "=x", "a=b=c", "a,,b"] {
            assert_eq!(LabelSelector::parse(text).unwrap_err().code, 400, "{text}");
        }
    }

    #[test]
    fn fields_compare_for_equality_and_unknown_ones_are_refused() {
        let selector =
            FieldSelector::parse("metadata.name=a,status.phase!=Failed", &["metadata.name", "status.phase"])
                .unwrap();
        assert!(selector.matches(|path| if path == "metadata.name" { "a" } else { "Running" }));
        assert!(!selector.matches(|path| if path == "metadata.name" { "a" } else { "Failed" }));
        assert_eq!(selector.required("metadata.name"), Some("a"));
        assert_eq!(FieldSelector::parse("spec.foo=a", &["metadata.name"]).unwrap_err().code, 400);
    }
}
