use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use super::*;

fn with_ring(key: &[u8; 32], counter: u64, text: &[u8]) -> Vec<u8> {
    let mut sealed = text.to_vec();
    let key = LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, key).unwrap());
    key.seal_in_place_append_tag(nonce(counter), Aad::empty(), &mut sealed).unwrap();
    sealed
}

fn packets<'a>(counters: &[u64], bytes: &'a mut [Vec<u8>]) -> impl Iterator<Item = Packet<'a>> {
    let counters = counters.to_vec();
    counters.into_iter().zip(bytes).map(|(counter, bytes)| Packet { counter, bytes })
}

fn seal(key: &Key, counters: &[u64], texts: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let mut sealed = texts.to_vec();
    sealed.iter_mut().for_each(|text| text.extend([0xee; TAG_LEN]));
    key.seal(packets(counters, &mut sealed));
    sealed
}

fn open(key: &Key, counters: &[u64], sealed: &[Vec<u8>]) -> (Vec<Vec<u8>>, Vec<bool>) {
    let (mut opened, mut verdicts) = (sealed.to_vec(), Vec::new());
    key.open(packets(counters, &mut opened), |authentic| verdicts.push(authentic));
    (opened, verdicts)
}

/// Of one packet with a key of zeroes: RFC 8439, appendix A.1, test vector 2 (block 1).
#[test]
fn the_key_stream_is_that_of_the_rfc() {
    let stream = "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed29b721769ce64e43d57133b074d839d5\
                  31ed1f28510afb45ace10a1f4b794d6f";
    let expected: Vec<u8> =
        (0..64).map(|i| u8::from_str_radix(&stream[2 * i..2 * i + 2], 16).unwrap()).collect();
    for count in [1, 16] {
        let sealed = seal(&Key::new(&[0; 32]), &vec![0; count], &vec![vec![0; 64]; count]);
        assert!(sealed.iter().all(|sealed| sealed[..64] == expected));
    }
}

#[test]
fn any_batch_is_sealed_as_ring_seals_each_and_opens_again() {
    let mut random = StdRng::seed_from_u64(7);
    for round in 0..600 {
        let key: [u8; 32] = random.random();
        let count = random.random_range(1..40);
        // Equal ones, as in a train; small ones; any. And texts whose words are at the limits of the limbs.
        let longest = [1440, 80, 1440, 9000][round % 4];
        let equal = random.random_range(0..longest);
        let len = |random: &mut StdRng| if round % 4 == 0 { equal } else { random.random_range(0..longest) };
        let texts: Vec<Vec<u8>> = (0..count)
            .map(|_| {
                let len = len(&mut random);
                match random.random_range(0..4) {
                    0 => vec![0xff; len],
                    1 => vec![0; len],
                    _ => (0..len).map(|_| random.random()).collect(),
                }
            })
            .collect();
        let mut counters: Vec<u64> = (0..count as u64).map(|n| n + random.random_range(0..1 << 33)).collect();
        counters[0] = u64::MAX - (1 << 13);
        let cipher = Key::new(&key);
        let sealed = seal(&cipher, &counters, &texts);
        for ((sealed, text), counter) in sealed.iter().zip(&texts).zip(&counters) {
            assert_eq!(*sealed, with_ring(&key, *counter, text), "round {round}");
        }
        let (opened, verdicts) = open(&cipher, &counters, &sealed);
        assert_eq!(verdicts, vec![true; count]);
        assert!(opened.iter().zip(&texts).all(|(opened, text)| opened[..text.len()] == **text));
    }
}

#[test]
fn a_flipped_bit_spoils_its_packet_and_no_other() {
    let mut random = StdRng::seed_from_u64(8);
    let cipher = Key::new(&[3; 32]);
    let counters: Vec<u64> = (0..16).collect();
    for len in [0, 1, 15, 16, 17, 64, 65, 200] {
        let sealed = seal(&cipher, &counters, &vec![vec![5; len]; 16]);
        for at in 0..len + TAG_LEN {
            let (lane, bit) = (random.random_range(0..16), random.random_range(0..8));
            let mut spoilt = sealed.clone();
            spoilt[lane][at] ^= 1 << bit;
            let (_, verdicts) = open(&cipher, &counters, &spoilt);
            assert_eq!(verdicts.iter().position(|authentic| !authentic), Some(lane), "{len} {at}");
            assert_eq!(verdicts.iter().filter(|authentic| **authentic).count(), 15);
        }
        let mut moved = counters.clone();
        moved.swap(2, 9);
        let (_, verdicts) = open(&cipher, &moved, &sealed);
        assert_eq!(verdicts.iter().filter(|authentic| **authentic).count(), 14, "a counter is authentic too");
    }
}

/// One that is shorter than a tag never comes here (`message::parse`).
#[test]
fn batches_of_every_size_come_out_in_their_order() {
    let cipher = Key::new(&[4; 32]);
    for count in 0..50 {
        let counters: Vec<u64> = (100..100 + count).collect();
        let texts: Vec<Vec<u8>> = (0..count).map(|n| vec![n as u8; 900]).collect();
        let sealed = seal(&cipher, &counters, &texts);
        let (opened, verdicts) = open(&cipher, &counters, &sealed);
        assert_eq!((opened.len() as u64, verdicts.len() as u64), (count, count));
        assert!(verdicts.iter().all(|authentic| *authentic));
        assert!(opened.iter().zip(&texts).all(|(opened, text)| opened[..900] == **text));
    }
}
