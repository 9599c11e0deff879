//! Prints a rule-set value in the manner of `nft list table`, for golden files: one line a rule, one line an element.

use std::fmt::Write as _;

use weft_model::ruleset::{
    Base, Chain, ChainKind, CtState, Datum, ElementData, Field, Hook, KeyType, Rule, Set, SetData, Statement,
    Table, Verdict,
};

/// The whole table; sets without elements are left out.
pub fn print(table: &Table) -> String {
    let mut text = format!("table inet {} {{\n", table.name);
    for (name, set) in table.sets.iter().filter(|(_, set)| !set.groups.is_empty()) {
        print_set(&mut text, name, set);
    }
    for (name, chain) in &table.chains {
        print_chain(&mut text, name, chain);
    }
    text.push_str("}\n");
    text
}

fn print_set(text: &mut String, name: &str, set: &Set) {
    let kind = if set.data == SetData::None { "set" } else { "map" };
    let key: Vec<String> = set.key.iter().map(|key| key_type(*key)).collect();
    let _ = write!(text, "  {kind} {name} {{ type {}{}", key.join(" . "), data_type(set.data));
    if set.interval {
        text.push_str("; flags interval");
    }
    text.push('\n');
    for (group, elements) in &set.groups {
        for (key, data) in elements.iter() {
            let key: Vec<String> = key.iter().map(datum).collect();
            let _ = writeln!(text, "    {}{}  # {group}", key.join(" . "), element_data(data));
        }
    }
    text.push_str("  }\n");
}

fn print_chain(text: &mut String, name: &str, chain: &Chain) {
    let _ = writeln!(text, "  chain {name} {{");
    if let Some(base) = chain.base {
        let _ = writeln!(text, "    {}", base_line(base));
    }
    for line in &chain.rules {
        let _ = writeln!(text, "    {}", rule(line));
    }
    text.push_str("  }\n");
}

fn base_line(base: Base) -> String {
    let kind = match base.kind {
        ChainKind::Filter => "filter",
        ChainKind::Nat => "nat",
        ChainKind::Route => "route",
    };
    let hook = match base.hook {
        Hook::Prerouting => "prerouting",
        Hook::Input => "input",
        Hook::Forward => "forward",
        Hook::Output => "output",
        Hook::Postrouting => "postrouting",
    };
    format!("type {kind} hook {hook} priority {}", base.priority)
}

fn rule(rule: &Rule) -> String {
    let mut parts: Vec<String> = rule.statements.iter().map(statement).collect();
    parts.extend(rule.comment.iter().map(|comment| format!("comment \"{comment}\"")));
    parts.join(" ")
}

fn statement(statement: &Statement) -> String {
    let not = |negated: bool| if negated { "!= " } else { "" };
    match statement {
        Statement::Match { field: name, negated, value } => {
            format!("{} {}{}", field(*name), not(*negated), datum(value))
        }
        Statement::MarkIs { mask, value } => format!("meta mark & {mask:#x} == {value:#x}"),
        Statement::Lookup { key, negated, set } => format!("{} {}@{set}", fields(key), not(*negated)),
        Statement::VerdictMap { key, map } => format!("{} vmap @{map}", fields(key)),
        Statement::CtState { states, negated } => {
            let states: Vec<&str> = states.iter().map(|state| ct_state(*state)).collect();
            format!("ct state {}{{ {} }}", not(*negated), states.join(", "))
        }
        Statement::CtStatusDnat => "ct status dnat".to_owned(),
        Statement::DestinationIsLocal { negated } => format!("fib daddr type {}local", not(*negated)),
        Statement::SourceIsLocal { negated } => format!("fib saddr type {}local", not(*negated)),
        Statement::DnatMap { ipv6, key, map } => {
            format!("dnat {} to {} map @{map}", if *ipv6 { "ip6" } else { "ip" }, fields(key))
        }
        Statement::Dnat { address, port } => match port {
            Some(port) => format!("dnat to {address} . {port}"),
            None => format!("dnat to {address}"),
        },
        Statement::Snat { address } => format!("snat to {address}"),
        Statement::Masquerade => "masquerade fully-random".to_owned(),
        Statement::SetMarkBits(bits) => format!("meta mark set meta mark | {bits:#x}"),
        Statement::Notrack => "notrack".to_owned(),
        Statement::Counter => "counter".to_owned(),
        Statement::Verdict(to) => verdict(to),
        Statement::Reject => "reject (tcp reset, else port unreachable)".to_owned(),
        #[allow(unreachable_patterns)]
        other => format!("{other:?}"),
    }
}

fn verdict(verdict: &Verdict) -> String {
    match verdict {
        Verdict::Accept => "accept".to_owned(),
        Verdict::Drop => "drop".to_owned(),
        Verdict::Return => "return".to_owned(),
        Verdict::Jump(chain) => format!("jump {chain}"),
        Verdict::Goto(chain) => format!("goto {chain}"),
    }
}

fn fields(key: &[Field]) -> String {
    let names: Vec<String> = key.iter().map(|name| field(*name)).collect();
    names.join(" . ")
}

fn field(field: Field) -> String {
    let name = match field {
        Field::Ip4Source => "ip saddr",
        Field::Ip4Destination => "ip daddr",
        Field::Ip6Source => "ip6 saddr",
        Field::Ip6Destination => "ip6 daddr",
        Field::Family => "meta nfproto",
        Field::L4Protocol => "meta l4proto",
        Field::SourcePort => "th sport",
        Field::DestinationPort => "th dport",
        Field::InputLink => "iifname",
        Field::OutputLink => "oifname",
        Field::Icmp6Type => "icmpv6 type",
        Field::RandomModulo(count) => return format!("numgen random mod {count}"),
    };
    name.to_owned()
}

fn ct_state(state: CtState) -> &'static str {
    match state {
        CtState::New => "new",
        CtState::Established => "established",
        CtState::Related => "related",
        CtState::Invalid => "invalid",
        CtState::Untracked => "untracked",
    }
}

fn datum(datum: &Datum) -> String {
    match datum {
        Datum::Ip(ip) => ip.to_string(),
        Datum::Net(net) => net.to_string(),
        Datum::Protocol(protocol) => protocol.name().to_owned(),
        Datum::ProtocolNumber(number) | Datum::Icmp6Type(number) => number.to_string(),
        Datum::Ipv6(ipv6) => if *ipv6 { "ipv6" } else { "ipv4" }.to_owned(),
        Datum::Port(port) => port.to_string(),
        Datum::Name(name) => format!("\"{name}\""),
        Datum::NamePrefix(prefix) => format!("\"{prefix}*\""),
        Datum::Index(index) => index.to_string(),
        #[allow(unreachable_patterns)]
        other => format!("{other:?}"),
    }
}

fn element_data(data: &ElementData) -> String {
    match data {
        ElementData::None => String::new(),
        ElementData::Verdict(to) => format!(" : {}", verdict(to)),
        ElementData::AddressAndPort(address, port) => format!(" : {address} . {port}"),
        #[allow(unreachable_patterns)]
        other => format!(" : {other:?}"),
    }
}

fn key_type(key: KeyType) -> String {
    match key {
        KeyType::Ipv4Address => "ipv4_addr".to_owned(),
        KeyType::Ipv6Address => "ipv6_addr".to_owned(),
        KeyType::L4Protocol => "inet_proto".to_owned(),
        KeyType::Port => "inet_service".to_owned(),
        KeyType::LinkName => "ifname".to_owned(),
        KeyType::Index => "mark".to_owned(),
        #[allow(unreachable_patterns)]
        other => format!("{other:?}"),
    }
}

fn data_type(data: SetData) -> String {
    match data {
        SetData::None => String::new(),
        SetData::Verdict => " : verdict".to_owned(),
        SetData::Ipv4AddressAndPort => " : ipv4_addr . inet_service".to_owned(),
        SetData::Ipv6AddressAndPort => " : ipv6_addr . inet_service".to_owned(),
        #[allow(unreachable_patterns)]
        other => format!(" : {other:?}"),
    }
}
