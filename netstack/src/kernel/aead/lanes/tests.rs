use super::*;

/// Eight times the tag of a text of whole blocks, each beside other texts.
fn tags(r: u128, s: u128, text: &str) -> Option<[u128; GROUP]> {
    Key::new(&[0; 32])?;
    let bytes: Vec<u8> =
        (0..text.len() / 2).map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap()).collect();
    #[target_feature(enable = "avx512f,avx512bw,avx512ifma")]
    fn run(r: u128, s: u128, bytes: &[u8]) -> [u128; GROUP] {
        let mut mac = Mac::new(&[r; GROUP]);
        for block in bytes.as_chunks::<BLOCK>().0 {
            let block = u128::from_le_bytes(*block);
            mac.absorb(u64s(|_| block as u64), u64s(|_| (block >> 64) as u64), 0xff);
            // No lane has one.
            mac.absorb(u64s(|_| 1), u64s(|_| 2), 0);
        }
        mac.finish(&[s; GROUP])
    }
    // SAFETY: a `Key` could be made, so the processor has these features.
    Some(unsafe { run(r, s, &bytes) })
}

fn number(text: &str) -> u128 {
    u128::from_str_radix(text, 16).unwrap().swap_bytes()
}

/// RFC 8439, appendix A.3, test vectors 7 to 11: sums at the edges of 2^130 - 5 and 2^128.
#[test]
fn poly1305_wraps_as_the_rfc_says() {
    let (zero, ones) = ("00000000000000000000000000000000", "ffffffffffffffffffffffffffffffff");
    let two = "02000000000000000000000000000000";
    let four = "01000000000000000400000000000000";
    let vectors = [
        (two, zero, ones.to_owned(), "03000000000000000000000000000000"),
        (two, ones, two.to_owned(), "03000000000000000000000000000000"),
        (
            "01000000000000000000000000000000",
            zero,
            format!("{ones}f0ffffffffffffffffffffffffffffff11000000000000000000000000000000"),
            "05000000000000000000000000000000",
        ),
        (
            "01000000000000000000000000000000",
            zero,
            format!("{ones}fbfefefefefefefefefefefefefefefe01010101010101010101010101010101"),
            zero,
        ),
        (two, zero, "fdffffffffffffffffffffffffffffff".to_owned(), "faffffffffffffffffffffffffffffff"),
        (
            four,
            zero,
            "e33594d7505e43b900000000000000003394d7505e4379cd01000000000000000000000000000000000000000000000001000000\
             000000000000000000000000"
                .to_owned(),
            "14000000000000005500000000000000",
        ),
        (
            four,
            zero,
            "e33594d7505e43b900000000000000003394d7505e4379cd010000000000000000000000000000000000000000000000".to_owned(),
            "13000000000000000000000000000000",
        ),
    ];
    for (r, s, text, tag) in vectors {
        let Some(tags) = tags(number(r), number(s), &text) else {
            return eprintln!("SKIPPED: needs AVX-512 IFMA");
        };
        assert_eq!(tags, [number(tag); GROUP], "{r} {text}");
    }
}

#[test]
fn sixteen_at_once_pay_for_trains_and_not_for_one_long_packet_among_few() {
    let pays_for = |lens: &[usize]| {
        let mut bytes: Vec<Vec<u8>> = lens.iter().map(|len| vec![0; *len]).collect();
        let batch: Vec<_> = bytes.iter_mut().map(|bytes| Packet { counter: 0, bytes }).collect();
        pays(&batch)
    };
    assert!(pays_for(&[1440; 16]) && pays_for(&[96; 16]));
    assert!(!pays_for(&[1440]) && !pays_for(&[96; 2]) && !pays_for(&[1440, 96, 96, 96, 96]));
}
