//! What kube-proxy left, in the words of its own `iptables-restore` and `nft`.

use super::super::kube_proxy::{leftovers, remove_leftovers};
use super::*;

/// As kube-proxy 1.36 writes one Service with one endpoint, beside chains of a kubelet and rules of the host.
const RESTORED: &str = "*filter
:KUBE-SERVICES - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-FIREWALL - [0:0]
-A INPUT -j KUBE-FIREWALL
-A INPUT -i lo -j ACCEPT
-A FORWARD -m comment --comment \"kubernetes forwarding rules\" -j KUBE-FORWARD
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
COMMIT
*nat
:KUBE-SERVICES - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-SVC-NPX46M4PTMTKRN6Y - [0:0]
:KUBE-SEP-ZP3FB6NMPNCO4VBJ - [0:0]
:KUBE-ROUTER-OTHER - [0:0]
-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A POSTROUTING -j KUBE-POSTROUTING
-A POSTROUTING -o eth9 -j MASQUERADE
-A KUBE-SERVICES -p tcp -m tcp --dport 443 -j KUBE-SVC-NPX46M4PTMTKRN6Y
-A KUBE-SVC-NPX46M4PTMTKRN6Y -j KUBE-SEP-ZP3FB6NMPNCO4VBJ
-A KUBE-SEP-ZP3FB6NMPNCO4VBJ -j KUBE-MARK-MASQ
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
COMMIT
";

fn leave_rules() {
    for tool in ["iptables-nft-restore", "ip6tables-nft-restore"] {
        run(&format!("{tool} <<'END'\n{RESTORED}END"));
    }
    for family in ["ip", "ip6"] {
        run(&format!("nft add table {family} kube-proxy"));
        run(&format!(
            "nft add chain {family} kube-proxy nat-output '{{ type nat hook output priority -100; }}'"
        ));
        run(&format!("nft add chain {family} kube-proxy services"));
        run(&format!("nft add rule {family} kube-proxy nat-output jump services"));
    }
}

#[test]
fn a_host_without_kube_proxy_has_nothing_of_it() {
    in_namespace(|| {
        run("nft add table inet others; iptables-nft -N KUBE-ROUTER-FORWARD; iptables-nft -N KUBE-FIREWALL");
        let before = listing();
        assert_eq!(leftovers().unwrap(), []);
        assert_eq!(remove_leftovers().unwrap(), []);
        assert_eq!(listing(), before);
    });
}

#[test]
fn all_that_kube_proxy_left_is_found_and_goes_and_nothing_else() {
    in_namespace(|| {
        leave_rules();
        let before = listing();
        let found = leftovers().unwrap();
        let said: Vec<String> = found.iter().map(ToString::to_string).collect();
        assert_eq!(listing(), before, "looking changes nothing");
        for object in [
            "rule of chain ip filter FORWARD that jumps to KUBE-FORWARD",
            "rule of chain ip6 nat POSTROUTING that jumps to KUBE-POSTROUTING",
            "chain ip nat KUBE-SVC-NPX46M4PTMTKRN6Y",
            "nft table ip kube-proxy",
            "nft table ip6 kube-proxy",
        ] {
            assert!(said.iter().any(|line| line == object), "{object} in {said:#?}");
        }
        assert_eq!(found.len(), 2 * (4 + 7 + 1), "{said:#?}");

        assert_eq!(remove_leftovers().unwrap(), found);
        assert_eq!(leftovers().unwrap(), []);
        for tool in ["iptables-nft", "ip6tables-nft"] {
            assert_eq!(
                run(&format!("{tool} -S")),
                "-P INPUT ACCEPT\n-P FORWARD ACCEPT\n-P OUTPUT ACCEPT\n-N KUBE-FIREWALL\n-A INPUT -j KUBE-FIREWALL\n-A INPUT -i lo -j ACCEPT\n"
            );
            let nat = run(&format!("{tool} -t nat -S"));
            assert!(nat.contains("-A POSTROUTING -o eth9 -j MASQUERADE"), "{nat}");
            assert_eq!(nat.matches("KUBE").count(), 1, "{nat}");
        }
        assert!(!run("nft list tables").contains("kube-proxy"));
    });
}
