//! The kernel edge: netlink, namespaces, sysctls, the TUN device and sockets with segmentation offload; and the processor's, the
//! cipher that takes sixteen packets at once.
//! The only room with `unsafe`; each block states why it holds. No decisions are taken here.

pub mod aead;
pub mod carrier;
pub mod conntrack;
pub mod datagram;
pub mod descriptor_store;
pub mod facts;
pub mod lan;
pub mod link;
pub mod memory;
mod monitor;
pub mod netns;
pub mod nflog;
pub mod nft;
pub mod route;
pub mod rtnl;
pub mod sealed;
pub mod service_manager;
pub mod shaper;
pub mod stop;
pub mod sysctl;
#[cfg(test)]
pub(crate) mod testing;
mod train;
pub mod tun;
pub mod udp;
pub mod vip;
pub mod wireguard;
