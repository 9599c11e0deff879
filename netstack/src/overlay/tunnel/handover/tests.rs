//! What is read of what another process, or another version, left.

use super::*;

fn document(version: u32, left: Duration) -> String {
    let key = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, [1; 32]);
    let left = serde_json::to_string(&left).unwrap();
    format!(
        r#"{{"version":{version},"left":{left},"device":{{"current":"{key}","next":null,"retired":null,"mtu_bytes":1420,"own_addresses":[],"peers":[]}}}}"#
    )
}

#[test]
fn only_this_version_of_this_boot_is_read() {
    let boot = since_boot().unwrap();
    let earlier = boot.checked_sub(Duration::from_millis(5)).unwrap();
    let (_, ago) = decode(document(VERSION, earlier).as_bytes()).unwrap();
    assert!(ago >= Duration::from_millis(5) && ago < Duration::from_secs(5), "{ago:?}");
    let later = boot + Duration::from_secs(1000);
    assert!(matches!(decode(document(VERSION, later).as_bytes()), Err(Unusable::Moment)));
    let newer = format!(r#"{{"version":{},"everything":"different"}}"#, VERSION + 1);
    assert!(matches!(decode(newer.as_bytes()), Err(Unusable::Version(version)) if version == VERSION + 1));
    assert!(matches!(decode(document(0, earlier).as_bytes()), Err(Unusable::Version(0))));
    for garbage in [&b""[..], b"\xff\0\x01", b"{}", b"[]", br#"{"version":1}"#] {
        assert!(matches!(decode(garbage), Err(Unusable::Syntax(_))), "{garbage:?}");
    }
    let whole = document(VERSION, earlier);
    assert!(matches!(decode(&whole.as_bytes()[..whole.len() - 3]), Err(Unusable::Syntax(_))));
}

#[test]
fn a_moment_keeps_its_distance_and_one_beyond_time_is_refused() {
    let (there, here) = (Instant::now(), Instant::now());
    let leaving = Clock::leaving(there);
    let second = Duration::from_secs(1);
    let arriving = Clock::arriving(here, 3 * second).unwrap();
    let carried = |at| arriving.instant(leaving.offset(at)).unwrap();
    assert_eq!(carried(there), here - 3 * second);
    assert_eq!(carried(there - second), here - 4 * second);
    assert_eq!(carried(there + 10 * second), here + 7 * second);
    // Beyond what 64 bits of nanoseconds hold.
    let far = leaving.offset(there.checked_add(Duration::from_secs(1 << 40)).unwrap());
    assert_eq!(far, Offset(i64::MAX));
    assert!(matches!(Clock::arriving(here, Duration::MAX), Err(Unusable::Moment)));
}
