//! What keeps a process from starting is one line that names it and says what to do.

use std::process::Command;

use weft_tests::node::{Node, binary, inside, refusal, write};

/// One line with every one of `parts`, and exit code `code`.
fn refused(command: &mut Command, code: i32, parts: &[&str]) {
    let (exit, said) = refusal(command);
    assert_eq!(exit, code, "{command:?}: {said}");
    assert_eq!(said.lines().count(), 1, "{command:?}: more than one line:\n{said}");
    for part in parts {
        assert!(said.contains(part), "{command:?}: {said:?} lacks {part:?}");
    }
}

fn weft(args: &[&str]) -> Command {
    let mut command = Command::new(binary());
    command.args(args);
    command
}

#[test]
fn an_unknown_flag_or_a_wrong_value_is_one_line_and_exit_code_2() {
    refused(&mut weft(&["agent", "--colour"]), 2, &["--colour", "weft agent --help"]);
    refused(&mut weft(&["server", "--colour"]), 2, &["--colour", "weft server --help"]);
    refused(&mut weft(&["tunnel", "--colour"]), 2, &["--colour", "weft tunnel --help"]);
    refused(&mut weft(&["agent", "--cluster-dns", "ten"]), 2, &["--cluster-dns", "ten"]);
    refused(&mut weft(&["server", "--listen", "nowhere"]), 2, &["--listen", "nowhere"]);
    refused(&mut weft(&["serve"]), 2, &["serve"]);
    refused(&mut weft(&["tunnel", "--log-level", "weft=loud"]), 2, &["--log-level weft=loud"]);
}

#[test]
fn an_agent_configuration_that_contradicts_itself_is_one_line_and_exit_code_2() {
    refused(&mut weft(&["agent", "--node-name", "a"]), 2, &["--kubeconfig or --api-server"]);
    let given = |more: &[&str]| weft(&[&["agent", "--node-name", "a", "--kubeconfig", "/k"], more].concat());
    refused(&mut given(&["--cluster-dns", "10.99.0.10"]), 2, &["--cluster-dns 10.99.0.10", "--service-cidr"]);
    refused(&mut given(&["--cluster-cidr", "10.43.0.0/20"]), 2, &["10.43.0.0/20", "overlap"]);
    refused(&mut weft(&["agent", "--node-name", "A_B", "--kubeconfig", "/k"]), 2, &["A_B", "--node-name"]);
}

#[test]
fn a_server_configuration_that_cannot_be_used_is_one_line_and_exit_code_2() {
    let folder = tempfile::tempdir().unwrap();
    let given = |more: &[&str]| {
        let mut command = weft(&["server", "--listen", "127.0.0.1:0", "--data-dir"]);
        command.arg(folder.path().join("data")).args(more);
        command
    };
    refused(&mut given(&["--cluster-cidr", "10.1.0.0/16,10.2.0.0/16"]), 2, &["--cluster-cidr"]);
    refused(
        &mut given(&["--cluster-cidr", "10.1.0.0/28"]),
        2,
        &["10.1.0.0/28", "--node-cidr-mask-size-ipv4"],
    );
    refused(&mut given(&["--cluster-cidr", "10.1.0.0/16", "--service-cidr", "10.1.0.0/24"]), 2, &["overlap"]);
    let tokens = folder.path().join("tokens");
    write(&tokens, "broken\n");
    refused(&mut given(&["--token-file", tokens.to_str().unwrap()]), 2, &["tokens", "line 1"]);
}

#[test]
fn an_address_that_is_taken_is_named_by_the_server() {
    inside(|| {
        let node = Node::new();
        let _taken = std::net::TcpListener::bind("127.0.0.1:6443").unwrap();
        let mut command = node.weft("server");
        command.args(["--listen", "127.0.0.1:6443", "--data-dir"]).arg(node.path("data"));
        refused(&mut command, 1, &["127.0.0.1:6443", "--listen"]);
    });
}

#[test]
fn without_root_or_its_rights_the_agent_says_what_it_needs() {
    inside(|| {
        let node = Node::new();
        let wrapped = |wrapper: &[&str]| {
            let agent = node.agent_command();
            let mut command = Command::new(wrapper[0]);
            command.args(&wrapper[1..]).arg(agent.get_program()).args(agent.get_args());
            command
        };
        refused(&mut wrapped(&["unshare", "--user"]), 1, &["needs root", "sudo"]);
        let bare = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"];
        refused(&mut wrapped(&bare), 1, &["nf_tables", "CAP_NET_ADMIN"]);
    });
}

#[test]
fn a_second_agent_is_refused_by_the_first_ones_pid() {
    inside(|| {
        let node = Node::running();
        let pid = format!("pid {}", node.agent().pid());
        refused(&mut node.agent_command(), 1, &["an agent runs on this node already", &pid, "--run-dir"]);
        assert_eq!(node.status()["ready"], true);
    });
}

#[test]
fn a_run_folder_that_cannot_be_written_is_named() {
    inside(|| {
        let node = Node::new();
        std::fs::create_dir(node.path("run")).unwrap();
        let run = node.path("run");
        weft_tests::node::run(Command::new("mount").args(["-t", "tmpfs", "-o", "ro", "none"]).arg(&run));
        refused(&mut node.agent_command(), 1, &[run.to_str().unwrap(), "--run-dir"]);
    });
}

#[test]
fn a_token_or_ca_file_that_is_missing_is_named() {
    inside(|| {
        let node = Node::new();
        refused(&mut node.agent_command(), 1, &["--ca-file", "ca.crt cannot be read", "put CA certificate"]);
        std::fs::create_dir(node.path("server")).unwrap();
        write(&node.path("server/ca.crt"), "nothing");
        refused(&mut node.agent_command(), 1, &["--ca-file", "ca.crt holds no CA certificate"]);
        std::fs::remove_file(node.path("token")).unwrap();
        refused(&mut node.agent_command(), 1, &["--token-file", "token cannot be read", "put bearer token"]);
        assert!(!weft_tests::node::ip("-o link").contains("weft0"));
    });
}

#[test]
fn a_kubeconfig_that_cannot_be_used_is_named() {
    inside(|| {
        let node = Node::new();
        let kubeconfig = node.path("kubeconfig");
        let mut agent = weft(&["agent", "--node-name", "a", "--kubeconfig"]);
        agent
            .arg(&kubeconfig)
            .arg("--run-dir")
            .arg(node.path("run"))
            .arg("--state-dir")
            .arg(node.path("state"));
        let named = kubeconfig.to_str().unwrap();
        refused(&mut agent, 1, &[named, "No such file", "--kubeconfig"]);
        write(&kubeconfig, "apiVersion: v1\nkind: Config\nclusters: {]\n");
        refused(&mut agent, 1, &[named, "failed to parse kubeconfig YAML", "--kubeconfig"]);
        write(&kubeconfig, "apiVersion: v1\nkind: Config\n");
        refused(&mut agent, 1, &[named, "context", "--kubeconfig"]);
        assert!(!weft_tests::node::ip("-o link").contains("weft0"));
    });
}

#[test]
fn a_second_tunnel_is_refused_and_the_first_goes_on() {
    inside(|| {
        let mut node = Node::running();
        refused(&mut node.tunnel_command(), 1, &["UDP port 51820"]);
        assert!(!node.tunnel_has_ended());
        assert!(node.status()["parts"]["peers"].is_array(), "{}", node.status()["parts"]);
    });
}

#[test]
fn a_status_without_an_agent_says_so() {
    inside(|| {
        let node = Node::new();
        let mut command = node.weft("status");
        command.arg("--run-dir").arg(node.path("run"));
        refused(&mut command, 1, &["no agent answers", "agent.sock", "weft agent"]);
    });
}
