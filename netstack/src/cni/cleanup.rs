//! For `weft cleanup`: every object of CNI's in the kernel goes. Pods lose their network with it.

use weft_model::constants::{POD_LINK_PREFIX, SHAPER_LINK_PREFIX, TABLE_CNI};

use crate::kernel::link::Links;
use crate::kernel::nft::NftTable;
use crate::reconcile::{Applied, chain};

/// Deletes every pod link (their routes, neighbours and peers go with them), every IFB device of ours and table `weft-cni`.
pub async fn remove_all(handle: &rtnetlink::Handle) -> Applied {
    let mut applied = Applied::default();
    let links = Links::new(handle.clone());
    for prefix in [POD_LINK_PREFIX, SHAPER_LINK_PREFIX] {
        match links.list_by_prefix(prefix).await {
            Err(error) => applied.failed.push(chain(&error)),
            Ok(found) => {
                for link in found {
                    match links.delete(&link.name).await {
                        Ok(_) => applied.changed.push(format!("delete link {}", link.name)),
                        Err(error) => applied.failed.push(chain(&error)),
                    }
                }
            }
        }
    }
    match NftTable::delete(TABLE_CNI) {
        Ok(true) => applied.changed.push(format!("delete table {TABLE_CNI}")),
        Ok(false) => {}
        Err(error) => applied.failed.push(chain(&error)),
    }
    applied
}
