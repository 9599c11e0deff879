//! Questions and replies in batches: one system call takes many datagrams, one sends the replies.
//!
//! Source: recvmmsg(2), sendmmsg(2). The socket is bound to one address by whoever opens it, so replies leave from the
//! address that was asked. What a datagram says is no business of this file.
#![allow(unsafe_code)]

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;

use super::udp::{STORAGE_LEN, from_storage};

/// Datagrams that one call takes or sends.
pub const BATCH: usize = 64;
/// Longest datagram taken; a longer one is told as cut.
pub const RECEIVE_BYTES: usize = 2048;

/// Room for [`BATCH`] datagrams and their replies.
pub struct Batch {
    buffers: Vec<[u8; RECEIVE_BYTES]>,
    addresses: Vec<libc::sockaddr_storage>,
    received: Vec<Received>,
    replies: Vec<Vec<u8>>,
}

#[derive(Clone, Copy)]
struct Received {
    len: usize,
    address_len: libc::socklen_t,
    cut: bool,
}

/// One datagram of the last receive.
pub struct Datagram<'a> {
    /// Who sent it; `None` when it is of no family of ours.
    pub from: Option<SocketAddr>,
    /// At most [`RECEIVE_BYTES`].
    pub bytes: &'a [u8],
    /// There was more of it.
    pub cut: bool,
    /// Empty; what is written goes back to the sender with [`Batch::send_replies`].
    pub reply: &'a mut Vec<u8>,
}

impl Default for Batch {
    fn default() -> Self {
        // SAFETY: `sockaddr_storage` is plain data for which zeroes are a valid value.
        let zero: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
        Self {
            buffers: vec![[0; RECEIVE_BYTES]; BATCH],
            addresses: vec![zero; BATCH],
            received: Vec::with_capacity(BATCH),
            replies: vec![Vec::new(); BATCH],
        }
    }
}

impl Batch {
    /// Waits for a datagram, as long as the socket's read timeout says, and takes those that are there. Returns how many.
    ///
    /// Errors: what the socket is told about earlier replies (`ECONNREFUSED` and the like) too; the next call goes on.
    pub fn receive(&mut self, socket: &UdpSocket) -> io::Result<usize> {
        self.received.clear();
        let mut pieces = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; BATCH];
        let mut headers = empty_headers();
        let parts = headers.iter_mut().zip(&mut pieces).zip(&mut self.buffers).zip(&mut self.addresses);
        for (((header, piece), buffer), address) in parts {
            piece.iov_base = buffer.as_mut_ptr().cast();
            piece.iov_len = RECEIVE_BYTES;
            header.msg_hdr.msg_name = std::ptr::from_mut(address).cast();
            header.msg_hdr.msg_namelen = STORAGE_LEN;
            header.msg_hdr.msg_iov = std::ptr::from_mut(piece);
            header.msg_hdr.msg_iovlen = 1;
        }
        // SAFETY: each of the BATCH headers points to an address and a piece, each piece to a buffer, all of the true
        // lengths and borrowed mutably for the whole call.
        let count = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                headers.as_mut_ptr(),
                BATCH as libc::c_uint,
                libc::MSG_WAITFORONE,
                std::ptr::null_mut(),
            )
        };
        let Ok(count) = usize::try_from(count) else {
            let error = io::Error::last_os_error();
            let quiet = matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted);
            return if quiet { Ok(0) } else { Err(error) };
        };
        let taken = headers.iter().take(count).map(|header| Received {
            len: usize::try_from(header.msg_len).unwrap_or(0).min(RECEIVE_BYTES),
            address_len: header.msg_hdr.msg_namelen.min(STORAGE_LEN),
            cut: header.msg_hdr.msg_flags & libc::MSG_TRUNC != 0,
        });
        self.received.extend(taken);
        self.replies.iter_mut().for_each(Vec::clear);
        Ok(self.received.len())
    }

    /// What the last receive brought.
    pub fn datagrams(&mut self) -> impl Iterator<Item = Datagram<'_>> {
        let parts = self.received.iter().zip(&self.buffers).zip(&self.addresses).zip(&mut self.replies);
        parts.map(|(((received, buffer), address), reply)| Datagram {
            from: from_storage(address),
            bytes: buffer.get(..received.len).unwrap_or_default(),
            cut: received.cut,
            reply,
        })
    }

    /// Sends every reply that is not empty to the sender of its datagram, without waiting for room. Returns how many
    /// could not be sent: one that fails keeps none of the others.
    pub fn send_replies(&mut self, socket: &UdpSocket) -> usize {
        let mut pieces = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; BATCH];
        let mut headers = empty_headers();
        let parts = self.received.iter().zip(&mut self.addresses).zip(&mut self.replies);
        let answered = parts.filter(|(_, reply)| !reply.is_empty());
        let mut count = 0;
        for ((header, piece), ((received, address), reply)) in
            headers.iter_mut().zip(&mut pieces).zip(answered)
        {
            piece.iov_base = reply.as_mut_ptr().cast();
            piece.iov_len = reply.len();
            header.msg_hdr.msg_name = std::ptr::from_mut(address).cast();
            header.msg_hdr.msg_namelen = received.address_len;
            header.msg_hdr.msg_iov = std::ptr::from_mut(piece);
            header.msg_hdr.msg_iovlen = 1;
            count += 1;
        }
        let (mut at, mut failed) = (0, 0);
        while at < count {
            let rest = &mut headers[at..count];
            // SAFETY: each header of `rest` points to an address and a piece, each piece to a reply, all of the true
            // lengths and borrowed mutably by `headers`' filling loop's owner, `self`, for the whole call.
            let sent = unsafe {
                libc::sendmmsg(
                    socket.as_raw_fd(),
                    rest.as_mut_ptr(),
                    libc::c_uint::try_from(rest.len()).unwrap_or(0),
                    libc::MSG_DONTWAIT,
                )
            };
            match usize::try_from(sent) {
                Ok(sent) if sent > 0 => at += sent,
                _ if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
                _ => {
                    at += 1;
                    failed += 1;
                }
            }
        }
        failed
    }
}

fn empty_headers() -> [libc::mmsghdr; BATCH] {
    // SAFETY: `mmsghdr` is plain data for which zeroes are a valid value.
    unsafe { std::mem::zeroed() }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn pair(address: &str) -> (UdpSocket, UdpSocket) {
        let server = UdpSocket::bind((address, 0)).unwrap();
        server.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        let client = UdpSocket::bind((address, 0)).unwrap();
        client.connect(server.local_addr().unwrap()).unwrap();
        client.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        (server, client)
    }

    #[test]
    fn what_came_in_one_batch_is_answered_to_its_sender_in_both_families() {
        for address in ["127.0.0.1", "::1"] {
            let (server, client) = pair(address);
            let (_, other) = (&server, UdpSocket::bind((address, 0)).unwrap());
            other.connect(server.local_addr().unwrap()).unwrap();
            other.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
            client.send(b"one").unwrap();
            other.send(b"two").unwrap();
            client.send(b"mute").unwrap();
            let mut batch = Batch::default();
            assert_eq!(batch.receive(&server).unwrap(), 3);
            for datagram in batch.datagrams().filter(|datagram| datagram.bytes != b"mute") {
                let port = datagram.from.unwrap().port();
                datagram.reply.extend_from_slice(format!("{port} {:?}", datagram.bytes).as_bytes());
            }
            assert_eq!(batch.send_replies(&server), 0);
            for (socket, said) in [(&client, b"one"), (&other, b"two")] {
                let mut buffer = [0; 64];
                let length = socket.recv(&mut buffer).unwrap();
                let expected = format!("{} {said:?}", socket.local_addr().unwrap().port());
                assert_eq!(&buffer[..length], expected.as_bytes());
            }
        }
    }

    #[test]
    fn a_reply_that_cannot_be_sent_keeps_none_of_the_others() {
        let (server, client) = pair("127.0.0.1");
        client.send(b"large").unwrap();
        client.send(b"small").unwrap();
        let mut batch = Batch::default();
        assert_eq!(batch.receive(&server).unwrap(), 2);
        for datagram in batch.datagrams() {
            // Longer than any datagram may be.
            let length = if datagram.bytes == b"large" { 70_000 } else { 1 };
            datagram.reply.resize(length, b'x');
        }
        assert_eq!(batch.send_replies(&server), 1);
        let mut buffer = [0; 64];
        assert_eq!(client.recv(&mut buffer).unwrap(), 1);
    }

    #[test]
    fn a_longer_datagram_is_told_as_cut_and_silence_ends_with_the_timeout() {
        let (server, client) = pair("127.0.0.1");
        server.set_read_timeout(Some(Duration::from_millis(10))).unwrap();
        let mut batch = Batch::default();
        assert_eq!(batch.receive(&server).unwrap(), 0);
        client.send(&[1; RECEIVE_BYTES + 1]).unwrap();
        client.send(&[2; RECEIVE_BYTES]).unwrap();
        assert_eq!(batch.receive(&server).unwrap(), 2);
        let seen: Vec<_> = batch.datagrams().map(|datagram| (datagram.bytes.len(), datagram.cut)).collect();
        assert_eq!(seen, [(RECEIVE_BYTES, true), (RECEIVE_BYTES, false)]);
    }
}
