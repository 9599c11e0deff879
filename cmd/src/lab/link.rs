//! The cables of the lab: the bridge, a veth from it to each machine, addresses and default routes. Every function
//! works in the network namespace of the calling thread and blocks until netlink has answered.

use std::fs::File;
use std::net::IpAddr;
use std::os::fd::AsRawFd;

use anyhow::Context;
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags};
use rtnetlink::{Handle, LinkBridge, LinkUnspec, LinkVeth, RouteMessageBuilder};
use sha2::{Digest as _, Sha256};

pub(super) const BRIDGE: &str = "lan";

/// Runs one conversation with the kernel over a netlink socket of this thread's network namespace.
fn converse<T>(talk: impl AsyncFnOnce(Handle) -> anyhow::Result<T>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection().context("open a netlink socket")?;
        tokio::spawn(connection);
        talk(handle).await
    })
}

fn index_of(name: &str) -> anyhow::Result<u32> {
    if_nametoindex(name).with_context(|| format!("no link {name}"))
}

/// Sets the loopback interface up, as container runtimes do for pods.
pub(super) fn set_loopback_up() -> anyhow::Result<()> {
    let index = index_of("lo")?;
    converse(async |netlink| {
        let up = LinkUnspec::new_with_index(index).up().build();
        netlink.link().change(up).execute().await.context("set lo up")
    })
}

/// Makes the switch: a bridge with the LAN's gateway addresses. Without multicast snooping, which needs a querier
/// to let neighbour discovery through.
pub(super) fn make_switch(addresses: &[(IpAddr, u8)]) -> anyhow::Result<()> {
    set_loopback_up()?;
    converse(async |netlink| {
        let bridge = LinkBridge::new(BRIDGE).mcast_snooping(false).address(mac_of("lan")).up().build();
        netlink.link().add(bridge).execute().await.context("add the bridge")?;
        let index = index_of(BRIDGE)?;
        add_addresses(&netlink, index, addresses).await
    })
}

/// In the switch's namespace: a fresh port named as the machine, the other end handed to `machine` (a network
/// namespace) as the link that the result names.
pub(super) fn plug_in(port: &str, machine: &File) -> anyhow::Result<String> {
    let far = format!("x-{port}");
    converse(async |netlink| {
        // A port of the same name is what is left of the machine before its reboot.
        if let Ok(index) = if_nametoindex(port) {
            match netlink.link().del(index).execute().await {
                // The kernel removes it too, when it gets to the end of the old network namespace.
                Err(rtnetlink::Error::NetlinkError(error)) if -error.raw_code() == Errno::ENODEV as i32 => {}
                other => other.with_context(|| format!("remove old port {port}"))?,
            }
        }
        let pair = LinkVeth::new(port, &far).build();
        netlink.link().add(pair).execute().await.with_context(|| format!("add port {port}"))?;
        let (near_index, far_index) = (index_of(port)?, index_of(&far)?);
        let attach = LinkUnspec::new_with_index(near_index).controller(index_of(BRIDGE)?).up().build();
        netlink.link().change(attach).execute().await.with_context(|| format!("attach port {port}"))?;
        let hand_over = LinkUnspec::new_with_index(far_index).setns_by_fd(machine.as_raw_fd()).build();
        netlink.link().change(hand_over).execute().await.with_context(|| format!("hand over {far}"))
    })?;
    Ok(far)
}

/// A machine keeps its MAC address over reboots, as hardware does; a bridge of which none is given changes it with its
/// ports. Locally administered, from the name.
fn mac_of(machine: &str) -> Vec<u8> {
    [&[0x02], &Sha256::digest(machine)[..5]].concat()
}

/// In the machine's namespace: makes `eth0` of the link that arrived, with addresses and default routes.
pub(super) fn configure(
    machine: &str,
    link: &str,
    addresses: &[(IpAddr, u8)],
    gateways: &[IpAddr],
) -> anyhow::Result<()> {
    set_loopback_up()?;
    converse(async |netlink| {
        let index = index_of(link)?;
        let rename = LinkUnspec::new_with_index(index).name("eth0").address(mac_of(machine)).up().build();
        netlink.link().change(rename).execute().await.context("set eth0 up")?;
        add_addresses(&netlink, index, addresses).await?;
        for gateway in gateways {
            let route = RouteMessageBuilder::<IpAddr>::new().output_interface(index);
            let route = match gateway {
                IpAddr::V4(_) => route.destination_prefix(IpAddr::from([0, 0, 0, 0]), 0)?,
                IpAddr::V6(_) => route.destination_prefix(IpAddr::from([0_u16; 8]), 0)?,
            };
            let route = route.gateway(*gateway)?.build();
            netlink.route().add(route).execute().await.with_context(|| format!("route via {gateway}"))?;
        }
        Ok(())
    })
}

/// Adds addresses without duplicate-address detection: the lab gives each once, and waiting costs a second.
async fn add_addresses(netlink: &Handle, index: u32, addresses: &[(IpAddr, u8)]) -> anyhow::Result<()> {
    for (address, prefix) in addresses {
        let mut request = netlink.address().add(index, *address, *prefix);
        if address.is_ipv6() {
            let message = request.message_mut();
            message.header.flags |= AddressHeaderFlags::Nodad;
            message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        match request.execute().await {
            Err(rtnetlink::Error::NetlinkError(error)) if -error.raw_code() == Errno::EEXIST as i32 => {}
            other => other.with_context(|| format!("add address {address}/{prefix}"))?,
        }
    }
    Ok(())
}
