//! What the server answers when it does not do what was asked: `metav1.Status`, with the codes and reasons of the
//! Kubernetes API conventions ("Response Status Kind"). In: one [`ApiError`] value. Out: code and JSON.

use serde_json::{Value, json};

use crate::resources::Resource;

/// One field that is wrong (`StatusCause`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cause {
    /// `FieldValueInvalid`, `FieldValueRequired`, ...
    pub reason: &'static str,
    pub message: String,
    /// Path of the field, such as `spec.ports[0].port`; empty where there is none.
    pub field: String,
}

/// A refusal, complete enough to be written as a `Status`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    pub code: u16,
    /// `StatusReason`, such as `NotFound`.
    pub reason: &'static str,
    pub message: Box<str>,
    /// Plural of the resource it is about (its kind for `Invalid`), empty where there is none.
    pub kind: &'static str,
    pub group: &'static str,
    pub name: Box<str>,
    pub causes: Vec<Cause>,
    pub retry_after_seconds: Option<u32>,
}

impl ApiError {
    pub fn new(code: u16, reason: &'static str, message: impl Into<Box<str>>) -> Self {
        Self {
            code,
            reason,
            message: message.into(),
            kind: "",
            group: "",
            name: Box::default(),
            causes: Vec::new(),
            retry_after_seconds: None,
        }
    }

    #[must_use]
    pub fn about(mut self, resource: &Resource, name: &str) -> Self {
        self.kind = resource.plural;
        self.group = resource.group;
        self.name = name.into();
        self
    }

    #[must_use]
    pub fn not_found(resource: &Resource, name: &str) -> Self {
        Self::new(404, "NotFound", format!("{} \"{name}\" not found", resource.qualified()))
            .about(resource, name)
    }

    #[must_use]
    pub fn already_exists(resource: &Resource, name: &str) -> Self {
        let message = format!("{} \"{name}\" already exists", resource.qualified());
        Self::new(409, "AlreadyExists", message).about(resource, name)
    }

    #[must_use]
    pub fn conflict(resource: &Resource, name: &str, why: &str) -> Self {
        let message = format!("Operation cannot be fulfilled on {} \"{name}\": {why}", resource.qualified());
        Self::new(409, "Conflict", message).about(resource, name)
    }

    #[must_use]
    pub fn forbidden(resource: &Resource, name: &str, why: &str) -> Self {
        let message = format!("{} \"{name}\" is forbidden: {why}", resource.qualified());
        Self::new(403, "Forbidden", message).about(resource, name)
    }

    pub fn bad_request(message: impl Into<Box<str>>) -> Self {
        Self::new(400, "BadRequest", message)
    }

    /// 422 with every wrong field as a cause.
    #[must_use]
    pub fn invalid(resource: &Resource, name: &str, causes: Vec<Cause>) -> Self {
        let texts: Vec<String> = causes.iter().map(|it| format!("{}: {}", it.field, it.message)).collect();
        let list = if texts.len() == 1 { texts.concat() } else { format!("[{}]", texts.join(", ")) };
        let message = format!("{} \"{name}\" is invalid: {list}", kind_name(resource));
        let mut error = Self::new(422, "Invalid", message).about(resource, name);
        error.kind = resource.kind;
        error.causes = causes;
        error
    }

    /// 410: the history no longer reaches back to the revision asked for.
    #[must_use]
    pub fn expired(asked: u64, oldest: u64) -> Self {
        Self::new(410, "Expired", format!("too old resource version: {asked} ({oldest})"))
    }

    /// 504: the client has seen a revision this server has not reached.
    #[must_use]
    pub fn too_large_revision(asked: u64, current: u64) -> Self {
        let message = format!("Too large resource version: {asked}, current: {current}");
        let mut error = Self::new(504, "Timeout", message);
        error.causes = vec![Cause {
            reason: "ResourceVersionTooLarge",
            message: "Too large resource version".to_owned(),
            field: String::new(),
        }];
        error.retry_after_seconds = Some(1);
        error
    }

    #[must_use]
    pub fn method_not_allowed() -> Self {
        Self::new(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")
    }

    #[must_use]
    pub fn unknown_path() -> Self {
        Self::new(404, "NotFound", "the server could not find the requested resource")
    }

    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(500, "InternalError", format!("Internal error occurred: {}", message.into()))
    }

    /// The `Status` object.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let mut details = serde_json::Map::new();
        let texts = [("name", &*self.name), ("group", self.group), ("kind", self.kind)];
        for (key, text) in texts.into_iter().filter(|(_, text)| !text.is_empty()) {
            details.insert(key.to_owned(), json!(text));
        }
        if !self.causes.is_empty() {
            details.insert("causes".to_owned(), self.causes.iter().map(cause_json).collect());
        }
        if let Some(seconds) = self.retry_after_seconds {
            details.insert("retryAfterSeconds".to_owned(), json!(seconds));
        }
        json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": self.message,
            "reason": self.reason, "details": details, "code": self.code})
    }
}

fn kind_name(resource: &Resource) -> String {
    if resource.group.is_empty() {
        resource.kind.to_owned()
    } else {
        format!("{}.{}", resource.kind, resource.group)
    }
}

fn cause_json(cause: &Cause) -> Value {
    if cause.field.is_empty() {
        json!({"reason": cause.reason, "message": cause.message})
    } else {
        json!({"reason": cause.reason, "message": cause.message, "field": cause.field})
    }
}
