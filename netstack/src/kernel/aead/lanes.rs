//! Sixteen packets at once, a packet a lane of AVX-512: each instruction does for all packets what one of them needs.
//!
//! ```text
//!  ChaCha20   a register holds one word of the state of 16 packets; block 0 gives each packet's key of Poly1305,
//!             block n + 1, turned so that a register holds 16 words of one packet, is its key stream for row n (64 bytes)
//!  Poly1305   a register holds one limb of 8 packets; limbs of 44, 44 and 42 bits, products by IFMA (52 bits)
//! ```
//!
//! Branches and addresses depend on lengths only, never on keys or texts. Source: RFC 8439; the limbs are those of
//! poly1305-donna-64 (A. Moon). Tested against ring and the RFC's vectors.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{BATCH, Packet, split};

/// Bytes of a block of ChaCha20, and of a register.
const ROW: usize = 64;
/// Bytes of a block of Poly1305.
const BLOCK: usize = 16;
/// Packets of which a register holds a limb.
const GROUP: usize = 8;

const MASK_44: u64 = (1 << 44) - 1;
const MASK_42: u64 = (1 << 42) - 1;
/// "expand 32-byte k" (RFC 8439, section 2.3).
const SIGMA: [u32; 4] = [0x6170_7865, 0x3320_646e, 0x7962_2d32, 0x6b20_6574];
/// RFC 8439, section 2.5.
const CLAMP: u128 = 0x0fff_fffc_0fff_fffc_0fff_fffc_0fff_ffff;

/// Cost of a row and of what comes beside the rows: of sixteen packets here, and of one with ring, whose row is the unit (a Xeon
/// with AVX-512: 32 ns).
const LANES_ROW: usize = 9;
const LANES_REST: usize = 14;
const RING_ROW: usize = 1;
const RING_REST: usize = 5;

/// Whether sixteen lanes of the longest packet cost less than each packet by itself.
pub(super) fn pays(batch: &[Packet<'_>]) -> bool {
    let rows = |packet: &Packet<'_>| packet.bytes.len().div_ceil(ROW);
    let longest = batch.iter().map(rows).max().unwrap_or(0);
    let by_itself: usize = batch.iter().map(|packet| rows(packet) * RING_ROW + RING_REST).sum();
    longest * LANES_ROW + LANES_REST < by_itself
}

/// Exists only where the processor has what [`run`] needs.
pub(super) struct Key([u32; 8]);

impl Key {
    pub(super) fn new(key: &[u8; 32]) -> Option<Self> {
        let able = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512ifma");
        let (words, _) = key.as_chunks::<4>();
        able.then(|| Self(std::array::from_fn(|i| u32::from_le_bytes(words[i]))))
    }

    /// At most [`BATCH`] packets.
    pub(super) fn seal(&self, packets: &mut [Packet<'_>]) {
        // SAFETY: a `Key` is made only where the processor has these features.
        let tags = unsafe { run::<false>(&self.0, packets) };
        for (packet, tag) in packets.iter_mut().zip(tags) {
            *split(packet.bytes).1 = tag.to_le_bytes();
        }
    }

    /// At most [`BATCH`] packets. Which are authentic.
    pub(super) fn open(&self, packets: &mut [Packet<'_>]) -> [bool; BATCH] {
        // SAFETY: as above.
        let tags = unsafe { run::<true>(&self.0, packets) };
        let mut authentic = [false; BATCH];
        for ((packet, tag), authentic) in packets.iter_mut().zip(tags).zip(&mut authentic) {
            // As one number: no byte is looked at before another.
            *authentic = u128::from_le_bytes(*split(packet.bytes).1) == tag;
        }
        authentic
    }
}

/// Sums the key stream up with every text in place; the tags of the texts as they are sealed.
#[target_feature(enable = "avx512f,avx512bw,avx512ifma")]
fn run<const OPEN: bool>(key: &[u32; 8], packets: &mut [Packet<'_>]) -> [u128; BATCH] {
    assert!(packets.len() <= BATCH, "a packet a lane");
    let mut lens = [0; BATCH];
    for (len, packet) in lens.iter_mut().zip(packets.iter_mut()) {
        *len = split(packet.bytes).0.len();
    }
    let state = State::new(key, packets);
    let (r, s) = one_time_keys(&state);
    let groups = packets.len().div_ceil(GROUP);
    let mut macs = [Mac::new(&r[..GROUP]), Mac::new(&r[GROUP..])];
    let blocks = |first: usize| u64s(|lane| lens[first + lane].div_ceil(BLOCK) as u64);
    let ends = [blocks(0), blocks(GROUP)];
    let rows = lens.iter().max().map_or(0, |longest| longest.div_ceil(ROW));
    for row in 0..rows {
        // A datagram has far fewer blocks than a u32 counts.
        let stream = transpose_16(state.block(row as u32 + 1));
        let mut sealed = [_mm512_setzero_si512(); BATCH];
        for (lane, packet) in packets.iter_mut().enumerate() {
            let Some(left @ 1..) = lens[lane].checked_sub(row * ROW) else { continue };
            let piece = &mut packet.bytes[row * ROW..][..left.min(ROW)];
            let text = load(piece);
            let mixed = _mm512_xor_si512(text, stream[lane]);
            store(piece, mixed);
            sealed[lane] = if OPEN { text } else { _mm512_maskz_mov_epi8(first(piece.len()), mixed) };
        }
        for (group, sealed) in sealed.as_chunks().0.iter().take(groups).enumerate() {
            let words = transpose_8(sealed);
            for (block, pair) in words.chunks_exact(2).enumerate() {
                let number = _mm512_set1_epi64((row * ROW / BLOCK + block) as i64);
                let has_it = _mm512_cmpgt_epi64_mask(ends[group], number);
                macs[group].absorb(pair[0], pair[1], has_it);
            }
        }
    }
    let mut tags = [0; BATCH];
    for group in 0..groups {
        // Lengths of additional data, of which there is none, and of the text (RFC 8439, section 2.8).
        let text_lens = u64s(|lane| lens[group * GROUP + lane] as u64);
        macs[group].absorb(_mm512_setzero_si512(), text_lens, 0xff);
        tags[group * GROUP..][..GROUP].copy_from_slice(&macs[group].finish(&s[group * GROUP..][..GROUP]));
    }
    tags
}

/// Where the sixteen streams begin.
struct State([__m512i; 16]);

impl State {
    #[target_feature(enable = "avx512f")]
    fn new(key: &[u32; 8], packets: &[Packet<'_>]) -> Self {
        let mut low = [0; BATCH];
        let mut high = [0; BATCH];
        for (lane, packet) in packets.iter().enumerate() {
            (low[lane], high[lane]) = (packet.counter as u32, (packet.counter >> 32) as u32);
        }
        let mut state = [_mm512_setzero_si512(); 16];
        for (word, value) in state.iter_mut().zip(SIGMA.iter().chain(key)) {
            *word = _mm512_set1_epi32(value.cast_signed());
        }
        // 12 is the block's number, 13 the four bytes of the nonce that are zero.
        (state[14], state[15]) = (u32s(&low), u32s(&high));
        Self(state)
    }

    /// Word by word, a lane a packet (RFC 8439, section 2.3).
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn block(&self, number: u32) -> [__m512i; 16] {
        let mut start = self.0;
        start[12] = _mm512_set1_epi32(number.cast_signed());
        let mut v = start;
        macro_rules! quarter_round {
            ($a:literal, $b:literal, $c:literal, $d:literal) => {
                v[$a] = _mm512_add_epi32(v[$a], v[$b]);
                v[$d] = _mm512_rol_epi32::<16>(_mm512_xor_si512(v[$d], v[$a]));
                v[$c] = _mm512_add_epi32(v[$c], v[$d]);
                v[$b] = _mm512_rol_epi32::<12>(_mm512_xor_si512(v[$b], v[$c]));
                v[$a] = _mm512_add_epi32(v[$a], v[$b]);
                v[$d] = _mm512_rol_epi32::<8>(_mm512_xor_si512(v[$d], v[$a]));
                v[$c] = _mm512_add_epi32(v[$c], v[$d]);
                v[$b] = _mm512_rol_epi32::<7>(_mm512_xor_si512(v[$b], v[$c]));
            };
        }
        for _ in 0..10 {
            quarter_round!(0, 4, 8, 12);
            quarter_round!(1, 5, 9, 13);
            quarter_round!(2, 6, 10, 14);
            quarter_round!(3, 7, 11, 15);
            quarter_round!(0, 5, 10, 15);
            quarter_round!(1, 6, 11, 12);
            quarter_round!(2, 7, 8, 13);
            quarter_round!(3, 4, 9, 14);
        }
        for (word, start) in v.iter_mut().zip(start) {
            *word = _mm512_add_epi32(*word, start);
        }
        v
    }
}

/// `r`, clamped, and `s` of every packet (RFC 8439, section 2.6).
#[target_feature(enable = "avx512f")]
fn one_time_keys(state: &State) -> ([u128; BATCH], [u128; BATCH]) {
    let block = state.block(0);
    let mut words = [[0_u32; BATCH]; 8];
    for (words, word) in words.iter_mut().zip(block) {
        // SAFETY: the array is as large as the register; the store needs no alignment.
        unsafe { _mm512_storeu_si512(words.as_mut_ptr().cast(), word) };
    }
    let number = |lane: usize, first: usize| {
        (first..first + 4).rev().fold(0, |number, word| number << 32 | u128::from(words[word][lane]))
    };
    (std::array::from_fn(|lane| number(lane, 0) & CLAMP), std::array::from_fn(|lane| number(lane, 4)))
}

/// Poly1305 of eight texts.
struct Mac {
    r: [__m512i; 3],
    /// 20 times the second and the third limb of `r`: 2^132 is 20 modulo 2^130 - 5.
    s: [__m512i; 2],
    h: [__m512i; 3],
}

impl Mac {
    /// `r` of eight packets.
    #[target_feature(enable = "avx512f")]
    fn new(r: &[u128]) -> Self {
        let limb = |shift: u32, mask: u64| u64s(|lane| (r[lane] >> shift) as u64 & mask);
        let r = [limb(0, MASK_44), limb(44, MASK_44), limb(88, MASK_42)];
        let times_20 = |x| _mm512_add_epi64(_mm512_slli_epi64::<4>(x), _mm512_slli_epi64::<2>(x));
        Self { r, s: [times_20(r[1]), times_20(r[2])], h: [_mm512_setzero_si512(); 3] }
    }

    /// A block of each, its two words, where `has_it` says that there is one.
    #[inline]
    #[target_feature(enable = "avx512f,avx512ifma")]
    fn absorb(&mut self, low: __m512i, high: __m512i, has_it: __mmask8) {
        let mask_44 = _mm512_set1_epi64(MASK_44.cast_signed());
        let mask_42 = _mm512_set1_epi64(MASK_42.cast_signed());
        let middle = _mm512_or_si512(_mm512_srli_epi64::<44>(low), _mm512_slli_epi64::<20>(high));
        // Every block is whole, padded with zeroes, so the bit above it is 2^128.
        let top = _mm512_or_si512(_mm512_srli_epi64::<24>(high), _mm512_set1_epi64(1 << 40));
        let a = [
            _mm512_add_epi64(self.h[0], _mm512_and_si512(low, mask_44)),
            _mm512_add_epi64(self.h[1], _mm512_and_si512(middle, mask_44)),
            _mm512_add_epi64(self.h[2], top),
        ];
        let ([r0, r1, r2], [s1, s2]) = (self.r, self.s);
        // The limbs of `a` have 46 bits at most, those of `r` and `s` 49: a sum of three halves of products fits well.
        let sums = [
            sum_of_products(a, [r0, s2, s1]),
            sum_of_products(a, [r1, r0, s2]),
            sum_of_products(a, [r2, r1, r0]),
        ];
        // The upper half stands 52 bits higher, so 8 above the next limb, and 10 above the last, which has 42 bits.
        let d1 = _mm512_add_epi64(
            sums[1].0,
            _mm512_add_epi64(_mm512_slli_epi64::<8>(sums[0].1), _mm512_srli_epi64::<44>(sums[0].0)),
        );
        let d2 = _mm512_add_epi64(
            sums[2].0,
            _mm512_add_epi64(_mm512_slli_epi64::<8>(sums[1].1), _mm512_srli_epi64::<44>(d1)),
        );
        let over = _mm512_add_epi64(_mm512_slli_epi64::<10>(sums[2].1), _mm512_srli_epi64::<42>(d2));
        let times_5 = _mm512_add_epi64(over, _mm512_slli_epi64::<2>(over));
        let d0 = _mm512_add_epi64(_mm512_and_si512(sums[0].0, mask_44), times_5);
        let h = [
            _mm512_and_si512(d0, mask_44),
            _mm512_add_epi64(_mm512_and_si512(d1, mask_44), _mm512_srli_epi64::<44>(d0)),
            _mm512_and_si512(d2, mask_42),
        ];
        if has_it == 0xff {
            self.h = h;
        } else {
            for (old, new) in self.h.iter_mut().zip(h) {
                *old = _mm512_mask_mov_epi64(*old, has_it, new);
            }
        }
    }

    /// The tags; `s` of eight packets.
    #[target_feature(enable = "avx512f")]
    fn finish(&self, s: &[u128]) -> [u128; GROUP] {
        let limbs = self.h.map(|limb| {
            let mut lanes = [0_u64; GROUP];
            // SAFETY: the array is as large as the register; the store needs no alignment.
            unsafe { _mm512_storeu_si512(lanes.as_mut_ptr().cast(), limb) };
            lanes
        });
        std::array::from_fn(|lane| tag(limbs.map(|limb| limb[lane]), s[lane]))
    }
}

/// The lower 52 bits of each product, and what is above them.
#[inline]
#[target_feature(enable = "avx512f,avx512ifma")]
fn sum_of_products(a: [__m512i; 3], factors: [__m512i; 3]) -> (__m512i, __m512i) {
    let (mut lo, mut hi) = (_mm512_setzero_si512(), _mm512_setzero_si512());
    for (a, factor) in a.into_iter().zip(factors) {
        lo = _mm512_madd52lo_epu64(lo, a, factor);
        hi = _mm512_madd52hi_epu64(hi, a, factor);
    }
    (lo, hi)
}

/// `h` modulo 2^130 - 5, plus `s`, modulo 2^128.
fn tag([mut h0, mut h1, mut h2]: [u64; 3], s: u128) -> u128 {
    // Twice, since the first carry may make another.
    for _ in 0..2 {
        h2 += h1 >> 44;
        h1 &= MASK_44;
        h0 += (h2 >> 42) * 5;
        h2 &= MASK_42;
        h1 += h0 >> 44;
        h0 &= MASK_44;
    }
    // h + 5 - 2^130, which counts when it is not negative.
    let g0 = h0 + 5;
    let g1 = h1 + (g0 >> 44);
    let g2 = (h2 + (g1 >> 44)).wrapping_sub(1 << 42);
    let below = (g2 >> 63).wrapping_neg();
    let choose = |h: u64, g: u64| h & below | g & !below;
    let limbs = [choose(h0, g0 & MASK_44), choose(h1, g1 & MASK_44), choose(h2, g2)];
    let number = u128::from(limbs[0]) | u128::from(limbs[1]) << 44 | u128::from(limbs[2]) << 88;
    number.wrapping_add(s)
}

/// The first `count` bytes of a row.
fn first(count: usize) -> __mmask64 {
    if count >= ROW { !0 } else { (1 << count) - 1 }
}

/// At most a row; zeroes behind.
#[target_feature(enable = "avx512f,avx512bw")]
fn load(piece: &[u8]) -> __m512i {
    // SAFETY: what the mask leaves out is not read, and it leaves out what is behind the piece.
    unsafe { _mm512_maskz_loadu_epi8(first(piece.len()), piece.as_ptr().cast()) }
}

#[target_feature(enable = "avx512f,avx512bw")]
fn store(piece: &mut [u8], row: __m512i) {
    // SAFETY: what the mask leaves out is not written, and it leaves out what is behind the piece.
    unsafe { _mm512_mask_storeu_epi8(piece.as_mut_ptr().cast(), first(piece.len()), row) };
}

#[target_feature(enable = "avx512f")]
fn u64s(lane: impl Fn(usize) -> u64) -> __m512i {
    let lanes: [u64; GROUP] = std::array::from_fn(lane);
    // SAFETY: the array is as large as the register; the load needs no alignment.
    unsafe { _mm512_loadu_si512(lanes.as_ptr().cast()) }
}

#[target_feature(enable = "avx512f")]
fn u32s(lanes: &[u32; BATCH]) -> __m512i {
    // SAFETY: as above.
    unsafe { _mm512_loadu_si512(lanes.as_ptr().cast()) }
}

/// Of four registers the quarters: the first of each, the second of each, and so on.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose_quarters(a: __m512i, b: __m512i, c: __m512i, d: __m512i) -> [__m512i; 4] {
    let (even_ab, odd_ab) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b));
    let (even_cd, odd_cd) = (_mm512_shuffle_i32x4::<0x88>(c, d), _mm512_shuffle_i32x4::<0xdd>(c, d));
    [
        _mm512_shuffle_i32x4::<0x88>(even_ab, even_cd),
        _mm512_shuffle_i32x4::<0x88>(odd_ab, odd_cd),
        _mm512_shuffle_i32x4::<0xdd>(even_ab, even_cd),
        _mm512_shuffle_i32x4::<0xdd>(odd_ab, odd_cd),
    ]
}

/// Sixteen words of sixteen packets, from a register a word to a register a packet.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose_16(words: [__m512i; 16]) -> [__m512i; 16] {
    // By four words: those of packets 0, 4, 8, 12; of 1, 5, 9, 13; and so on.
    let mut fours = [[_mm512_setzero_si512(); 4]; 4];
    for (of, four) in words.as_chunks::<4>().0.iter().zip(&mut fours) {
        let [a, b, c, d] = *of;
        let (low_ab, high_ab) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        let (low_cd, high_cd) = (_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
        *four = [
            _mm512_unpacklo_epi64(low_ab, low_cd),
            _mm512_unpackhi_epi64(low_ab, low_cd),
            _mm512_unpacklo_epi64(high_ab, high_cd),
            _mm512_unpackhi_epi64(high_ab, high_cd),
        ];
    }
    let mut packets = [_mm512_setzero_si512(); 16];
    let [a, b, c, d] = fours;
    for i in 0..4 {
        [packets[i], packets[4 + i], packets[8 + i], packets[12 + i]] =
            transpose_quarters(a[i], b[i], c[i], d[i]);
    }
    packets
}

/// Eight words of 64 bits of eight packets, from a register a packet to a register a word.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose_8(packets: &[__m512i; GROUP]) -> [__m512i; 8] {
    let [a, b, c, d, e, f, g, h] = *packets;
    let even = transpose_quarters(
        _mm512_unpacklo_epi64(a, b),
        _mm512_unpacklo_epi64(c, d),
        _mm512_unpacklo_epi64(e, f),
        _mm512_unpacklo_epi64(g, h),
    );
    let odd = transpose_quarters(
        _mm512_unpackhi_epi64(a, b),
        _mm512_unpackhi_epi64(c, d),
        _mm512_unpackhi_epi64(e, f),
        _mm512_unpackhi_epi64(g, h),
    );
    [even[0], odd[0], even[1], odd[1], even[2], odd[2], even[3], odd[3]]
}

#[cfg(test)]
mod tests;
