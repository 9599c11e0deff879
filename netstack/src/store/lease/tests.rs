//! Leases survive a restart; damage does not survive one, and takes nothing else along.

use super::*;
use crate::kernel::testing::{needs_root, run};

fn lease(container: &str) -> Lease {
    Lease {
        container_id: container.to_owned(),
        ifname: "eth0".to_owned(),
        netns: "/run/netns/a".to_owned(),
        pod: Some(PodKey::new("default", "web-0")),
        pod_uid: "42".to_owned(),
        link: "weftp0123456789a".to_owned(),
        host_ports: Vec::new(),
        bandwidth: weft_model::objects::Bandwidth::default(),
        released: None,
    }
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn write(leases: &Leases, text: &str, lease: Option<Lease>) {
    leases.write(&BTreeMap::from([(address(text), lease)])).unwrap();
}

fn records(of: &[(&str, Lease)]) -> LeaseRecords {
    of.iter().map(|(text, lease)| (address(text), lease.clone())).collect()
}

#[test]
fn what_is_known_of_the_leases_is_what_is_in_the_files() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("leases");
    let leases = Leases::open(&path).unwrap();
    let mut seen = Vec::new();
    for (text, given) in [
        ("10.244.1.2", Some(lease("a"))),
        ("fd00::2", Some(lease("b"))),
        ("10.244.1.2", Some(Lease { released: Some(Boottime(7)), ..lease("a") })),
        ("fd00::2", None),
        ("fd00::3", None),
    ] {
        seen.push(leases.records());
        write(&leases, text, given);
        assert_eq!(Leases::open(&path).unwrap().records(), leases.records());
    }
    let seen: Vec<usize> = seen.iter().map(|leases| leases.len()).collect();
    assert_eq!(seen, [0, 1, 2, 2, 1], "who read before keeps it");
    let released = Lease { released: Some(Boottime(7)), ..lease("a") };
    assert_eq!(*leases.records(), records(&[("10.244.1.2", released)]));
}

#[test]
fn an_address_is_its_pods_from_add_to_del() {
    let folder = tempfile::tempdir().unwrap();
    let leases = Leases::open(folder.path().join("leases")).unwrap();
    let pod = |text: &str| leases.pod_of(address(text));
    assert_eq!(pod("10.244.1.2"), None);
    write(&leases, "10.244.1.2", Some(lease("a")));
    write(&leases, "fd00::2", Some(lease("a")));
    assert_eq!((pod("10.244.1.2"), pod("fd00::2")), (lease("a").pod, lease("a").pod));
    write(&leases, "10.244.1.2", Some(Lease { released: Some(Boottime::now()), ..lease("a") }));
    assert_eq!(pod("10.244.1.2"), None, "released");
    let other = Lease { pod: Some(PodKey::new("shop", "cart-0")), ..lease("b") };
    write(&leases, "10.244.1.2", Some(other.clone()));
    assert_eq!(pod("10.244.1.2"), other.pod, "given out again");
}

#[test]
fn what_is_no_lease_is_removed_and_the_others_stay() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("leases");
    let leases = Leases::open(&path).unwrap();
    for text in ["10.244.1.2", "10.244.1.3", "fd00::2"] {
        write(&leases, text, Some(lease("a")));
    }
    fs::write(path.join("10.244.1.3"), [0xa5; 512]).unwrap();
    fs::write(path.join("unfinished-fd00::3"), "{\"container_id\":").unwrap();
    fs::write(path.join("notes"), "not ours").unwrap();
    fs::create_dir(path.join("folder")).unwrap();
    for _ in 0..2 {
        let left = records(&[("10.244.1.2", lease("a")), ("fd00::2", lease("a"))]);
        assert_eq!(*Leases::open(&path).unwrap().records(), left);
    }
    assert_eq!(fs::read_dir(&path).unwrap().count(), 3, "two leases and a folder, which is none of ours");
}

#[test]
fn a_file_in_place_of_the_folder_is_set_aside() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("leases");
    fs::write(&path, "not a folder").unwrap();
    write(&Leases::open(&path).unwrap(), "10.244.1.2", Some(lease("a")));
    assert_eq!(fs::read_to_string(folder.path().join("leases.damaged-1")).unwrap(), "not a folder");
}

#[test]
fn a_full_disk_takes_all_of_a_change_or_nothing() {
    if !needs_root() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mounted = folder.path().to_str().unwrap();
    run(&["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mounted]);
    let path = folder.path().join("leases");
    let leases = Leases::open(&path).unwrap();
    write(&leases, "10.244.1.2", Some(lease("a")));
    let before = leases.records();
    // The last of three finds no room.
    let filler = folder.path().join("filler");
    let room = || nix::sys::statvfs::statvfs(&path).unwrap().blocks_available();
    let leave = |pages: u64| fs::write(&filler, vec![1; 4096 * (room() - pages) as usize]).unwrap();
    leave(MIN_FREE_BYTES / 4096 + 4);
    let released = Lease { released: Some(Boottime(7)), ..lease("a") };
    let long = Lease { netns: "x".repeat(2 * MIN_FREE_BYTES as usize), ..lease("b") };
    let changes = [("10.244.1.2", Some(released)), ("10.244.1.3", Some(lease("b"))), ("fd00::2", Some(long))];
    let refused = leases.write(&changes.map(|(text, lease)| (address(text), lease)).into());
    let (known, left) = (leases.records(), Leases::open(&path).unwrap().records());
    fs::remove_file(&filler).unwrap();
    leave(2);
    let writable = leases.ensure_writable();
    fs::remove_file(&filler).unwrap();
    let writable_again = leases.ensure_writable();
    run(&["umount", "-l", mounted]);
    let told = crate::reconcile::chain(&refused.unwrap_err());
    assert!(told.contains("fd00::2") && told.contains("No space left"), "{told}");
    assert_eq!((known, left), (before.clone(), before));
    assert!(matches!(writable, Err(StoreError::Full { .. })), "{writable:?}");
    assert!(writable_again.is_ok(), "{writable_again:?}");
}

#[test]
fn leases_are_for_their_owner_only() {
    use std::os::unix::fs::PermissionsExt as _;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("leases");
    let leases = Leases::open(&path).unwrap();
    write(&leases, "10.244.1.2", Some(lease("a")));
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&path), mode(&path.join("10.244.1.2"))), (0o700, 0o600));
}
