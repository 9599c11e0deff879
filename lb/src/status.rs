//! From grants to what is to be written: statuses of Services and of pools that do not say so yet. Pure, but for the applier, which
//! adds the Event that people know from MetalLB.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use serde_json::{Value, json};
use weft_model::balancer::{Balancer, BalancerIngress, Condition, PoolUsage};
use weft_model::snapshot::Objects;
use weft_model::{Notice, Planned, ServiceKey, Severity, Snapshot};
use weft_netstack::kube::{Kind, Notices, StatusWriter, Statuses, Target};
use weft_netstack::reconcile::{Applied, Applier, Planner, Trust};

use crate::allocate::{self, Allocation, CONDITION, Grant, grant_message, pool_of, service_ref};
use crate::announce::unreached;
use crate::own::OwnServices;
use crate::pools::{Pool, Pools};
use crate::told::Told;

/// What is to be written, and what is said of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StatusPlan {
    pub statuses: Statuses,
    /// Addresses of Services whose addresses change, for the Event.
    given: BTreeMap<ServiceKey, Vec<IpAddr>>,
}

/// Plans statuses; remembers its last answer as long as nothing that it reads changes.
#[derive(Default)]
pub struct StatusPlanner {
    last: Option<(Snapshot, Planned<StatusPlan>)>,
    services: OwnServices,
}

impl Planner for StatusPlanner {
    type Plan = StatusPlan;
    const FOLLOWS_ATTACHED_PODS: bool = false;

    fn plan(&mut self, snapshot: &Snapshot) -> Planned<StatusPlan> {
        let last = self.last.as_ref().filter(|(seen, _)| reads_the_same(seen, snapshot));
        if let Some((_, planned)) = last {
            return planned.clone();
        }
        self.services.follow(snapshot);
        let planned = plan_of(&self.services, snapshot);
        self.last = Some((snapshot.clone(), planned.clone()));
        planned
    }
}

/// By identity: the same lists cost nothing.
fn reads_the_same(a: &Snapshot, b: &Snapshot) -> bool {
    fn same<K, V>(a: &Objects<K, V>, b: &Objects<K, V>) -> bool {
        Arc::ptr_eq(a, b)
    }
    same(&a.services, &b.services)
        && same(&a.address_pools, &b.address_pools)
        && same(&a.l2_advertisements, &b.l2_advertisements)
        && same(&a.nodes, &b.nodes)
        && same(&a.namespaces, &b.namespaces)
        && same(&a.endpoint_slices, &b.endpoint_slices)
        && a.from_store == b.from_store
}

/// Nothing is due before the API server has been seen: the statuses may be those of yesterday.
pub fn plan(snapshot: &Snapshot) -> Planned<StatusPlan> {
    plan_of(&OwnServices::of(snapshot), snapshot)
}

fn plan_of(services: &OwnServices, snapshot: &Snapshot) -> Planned<StatusPlan> {
    let Allocation { grants, pools, problems } = allocate::allocate_to(services, snapshot);
    let mut plan = StatusPlan::default();
    if snapshot.from_store {
        return Planned::new(plan, problems);
    }
    let told = Told::of(snapshot);
    for (key, grant) in &grants {
        let Some(balancer) = snapshot.services.get(key).and_then(|service| service.balancer.as_ref()) else {
            continue;
        };
        let wanted = condition(grant, &pools, || trouble(grant, &pools, &told, snapshot));
        if says(balancer, grant, wanted.as_ref()) {
            continue;
        }
        if !has_addresses(balancer, grant) {
            plan.given.insert(key.clone(), grant.addresses.clone());
        }
        let status = json!({
            "loadBalancer": {"ingress": ingress(grant)},
            "conditions": conditions(balancer, wanted.as_ref()),
        });
        plan.statuses.insert(Target { kind: Kind::Service, key: key.clone() }, status);
    }
    let used = used(&pools, &grants);
    for pool in pools.all() {
        let usage = usage(pool, &pools, used.get(&*pool.object.key.name));
        if pool.object.usage != usage {
            let target = Target { kind: Kind::IpAddressPool, key: pool.object.key.clone() };
            plan.statuses.insert(target, usage_status(usage));
        }
    }
    Planned::new(plan, problems)
}

/// What stands in the condition of ours; addresses of nodes need none.
fn condition(grant: &Grant, pools: &Pools, trouble: impl FnOnce() -> Option<Trouble>) -> Option<Condition> {
    let (status, reason, message) = match &grant.refusal {
        Some(why) if grant.addresses.is_empty() => ("False", "Pending", why.clone()),
        _ if grant.pools.is_empty() => return None,
        _ => {
            let granted = grant_message(grant, pools);
            match trouble() {
                Some((status, reason, why)) => (status, reason, format!("{granted}; {why}")),
                None => ("True", "Allocated", granted),
            }
        }
    };
    Some(Condition {
        kind: CONDITION.to_owned(),
        status: status.to_owned(),
        reason: reason.to_owned(),
        message,
        last_transition: None,
    })
}

/// Status, reason and what is wrong.
type Trouble = (&'static str, &'static str, String);

/// What is wrong with addresses that it has: first what keeps everybody from reaching them.
fn trouble(grant: &Grant, pools: &Pools, told: &Told<'_>, snapshot: &Snapshot) -> Option<Trouble> {
    let contested = || {
        let (ip, mac) = grant.addresses.iter().find_map(|ip| Some((ip, told.stranger(*ip)?)))?;
        let why = format!(
            "{ip} is answered for by the machine with MAC {mac}, so no node claims it; take the address from that machine, or \
             out of the IPAddressPool"
        );
        Some(("False", "Conflict", why))
    };
    let out_of_reach = || {
        let why = |ip: &IpAddr| unreached(snapshot, pools, *ip, &pool_of(grant, *ip, pools));
        Some(("False", "Unreachable", grant.addresses.iter().find_map(why)?))
    };
    let incomplete = || Some(("True", "Incomplete", grant.refusal.clone()?));
    let kept = || Some(("True", "Kept", grant.warning.clone()?));
    contested().or_else(out_of_reach).or_else(incomplete).or_else(kept)
}

fn has_addresses(balancer: &Balancer, grant: &Grant) -> bool {
    let plain = |ingress: &BalancerIngress| {
        ingress.hostname.is_none() && ingress.ip_mode.as_deref().is_none_or(|mode| mode == "VIP")
    };
    balancer.ingress.iter().all(plain)
        && balancer.ingress.iter().map(|ingress| ingress.ip).eq(grant.addresses.iter().map(|ip| Some(*ip)))
}

fn ours(balancer: &Balancer) -> Option<&Condition> {
    balancer.conditions.iter().find(|condition| condition.kind == CONDITION)
}

/// The time is not ours to compare.
fn says(balancer: &Balancer, grant: &Grant, wanted: Option<&Condition>) -> bool {
    let said = |condition: &Condition| {
        (condition.status.clone(), condition.reason.clone(), condition.message.clone())
    };
    has_addresses(balancer, grant) && ours(balancer).map(said) == wanted.map(said)
}

fn ingress(grant: &Grant) -> Vec<Value> {
    grant.addresses.iter().map(|ip| json!({"ip": ip.to_string(), "ipMode": "VIP"})).collect()
}

/// The whole list: those of others as they are, and ours. The writer puts the time to what changed.
fn conditions(balancer: &Balancer, wanted: Option<&Condition>) -> Vec<Value> {
    let others = balancer.conditions.iter().filter(|condition| condition.kind != CONDITION);
    let since = |wanted: &Condition| {
        let same = ours(balancer).filter(|known| known.status == wanted.status);
        same.and_then(|known| known.last_transition.clone())
    };
    let wanted = wanted.map(|wanted| Condition { last_transition: since(wanted), ..wanted.clone() });
    others.cloned().chain(wanted).map(|condition| condition_value(&condition)).collect()
}

fn condition_value(condition: &Condition) -> Value {
    let mut value = json!({
        "type": condition.kind, "status": condition.status, "reason": condition.reason,
        "message": condition.message,
    });
    if let Some(time) = &condition.last_transition {
        value["lastTransitionTime"] = time.clone().into();
    }
    value
}

/// Given addresses by the name of their pool.
fn used<'a>(pools: &'a Pools, grants: &BTreeMap<ServiceKey, Grant>) -> BTreeMap<&'a str, BTreeSet<IpAddr>> {
    let mut used: BTreeMap<&str, BTreeSet<IpAddr>> = BTreeMap::new();
    for ip in grants.values().flat_map(|grant| &grant.addresses) {
        if let Some(pool) = pools.holding(*ip) {
            used.entry(&*pool.object.key.name).or_default().insert(*ip);
        }
    }
    used
}

fn usage(pool: &Pool, pools: &Pools, used: Option<&BTreeSet<IpAddr>>) -> PoolUsage {
    let assigned = |ipv6| {
        let of_family = used.into_iter().flatten().filter(|ip| ip.is_ipv6() == ipv6);
        i64::try_from(of_family.count()).unwrap_or(i64::MAX)
    };
    let nodes = pool.nodes_within(pools);
    PoolUsage {
        assigned_v4: assigned(false),
        assigned_v6: assigned(true),
        available_v4: pool.size(false, &nodes) - assigned(false),
        available_v6: pool.size(true, &nodes) - assigned(true),
    }
}

/// As MetalLB's CRD has it.
fn usage_status(usage: PoolUsage) -> Value {
    json!({
        "assignedIPv4": usage.assigned_v4, "assignedIPv6": usage.assigned_v6,
        "availableIPv4": usage.available_v4, "availableIPv6": usage.available_v6,
    })
}

/// Writes the statuses, and says on each Service what it got.
pub struct StatusApplier {
    writer: StatusWriter,
    notices: Notices,
}

impl StatusApplier {
    pub fn new(writer: StatusWriter, notices: Notices) -> Self {
        Self { writer, notices }
    }

    fn say(&self, key: &ServiceKey, addresses: &[IpAddr]) {
        let addresses: Vec<String> = addresses.iter().map(IpAddr::to_string).collect();
        let message = format!("Assigned IP {}", addresses.join(", "));
        self.notices.say(Notice::new(service_ref(key), Severity::Normal, "IPAllocated", message));
    }
}

impl Applier for StatusApplier {
    type Plan = StatusPlan;

    async fn apply(&mut self, plan: &StatusPlan, trust: Trust) -> Applied {
        let applied = self.writer.apply(&plan.statuses, trust).await;
        for (key, addresses) in plan.given.iter().filter(|(_, addresses)| !addresses.is_empty()) {
            let target = Target { kind: Kind::Service, key: key.clone() };
            if applied.changed.binary_search(&target.to_string()).is_ok() {
                self.say(key, addresses);
            }
        }
        applied
    }
}
