//! What is asked and what is answered, free of the wire: the pure part of serving.

use hickory_proto::rr::RecordType;

use crate::name::Name;
use crate::zone::{Data, TTL_SECONDS};

/// Longest chain of aliases followed inside our zones; a longer one, or a circle, is SERVFAIL.
pub(crate) const MAX_ALIASES: usize = 8;

/// Class IN is understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Whole, in lower case.
    pub name: Name,
    /// ANY included.
    pub record_type: RecordType,
}

/// What the name store says to a [`Question`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// In a zone of ours.
    Local(Local),
    /// In no zone of ours: for the forwarder.
    Elsewhere,
    /// In a zone of ours, whose content is not known yet: SERVFAIL, because a "no such name" would be remembered.
    NotReady,
    /// The aliases go round in a circle or are too many: SERVFAIL.
    AliasLoop,
}

/// Content of an authoritative answer. No records and no `name_error`: NODATA.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Local {
    /// The last name of the chain does not exist (NXDOMAIN); else NOERROR.
    pub name_error: bool,
    /// Aliases first, in order of the chain; then the records asked for.
    pub records: Vec<(Name, Data)>,
    /// Addresses of SRV targets; may be left out.
    pub additionals: Vec<(Name, Data)>,
    /// The SOA record, in the answer section when it was asked for, in the authority section of a negative answer.
    pub soa: Option<(SoaPlace, Soa)>,
    /// Where the chain of aliases leaves our zones: the forwarder is asked for the same type.
    pub onward: Option<Name>,
}

/// Section of the SOA record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SoaPlace {
    /// It was asked for.
    Answer,
    /// The answer is negative.
    Authority,
}

/// The parts of a SOA record that differ between our zones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Soa {
    /// Owner of the record.
    pub apex: Name,
    /// `ns.dns.<zone>`.
    pub server: Name,
    /// `hostmaster.<zone>`.
    pub mailbox: Name,
}

impl Soa {
    /// There are no zone transfers, so nobody compares serials.
    pub const SERIAL: u32 = 1;
    /// For secondary servers, of which there are none; so are RETRY and EXPIRE.
    pub const REFRESH_SECONDS: i32 = 7200;
    /// See [`Soa::REFRESH_SECONDS`].
    pub const RETRY_SECONDS: i32 = 1800;
    /// See [`Soa::REFRESH_SECONDS`].
    pub const EXPIRE_SECONDS: i32 = 86_400;
    /// Time to live of a negative answer (RFC 2308 section 5).
    pub const MINIMUM_SECONDS: u32 = TTL_SECONDS;
}
