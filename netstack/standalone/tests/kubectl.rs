//! A current kubectl against the server. `tests/tools/build-kubernetes.sh` builds it when it is not there yet.

#![allow(clippy::unwrap_used)] // tests

mod common;

use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use common::World;

struct Kubectl {
    binary: PathBuf,
    kubeconfig: PathBuf,
    home: PathBuf,
}

impl Kubectl {
    fn new(world: &World) -> Self {
        let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/tools/build-kubernetes.sh");
        let output = Command::new(&script).args(["", "kubectl"]).stderr(Stdio::inherit()).output().unwrap();
        assert!(output.status.success(), "{} failed", script.display());
        let binary = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim()).join("kubectl");
        Self { binary, kubeconfig: world.kubeconfig(), home: world.directory.path().join("home") }
    }

    fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new(&self.binary);
        command.args(arguments.split(' ')).env("KUBECONFIG", &self.kubeconfig).env("HOME", &self.home);
        command
    }

    async fn output(&self, arguments: &str, input: &str) -> Output {
        let mut command = self.command(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let (input, arguments) = (input.to_owned(), arguments.to_owned());
        tokio::task::spawn_blocking(move || {
            let mut child = command.spawn().unwrap_or_else(|error| panic!("kubectl {arguments}: {error}"));
            child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
            child.wait_with_output().unwrap()
        })
        .await
        .unwrap()
    }

    /// Runs it; what it printed. Panics with its errors when it fails.
    async fn run(&self, arguments: &str, input: &str) -> String {
        let output = self.output(arguments, input).await;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(
            output.status.success(),
            "kubectl {arguments}\n{}{}",
            text(&output.stdout),
            text(&output.stderr)
        );
        text(&output.stdout)
    }

    /// Runs it; what it complained. Panics when it succeeds.
    async fn refused(&self, arguments: &str, input: &str) -> String {
        let output = self.output(arguments, input).await;
        assert!(
            !output.status.success(),
            "kubectl {arguments} should fail: {}",
            String::from_utf8_lossy(&output.stdout)
        );
        String::from_utf8_lossy(&output.stderr).into_owned()
    }
}

const SERVICE: &str = r"
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  selector: {app: web}
  ipFamilyPolicy: PreferDualStack
  ports: [{name: http, port: 80, targetPort: http}]
";

const NAMESPACE: &str = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n";

/// A ConfigMap of this name.
fn configmap(name: &str) -> String {
    format!("apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: {name}}}\n")
}

const POD: &str = r"
apiVersion: v1
kind: Pod
metadata: {name: web-1, labels: {app: web}}
spec:
  nodeName: node-a
  containers: [{name: web, image: web, ports: [{name: http, containerPort: 8080}]}]
";

/// Words of each line, so that column widths do not matter.
fn rows(text: &str) -> Vec<Vec<&str>> {
    text.lines().map(|it| it.split_whitespace().collect()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn kubectl_creates_shows_changes_and_deletes() {
    let world = World::new().await;
    let kubectl = Kubectl::new(&world);

    assert!(kubectl.run("version", "").await.contains("v1.34.0+weft"));
    assert_eq!(kubectl.run("create -f -", SERVICE).await, "service/web created\n");
    assert_eq!(kubectl.run("create -f -", POD).await, "pod/web-1 created\n");
    assert_eq!(kubectl.run("create -f -", NAMESPACE).await, "namespace/shop created\n");
    let plain = SERVICE.replace("web", "plain");
    assert_eq!(kubectl.run("create -f -", &plain).await, "service/plain created\n");

    let services = kubectl.run("get services", "").await;
    let services = rows(&services);
    assert_eq!(services[0], ["NAME", "TYPE", "CLUSTER-IP", "EXTERNAL-IP", "PORT(S)", "AGE"]);
    assert_eq!(services[1][..3], ["kubernetes", "ClusterIP", "10.96.0.1"]);
    assert_eq!(services[3][0], "web");
    assert_eq!(services[3][3..5], ["<none>", "80/TCP"]);

    let status = r#"{"status":{"phase":"Running","podIP":"10.244.0.2","podIPs":[{"ip":"10.244.0.2"},{"ip":"fd00:10:244::2"}],"conditions":[{"type":"Ready","status":"True"}]}}"#;
    let patched =
        kubectl.run(&format!("patch pod web-1 --subresource=status --type=merge -p {status}"), "").await;
    assert_eq!(patched, "pod/web-1 patched\n");
    let pods = kubectl.run("get pods -o wide --show-labels", "").await;
    let pods = rows(&pods);
    assert_eq!(pods[1][..4], ["web-1", "1/1", "Running", "0"]);
    assert_eq!(pods[1][5..7], ["10.244.0.2", "node-a"]);
    assert_eq!(pods[1][9], "app=web");

    let described = common::eventually("endpoints in describe", || async {
        let text = kubectl.run("describe service web", "").await;
        text.contains("10.244.0.2:8080").then_some(text)
    })
    .await;
    assert!(described.contains("IP Family Policy:") && described.contains("PreferDualStack"), "{described}");
    assert!(kubectl.run("describe pod web-1", "").await.contains("Node:"));
    let slices = kubectl.run("get endpointslices -l kubernetes.io/service-name=web", "").await;
    assert!(slices.contains("IPv6") && slices.contains("fd00:10:244::2"), "{slices}");

    assert_eq!(kubectl.run("label service web tier=front", "").await, "service/web labeled\n");
    assert_eq!(kubectl.run("annotate service web note=seen", "").await, "service/web annotated\n");
    let yaml = kubectl.run("get service web -o yaml", "").await;
    assert!(yaml.contains("tier: front") && yaml.contains("note: seen"), "{yaml}");
    assert_eq!(kubectl.run("get svc -l tier=front -o name", "").await, "service/web\n");
    assert_eq!(
        kubectl.run("get pods -A --field-selector spec.nodeName=node-a -o name", "").await,
        "pod/web-1\n"
    );

    let replaced = SERVICE.replace("port: 80,", "port: 81,");
    assert_eq!(kubectl.run("replace -f -", &replaced).await, "service/web replaced\n");
    assert_eq!(kubectl.run("get service web -o jsonpath={.spec.ports[0].port}", "").await, "81");

    assert!(kubectl.run("delete service web", "").await.starts_with("service \"web\" deleted"));
    assert!(kubectl.run("delete namespace shop", "").await.starts_with("namespace \"shop\" deleted"));
    assert!(kubectl.refused("get namespace shop", "").await.contains("(NotFound)"));
}

#[tokio::test(flavor = "multi_thread")]
async fn kubectl_apply_creates_and_then_patches_strategically() {
    let world = World::new().await;
    let kubectl = Kubectl::new(&world);
    assert_eq!(kubectl.run("apply -f -", SERVICE).await, "service/web created\n");
    assert_eq!(kubectl.run("apply -f -", SERVICE).await, "service/web unchanged\n");
    let changed = SERVICE.replace("port: 80,", "port: 443,");
    assert_eq!(kubectl.run("apply -f -", &changed).await, "service/web configured\n");
    assert_eq!(kubectl.run("get service web -o jsonpath={.spec.ports[*].port}", "").await, "443");
    let complaint = kubectl.refused("apply --server-side -f -", SERVICE).await;
    assert!(complaint.contains("unknown format") || complaint.contains("415"), "{complaint}");
}

#[tokio::test(flavor = "multi_thread")]
async fn kubectl_hears_what_is_wrong() {
    let world = World::new().await;
    let kubectl = Kubectl::new(&world);
    let unknown = SERVICE.replace("selector:", "slector:");
    let complaint = kubectl.refused("create -f -", &unknown).await;
    assert!(complaint.contains("unknown field \"spec.slector\""), "{complaint}");
    let wrong = SERVICE.replace("port: 80,", "port: 99999,");
    let complaint = kubectl.refused("create -f -", &wrong).await;
    assert!(
        complaint.contains("spec.ports[0].port") && complaint.contains("between 1 and 65535"),
        "{complaint}"
    );
    let deployment = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: x}\n";
    let complaint = kubectl.refused("create -f -", deployment).await;
    assert!(complaint.contains("no matches for kind \"Deployment\""), "{complaint}");
    assert!(kubectl.refused("get deployments", "").await.contains("doesn't have a resource type"));
}

#[tokio::test(flavor = "multi_thread")]
async fn kubectl_get_w_follows_changes() {
    let world = World::new().await;
    let kubectl = Kubectl::new(&world);
    kubectl.run("create -f -", &configmap("first")).await;
    let mut command = kubectl.command("get configmaps -w --request-timeout=6s -o name");
    let watching = tokio::task::spawn_blocking(move || command.output().unwrap());
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    kubectl.run("create -f -", &configmap("second")).await;
    let output = watching.await.unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "configmap/first\nconfigmap/second\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn kubectl_creates_without_files_too() {
    let world = World::new().await;
    let kubectl = Kubectl::new(&world);
    assert_eq!(kubectl.run("create namespace shop", "").await, "namespace/shop created\n");
    assert_eq!(
        kubectl.run("create configmap settings --from-literal=a=b", "").await,
        "configmap/settings created\n"
    );
    assert_eq!(kubectl.run("get configmap settings -o jsonpath={.data.a}", "").await, "b");
    assert_eq!(kubectl.run("create secret generic key --from-literal=a=b", "").await, "secret/key created\n");
    assert_eq!(kubectl.run("get secret key -o jsonpath={.data.a}", "").await, "Yg==");
    assert_eq!(
        kubectl.run("create service nodeport plain --tcp=5678:8080", "").await,
        "service/plain created\n"
    );
    assert_eq!(kubectl.run("get service plain -o jsonpath={.spec.ports[0].targetPort}", "").await, "8080");
    assert_eq!(kubectl.run("create serviceaccount robot", "").await, "serviceaccount/robot created\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_load_balancer_gets_its_address_by_the_status_and_its_endpoints_get_hints() {
    const BALANCED: &str = "
apiVersion: v1
kind: Node
metadata: {name: node-a, labels: {topology.kubernetes.io/zone: east}}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: LoadBalancer
  externalTrafficPolicy: Local
  trafficDistribution: PreferSameNode
  loadBalancerSourceRanges: [203.0.113.0/24]
  selector: {app: web}
  ports: [{port: 80, targetPort: 8080}]
";
    let world = World::new().await;
    let kubectl = Kubectl::new(&world);
    kubectl.run("create -f -", BALANCED).await;
    kubectl.run("create -f -", POD).await;
    let spec = kubectl
        .run("get service web -o jsonpath={.spec.healthCheckNodePort},{.spec.ports[0].nodePort}", "")
        .await;
    let ports: Vec<u16> = spec.split(',').map(|port| port.parse().unwrap()).collect();
    assert!(ports.iter().all(|port| (30_000..=32_767).contains(port)) && ports[0] != ports[1], "{spec}");
    let status = r#"{"status":{"loadBalancer":{"ingress":[{"ip":"198.51.100.1"}]}}}"#;
    kubectl.run(&format!("patch service web --subresource=status --type=merge -p {status}"), "").await;
    let services = kubectl.run("get services web", "").await;
    assert_eq!(rows(&services)[1][3], "198.51.100.1");
    let mode = "get service web -o jsonpath={.status.loadBalancer.ingress[0].ipMode}";
    assert_eq!(kubectl.run(mode, "").await, "VIP");
    let refused = kubectl
        .refused("patch service web --subresource=status --type=merge -p {\"status\":{\"loadBalancer\":{\"ingress\":[{\"ip\":\"198.51.100.1\",\"ipMode\":\"Half\"}]}}}", "")
        .await;
    assert!(refused.contains("ipMode"), "{refused}");

    let status = r#"{"status":{"phase":"Running","podIP":"10.244.0.2","podIPs":[{"ip":"10.244.0.2"}],"conditions":[{"type":"Ready","status":"True"}]}}"#;
    kubectl.run(&format!("patch pod web-1 --subresource=status --type=merge -p {status}"), "").await;
    let hints = common::eventually("hints of the endpoint", || async {
        let slices =
            "get endpointslices -l kubernetes.io/service-name=web -o jsonpath={.items[*].endpoints[*].hints}";
        let text = kubectl.run(slices, "").await;
        (!text.is_empty()).then_some(text)
    })
    .await;
    assert_eq!(hints, r#"{"forNodes":[{"name":"node-a"}],"forZones":[{"name":"east"}]}"#);

    let back = r#"{"spec":{"type":"ClusterIP","externalTrafficPolicy":null,"loadBalancerSourceRanges":null,"allocateLoadBalancerNodePorts":null}}"#;
    kubectl.run(&format!("patch service web --type=merge -p {back}"), "").await;
    let services = kubectl.run("get services web", "").await;
    assert_eq!(rows(&services)[1][1..5], ["ClusterIP", rows(&services)[1][2], "<none>", "80/TCP"]);
}

/// Their group has another version than the groups of Kubernetes.
#[tokio::test(flavor = "multi_thread")]
async fn pools_of_metallb_are_applied_and_listed_as_any_other_object() {
    const POOL: &str = "
apiVersion: metallb.io/v1beta1
kind: IPAddressPool
metadata: {name: lan}
spec: {addresses: [192.0.2.240-192.0.2.250, '2001:db8::240/124']}
";
    let world = World::new().await;
    let kubectl = Kubectl::new(&world);
    assert_eq!(kubectl.run("apply -f -", POOL).await, "ipaddresspool.metallb.io/lan created\n");
    assert_eq!(kubectl.run("apply -f -", POOL).await, "ipaddresspool.metallb.io/lan unchanged\n");
    assert!(rows(&kubectl.run("get ipaddresspools", "").await)[1].contains(&"lan"));
    let served = kubectl.run("api-resources -o name", "").await;
    for name in ["ipaddresspools.metallb.io", "l2advertisements.metallb.io", "ingresses.networking.k8s.io"] {
        assert!(served.lines().any(|line| line == name), "{served}");
    }
}
