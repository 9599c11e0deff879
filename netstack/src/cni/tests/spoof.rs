//! Anti-spoofing with real packets: sent with an address that is not the pod's, looked for at another pod.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use weft_model::constants::TABLE_CNI;

use super::rig::Rig;
use crate::kernel::netns::Netns;
use crate::kernel::nft::NftTable;
use crate::kernel::testing::{NamedNetns, needs_root};

/// Does a datagram from `source` in `client` arrive at `address` in `server`?
fn arrives(client: &NamedNetns, source: IpAddr, server: &NamedNetns, address: IpAddr) -> bool {
    let bind = |netns: &NamedNetns, address: IpAddr| {
        let netns = Netns::open(netns.path()).unwrap();
        netns.run(|| UdpSocket::bind(SocketAddr::new(address, 0)).unwrap()).unwrap()
    };
    let receiver = bind(server, address);
    receiver.set_read_timeout(Some(Duration::from_millis(400))).unwrap();
    let sender = bind(client, source);
    sender.send_to(b"it is me", receiver.local_addr().unwrap()).unwrap();
    match receiver.recv_from(&mut [0; 16]) {
        Ok((_, from)) => from.ip() == source,
        Err(_) => false,
    }
}

/// Packets that the last rule of the guard has dropped.
fn dropped(node: &NamedNetns) -> u64 {
    let table = node.must(&["nft", "list", "table", "inet", TABLE_CNI]);
    let line = table.lines().find(|line| line.contains("not an address leased to this pod")).unwrap();
    line.split_whitespace().skip_while(|word| *word != "packets").nth(1).unwrap().parse().unwrap()
}

fn elements(node: &NamedNetns) -> usize {
    let table = node.must(&["nft", "list", "table", "inet", TABLE_CNI]);
    table.matches("\" . ").count()
}

#[test]
fn a_packet_with_a_source_that_is_not_leased_to_the_pod_is_dropped() {
    if !needs_root() {
        return;
    }
    let rig = Rig::new();
    let (a, b) = (NamedNetns::new("pod"), NamedNetns::new("pod"));
    rig.node.block_on(async {
        let agent = rig.start().await;
        let (of_a, of_b) = (agent.add("a", &a).await, agent.add("b", &b).await);
        let foreign: [IpAddr; 2] = ["10.244.1.99".parse().unwrap(), "fd00:244:1::99".parse().unwrap()];
        for (number, foreign) in foreign.into_iter().enumerate() {
            a.must(&["ip", "addr", "add", &foreign.to_string(), "dev", "eth0"]);
            assert!(arrives(&a, of_a[number], &b, of_b[number]));
            let before = dropped(&rig.node);
            assert!(!arrives(&a, foreign, &b, of_b[number]), "{foreign}");
            assert!(dropped(&rig.node) > before, "{foreign}: dropped by something else");
        }
        NftTable::delete(TABLE_CNI).unwrap();
        assert!(arrives(&a, foreign[1], &b, of_b[1]), "without the table IPv6 spoofing works");
        assert_eq!(agent.cni.reconcile().await.failed, Vec::<String>::new());
        assert!(!arrives(&a, foreign[1], &b, of_b[1]));
        assert!(arrives(&a, of_a[1], &b, of_b[1]));
    });
}

#[test]
fn an_address_of_another_pod_is_foreign_too() {
    if !needs_root() {
        return;
    }
    let rig = Rig::new();
    let (a, b, c) = (NamedNetns::new("pod"), NamedNetns::new("pod"), NamedNetns::new("pod"));
    rig.node.block_on(async {
        let agent = rig.start().await;
        let of_b = agent.add("b", &b).await;
        let of_c = agent.add("c", &c).await;
        agent.add("a", &a).await;
        a.must(&["ip", "addr", "add", &of_b[1].to_string(), "dev", "eth0", "nodad"]);
        assert!(arrives(&b, of_b[1], &c, of_c[1]));
        assert!(!arrives(&a, of_b[1], &c, of_c[1]));
    });
}

#[test]
fn elements_come_with_add_go_with_del_and_survive_the_agent() {
    if !needs_root() {
        return;
    }
    let rig = Rig::new();
    let (a, b) = (NamedNetns::new("pod"), NamedNetns::new("pod"));
    rig.node.block_on(async {
        let agent = rig.start().await;
        assert_eq!(elements(&rig.node), 0);
        agent.add("a", &a).await;
        agent.add("b", &b).await;
        assert_eq!(elements(&rig.node), 4);
        agent.kill().await;
        assert_eq!(elements(&rig.node), 4);
        let agent = rig.start().await;
        assert_eq!(elements(&rig.node), 4);
        agent.del("a", &a.path()).await;
        assert_eq!(elements(&rig.node), 2);
    });
}
