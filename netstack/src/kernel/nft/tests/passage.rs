//! Our ways through the firewalls of other programs, as those programs and `iptables` itself see them.

use super::super::passage::{Outcome, Passages};
use super::*;

fn accept(hook: Hook, mut statements: Vec<Statement>) -> Passage {
    statements.extend([Statement::Counter, Statement::Verdict(Verdict::Accept)]);
    Passage { hook, rule: Rule::new(statements).comment("weft: test") }
}

fn equals(field: Field, value: Datum) -> Statement {
    Statement::Match { field, negated: false, value }
}

fn wanted() -> Vec<Passage> {
    let pods = || Datum::NamePrefix("weftp".into());
    let mut passages: Vec<Passage> = [Field::InputLink, Field::OutputLink]
        .map(|field| accept(Hook::Forward, vec![equals(field, pods())]))
        .into();
    for (field, address) in [(Field::Ip4Destination, "10.96.0.10"), (Field::Ip6Destination, "fd96::a")] {
        passages
            .push(accept(Hook::Input, vec![equals(Field::InputLink, pods()), equals(field, ip(address))]));
    }
    passages
}

fn nothing_to_do(passages: &mut Passages) {
    for trust in [Trust::Shadow, Trust::Nothing] {
        assert_eq!(passages.ensure(&wanted(), trust).unwrap().changed, [""; 0]);
    }
}

#[test]
fn chains_of_iptables_that_drop_let_ours_through_and_stay_readable_for_iptables() {
    in_namespace(|| {
        run(
            "iptables-nft -P FORWARD DROP; iptables-nft -A FORWARD -s 192.0.2.9 -j ACCEPT; iptables-nft -P INPUT DROP",
        );
        run("ip6tables-nft -P FORWARD DROP; iptables-nft -t nat -A POSTROUTING -j MASQUERADE");
        let mut passages = Passages::default();
        let Outcome { changed, open } = passages.ensure(&wanted(), Trust::Nothing).unwrap();
        assert_eq!(open, ["ip filter FORWARD", "ip filter INPUT", "ip6 filter FORWARD"]);
        assert_eq!(changed.len(), 2 + 1 + 2, "{changed:#?}");
        nothing_to_do(&mut passages);
        let listed = run("iptables-nft -S; ip6tables-nft -S");
        for rule in ["-A FORWARD -i weftp+", "-A FORWARD -o weftp+", "-A INPUT -d 10.96.0.10/32 -i weftp+"] {
            assert!(listed.contains(rule), "{rule} in {listed}");
        }
        let ours_first = listed.find("weftp+") < listed.find("192.0.2.9");
        assert!(ours_first, "{listed}");

        run("iptables-nft -F FORWARD");
        assert_eq!(passages.ensure(&wanted(), Trust::Shadow).unwrap().changed.len(), 2, "put back");
        run("iptables-nft -P FORWARD ACCEPT");
        let outcome = passages.ensure(&wanted(), Trust::Shadow).unwrap();
        assert_eq!(outcome.changed.len(), 2, "no longer needed: {:#?}", outcome.changed);
        assert_eq!(outcome.open, ["ip filter INPUT", "ip6 filter FORWARD"]);

        passages.ensure(&[], Trust::Shadow).unwrap();
        assert!(!run("nft list ruleset").contains("weft"), "{}", run("nft list ruleset"));
        assert_eq!(Passages::default().ensure(&[], Trust::Nothing).unwrap(), Outcome::default());
    });
}

#[test]
fn only_filter_chains_of_others_that_end_in_a_drop_are_touched() {
    in_namespace(|| {
        run("nft -f - <<'END'
table inet firewalld {
  chain filter_FORWARD { type filter hook forward priority filter + 10; policy accept;
    ct state established,related accept
    iifname \"br0\" drop
    counter log prefix \"no \" reject with icmpx type admin-prohibited
  }
  chain filter_INPUT { type filter hook input priority filter + 10; policy accept;
    iifname \"eth0\" drop
  }
  chain filter_OUTPUT { type filter hook output priority filter + 10; policy drop; }
}
table inet weft-other {
  chain forward { type filter hook forward priority filter; policy drop; }
}
table ip open {
  chain forward { type filter hook forward priority filter; policy accept; drop; accept; }; chain jumped { drop; };
}
table bridge br { chain forward { type filter hook forward priority 0; policy drop; }; }
table ip6 closed { chain forward { type filter hook forward priority filter; policy accept; counter drop; }; }
END");
        let before = sorted_listing();
        let mut passages = Passages::default();
        let outcome = passages.ensure(&wanted(), Trust::Nothing).unwrap();
        assert_eq!(outcome.open, ["inet firewalld filter_FORWARD", "ip6 closed forward"]);
        nothing_to_do(&mut passages);
        let rule = "iifname \"weftp*\" counter packets 0 bytes 0 accept comment \"weft: test\"";
        assert_eq!(listing().matches(rule).count(), 2, "{}", listing());
        passages.ensure(&[], Trust::Shadow).unwrap();
        assert_eq!(sorted_listing(), before);
    });
}

#[test]
fn a_rule_of_ours_from_another_build_is_replaced() {
    in_namespace(|| {
        run(
            "nft 'add table inet f; add chain inet f forward { type filter hook forward priority 0; policy drop; }'",
        );
        let old = accept(Hook::Forward, vec![equals(Field::InputLink, Datum::Name("weft0".into()))]);
        Passages::default().ensure(&[old.clone(), old], Trust::Nothing).unwrap();
        assert_eq!(listing().matches("\"weft0\"").count(), 2);
        let outcome = Passages::default().ensure(&wanted(), Trust::Nothing).unwrap();
        assert_eq!(outcome.changed.len(), 4, "{:#?}", outcome.changed);
        assert!(!listing().contains("\"weft0\""));
    });
}

#[test]
fn only_the_commits_of_others_are_noticed() {
    in_namespace(|| {
        let mut commits = Commits::open().unwrap();
        let mut owner = NftTable::new("weft-proxy");
        owner.apply(&table("weft-proxy"), Trust::Nothing).unwrap();
        run(
            "nft 'add table inet f; add chain inet f forward { type filter hook forward priority 0; policy drop; }'",
        );
        assert!(commits.foreign().unwrap());
        Passages::default().ensure(&wanted(), Trust::Nothing).unwrap();
        NftTable::delete("weft-proxy").unwrap();
        assert!(!commits.foreign().unwrap(), "ours are not news");
        run("nft flush ruleset");
        assert!(commits.foreign().unwrap());
        assert!(!commits.foreign().unwrap(), "told once");
    });
}
