//! The three kinds of patch: JSON patch (RFC 6902), merge patch (RFC 7386), strategic merge patch (of Kubernetes).
//! In: a request body. Out: the patched object. Server-side apply is not there: 415.

use axum::extract::Request;
use serde_json::Value;

use super::{body, content_type, strategic, unsupported_media_type};
use crate::resources::Resource;
use crate::status::ApiError;

const ACCEPTED: &str =
    "application/json-patch+json, application/merge-patch+json, application/strategic-merge-patch+json";
/// Operations in one JSON patch, as the real API server allows.
const MAX_OPERATIONS: usize = 10_000;

#[derive(Debug)]
pub(super) enum Patch {
    Json(json_patch::Patch),
    Merge(Value),
    Strategic(Value),
}

impl Patch {
    /// # Errors
    /// 415 for a kind this server lacks, 400 for a body that cannot be read.
    pub(super) async fn read(request: Request) -> Result<Self, ApiError> {
        let media_type = content_type(&request);
        let unreadable =
            |error: serde_json::Error| ApiError::bad_request(format!("error decoding patch: {error}"));
        match media_type.as_str() {
            "application/json-patch+json" => {
                let patch: json_patch::Patch =
                    serde_json::from_slice(&body(request).await?).map_err(unreadable)?;
                if patch.0.len() > MAX_OPERATIONS {
                    return Err(ApiError::new(
                        413,
                        "RequestEntityTooLarge",
                        "too many operations in the patch",
                    ));
                }
                Ok(Self::Json(patch))
            }
            "application/merge-patch+json" => Ok(Self::Merge(object(&body(request).await?)?)),
            "application/strategic-merge-patch+json" => Ok(Self::Strategic(object(&body(request).await?)?)),
            _ => Err(unsupported_media_type(ACCEPTED)),
        }
    }

    /// # Errors
    /// 422 for a JSON patch that does not fit the object, 400 for a strategic one that cannot be read.
    pub(super) fn apply(&self, resource: &Resource, mut object: Value) -> Result<Value, ApiError> {
        match self {
            Self::Json(patch) => json_patch::patch(&mut object, patch).map_err(|error| {
                ApiError::new(
                    422,
                    "Invalid",
                    format!("the server rejected our request due to an error in our request: {error}"),
                )
            })?,
            Self::Merge(patch) => json_patch::merge(&mut object, patch),
            Self::Strategic(patch) => strategic::merge(resource.kind, &mut object, patch)?,
        }
        Ok(object)
    }
}

fn object(bytes: &[u8]) -> Result<Value, ApiError> {
    let value: Value = serde_json::from_slice(bytes)
        .map_err(|error| ApiError::bad_request(format!("error decoding patch: {error}")))?;
    if value.is_object() { Ok(value) } else { Err(ApiError::bad_request("the patch must be a JSON object")) }
}
