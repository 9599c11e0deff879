//! Rate limits of links: token bucket filters (TBF) by rtnetlink, and what a link receives led through an IFB device, since a
//! filter shapes only what is sent.
//!
//! ```text
//!  to the pod:    host --> [TBF at the root of the pod's link] --> pod
//!  from the pod:  pod --> link, ingress: mirred redirect --> [TBF at the root of the IFB] --> as if received by the link
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use futures::{StreamExt, TryStreamExt};
use rtnetlink::packet_core::{
    DefaultNla, NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
    Nla as _, NlasIterator,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::tc::{TcAttribute, TcHandle, TcMessage, TcOption};
use rtnetlink::{Handle, LinkIfb};

use super::link::cause;

const TBF: &str = "tbf";
const INGRESS: &str = "ingress";
/// Attributes of TBF and the size of `struct tc_tbf_qopt` (uapi `linux/pkt_sched.h`).
const TCA_TBF_PARMS: u16 = 1;
const TCA_TBF_RATE64: u16 = 4;
const TCA_TBF_BURST: u16 = 6;
const PARMS_BYTES: usize = 36;
const RATE_OFFSET: usize = 8;
const LIMIT_OFFSET: usize = 24;
/// `TC_LINKLAYER_ETHERNET`.
const LINKLAYER_ETHERNET: u8 = 1;
/// `ETH_P_ALL`.
const ANY_PROTOCOL: u16 = 3;

#[derive(Debug, thiserror::Error)]
#[error("{operation} {link}")]
pub struct ShaperError {
    pub operation: &'static str,
    pub link: String,
    pub source: io::Error,
}

/// One token bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Bytes a second.
    pub rate: u64,
    /// Bytes that may go at once.
    pub burst: u32,
    /// Bytes that wait at most, the burst included.
    pub limit: u32,
}

/// What shapes the links of a namespace, by link index.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Queues {
    /// Rate and limit of the TBF at the root.
    buckets: BTreeMap<u32, (u64, u32)>,
    /// Links whose received packets may be led elsewhere.
    ingress: BTreeSet<u32>,
}

impl Queues {
    pub fn holds(&self, index: u32, shape: Option<&Shape>) -> bool {
        self.buckets.get(&index).copied() == shape.map(|shape| (shape.rate, shape.limit))
    }

    pub fn is_redirected(&self, index: u32) -> bool {
        self.ingress.contains(&index)
    }
}

/// Writes and reads the queues of one namespace.
#[derive(Clone, Debug)]
pub struct Shaper {
    handle: Handle,
}

impl Shaper {
    pub fn new(handle: Handle) -> Self {
        Self { handle }
    }

    pub async fn queues(&self) -> Result<Queues, ShaperError> {
        let listed: Vec<TcMessage> = self
            .handle
            .qdisc()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(|error| failed("list the queues of", "links", error))?;
        let mut queues = Queues::default();
        for message in &listed {
            let Ok(index) = u32::try_from(message.header.index) else { continue };
            match kind(message) {
                Some(TBF) if message.header.parent == TcHandle::ROOT => {
                    queues.buckets.extend(bucket(message).map(|bucket| (index, bucket)));
                }
                Some(INGRESS) => drop(queues.ingress.insert(index)),
                _ => {}
            }
        }
        Ok(queues)
    }

    /// Makes or changes the bucket at the root of a link; `None` gives back the kernel's default queue.
    pub async fn shape(&self, link: &str, index: u32, shape: Option<&Shape>) -> Result<(), ShaperError> {
        let Some(shape) = shape else {
            let deleted = self.delete(index, TcHandle::ROOT).await;
            return deleted.map_err(|error| failed("delete the rate limit of", link, error));
        };
        let mut message = TcMessage::with_index(signed(index));
        message.header.parent = TcHandle::ROOT;
        message.attributes = vec![TcAttribute::Kind(TBF.to_owned()), TcAttribute::Options(options(shape))];
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::NewQueueDiscipline(message));
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
        let error = |error| failed("limit the rate of", link, error);
        let mut answers = self.handle.clone().request(request).map_err(error)?;
        while let Some(answer) = answers.next().await {
            if let NetlinkPayload::Error(refused) = answer.payload
                && refused.code.is_some()
            {
                return Err(error(rtnetlink::Error::NetlinkError(refused)));
            }
        }
        Ok(())
    }

    /// An IFB device, up, that takes no part in IP.
    pub async fn add_ifb(&self, name: &str, mtu_bytes: u32) -> Result<(), ShaperError> {
        let message = LinkIfb::new(name).mtu(mtu_bytes).up().build();
        let made = self.handle.link().add(message).execute().await;
        made.map_err(|error| failed("create the IFB device", name, error))
    }

    /// Leads what `index` receives through `through`.
    pub async fn redirect(&self, link: &str, index: u32, through: u32) -> Result<(), ShaperError> {
        let error = |error| failed("redirect what is received by", link, error);
        self.handle.qdisc().replace(signed(index)).ingress().execute().await.map_err(error)?;
        let mut filters = self.handle.traffic_filter(signed(index));
        let filter = filters.add().parent(TcHandle { major: 0xffff, minor: 0 }.into());
        let filter = filter.protocol(ANY_PROTOCOL.to_be()).redirect(through).map_err(error)?;
        filter.execute().await.map_err(error)
    }

    pub async fn end_redirection(&self, link: &str, index: u32) -> Result<(), ShaperError> {
        let deleted = self.delete(index, TcHandle::INGRESS).await;
        deleted.map_err(|error| failed("end the redirection of", link, error))
    }

    async fn delete(&self, index: u32, parent: TcHandle) -> Result<(), rtnetlink::Error> {
        let mut request = self.handle.qdisc().del(signed(index));
        request.message_mut().header.parent = parent;
        request.execute().await
    }
}

fn failed(operation: &'static str, link: &str, error: rtnetlink::Error) -> ShaperError {
    ShaperError { operation, link: link.to_owned(), source: cause(error) }
}

/// The kernel's link indexes are positive `int`s.
fn signed(index: u32) -> i32 {
    i32::try_from(index).unwrap_or(i32::MAX)
}

fn kind(message: &TcMessage) -> Option<&str> {
    message.attributes.iter().find_map(|attribute| match attribute {
        TcAttribute::Kind(kind) => Some(kind.as_str()),
        _ => None,
    })
}

/// `struct tc_tbf_qopt` with the fields that count; burst and a rate of 32 bits or more stand in attributes of their own.
fn options(shape: &Shape) -> Vec<TcOption> {
    let mut parms = [0; PARMS_BYTES];
    parms[1] = LINKLAYER_ETHERNET;
    let narrow = u32::try_from(shape.rate).unwrap_or(u32::MAX);
    parms[RATE_OFFSET..RATE_OFFSET + 4].copy_from_slice(&narrow.to_ne_bytes());
    parms[LIMIT_OFFSET..LIMIT_OFFSET + 4].copy_from_slice(&shape.limit.to_ne_bytes());
    let option = |kind, value: &[u8]| TcOption::Other(DefaultNla::new(kind, value.to_vec()));
    vec![
        option(TCA_TBF_PARMS, &parms),
        option(TCA_TBF_BURST, &shape.burst.to_ne_bytes()),
        option(TCA_TBF_RATE64, &shape.rate.to_ne_bytes()),
    ]
}

/// Rate and limit of a dumped bucket. The library gives options that it does not know as one attribute, unparsed.
fn bucket(message: &TcMessage) -> Option<(u64, u32)> {
    let nested = message.attributes.iter().find_map(|attribute| match attribute {
        TcAttribute::Options(options) => options.iter().find_map(|option| match option {
            TcOption::Other(nla) => Some(value(nla)),
            _ => None,
        }),
        _ => None,
    })?;
    let (mut rate, mut wide, mut limit) = (None, None, None);
    for nla in NlasIterator::new(&nested).filter_map(Result::ok) {
        match nla.kind() {
            TCA_TBF_PARMS => {
                rate = number(nla.value(), RATE_OFFSET).map(u64::from);
                limit = number(nla.value(), LIMIT_OFFSET);
            }
            TCA_TBF_RATE64 => wide = nla.value().try_into().ok().map(u64::from_ne_bytes),
            _ => {}
        }
    }
    Some((wide.or(rate)?, limit?))
}

fn number(bytes: &[u8], offset: usize) -> Option<u32> {
    bytes.get(offset..offset + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

fn value(nla: &DefaultNla) -> Vec<u8> {
    let mut bytes = vec![0; nla.value_len()];
    nla.emit_value(&mut bytes);
    bytes
}
