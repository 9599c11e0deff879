//! Octets as this crate keeps much of the same kind in little room: records and lengths behind each other, read from the
//! front. Never from outside: what stands on the wire is read by `fast` and by hickory.

use std::net::{Ipv4Addr, Ipv6Addr};

use crate::zone::{Data, Srv};

const A: u8 = 1;
const AAAA: u8 = 2;
const CNAME: u8 = 3;
const NS: u8 = 4;
const PTR: u8 = 5;
const SRV: u8 = 6;
const TXT: u8 = 7;

/// What is left to read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Octets<'a>(pub(crate) &'a [u8]);

impl<'a> Octets<'a> {
    /// The next `count`; `None` when there are fewer.
    pub(crate) fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*taken)
    }

    pub(crate) fn octet(&mut self) -> Option<u8> {
        self.array::<1>().map(|[octet]| octet)
    }

    /// As [`put_number`] wrote it.
    pub(crate) fn number(&mut self) -> Option<usize> {
        let mut number = 0;
        for shift in (0..usize::BITS).step_by(7) {
            let octet = self.octet()?;
            number |= usize::from(octet & 0x7f) << shift;
            if octet & 0x80 == 0 {
                return Some(number);
            }
        }
        None
    }

    /// As many octets as the number before them says.
    pub(crate) fn counted(&mut self) -> Option<&'a [u8]> {
        let count = self.number()?;
        self.take(count)
    }

    /// As [`put_data`] wrote them.
    pub(crate) fn data<N>(&mut self, mut name: impl FnMut(&mut Self) -> Option<N>) -> Option<Data<N>> {
        Some(match self.octet()? {
            A => Data::A(Ipv4Addr::from(self.array::<4>()?)),
            AAAA => Data::Aaaa(Ipv6Addr::from(self.array::<16>()?)),
            CNAME => Data::Cname(name(self)?),
            NS => Data::Ns(name(self)?),
            PTR => Data::Ptr(name(self)?),
            SRV => Data::Srv(Srv {
                priority: u16::from_be_bytes(self.array()?),
                weight: u16::from_be_bytes(self.array()?),
                port: u16::from_be_bytes(self.array()?),
                target: name(self)?,
            }),
            TXT => Data::Txt(String::from_utf8_lossy(self.counted()?).into_owned()),
            _ => return None,
        })
    }
}

/// Seven bits an octet, the lowest first; the highest bit says that more follow.
pub(crate) fn put_number(octets: &mut Vec<u8>, mut number: usize) {
    while number > 0x7f {
        octets.push((number & 0x7f) as u8 | 0x80);
        number >>= 7;
    }
    octets.push(number as u8);
}

/// A number and as many octets.
pub(crate) fn put_counted(octets: &mut Vec<u8>, counted: &[u8]) {
    put_number(octets, counted.len());
    octets.extend_from_slice(counted);
}

/// One record's data; `put_name` says how a name is written.
pub(crate) fn put_data<N>(octets: &mut Vec<u8>, data: &Data<N>, mut put_name: impl FnMut(&mut Vec<u8>, &N)) {
    match data {
        Data::A(address) => {
            octets.push(A);
            octets.extend_from_slice(&address.octets());
        }
        Data::Aaaa(address) => {
            octets.push(AAAA);
            octets.extend_from_slice(&address.octets());
        }
        Data::Cname(name) => {
            octets.push(CNAME);
            put_name(octets, name);
        }
        Data::Ns(name) => {
            octets.push(NS);
            put_name(octets, name);
        }
        Data::Ptr(name) => {
            octets.push(PTR);
            put_name(octets, name);
        }
        Data::Srv(srv) => {
            octets.push(SRV);
            for number in [srv.priority, srv.weight, srv.port] {
                octets.extend_from_slice(&number.to_be_bytes());
            }
            put_name(octets, &srv.target);
        }
        Data::Txt(text) => {
            octets.push(TXT);
            put_counted(octets, text.as_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_every_length_come_back() {
        for number in [0, 1, 127, 128, 300, 16_383, 16_384, 1 << 31, usize::MAX] {
            let mut octets = Vec::new();
            put_number(&mut octets, number);
            let mut left = Octets(&octets);
            assert_eq!((left.number(), left.0), (Some(number), &[][..]));
        }
        assert_eq!(Octets(&[0x80]).number(), None);
    }

    #[test]
    fn data_that_end_too_early_are_none() {
        let mut octets = Vec::new();
        put_data(&mut octets, &Data::<u8>::A(Ipv4Addr::LOCALHOST), |octets, name| octets.push(*name));
        assert_eq!(Octets(&octets).data(Octets::octet), Some(Data::A(Ipv4Addr::LOCALHOST)));
        assert_eq!(Octets(&octets[..4]).data(Octets::octet), None);
        assert_eq!(Octets(&[99]).data(Octets::octet), None);
    }
}
