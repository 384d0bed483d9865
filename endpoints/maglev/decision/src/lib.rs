//! The packet decision: parse, classify, hash, row, target. One source, compiled twice: into the eBPF program that
//! forwards, and for the host, where tests, `plan` and `why` ask it the same question.
//!
//! The eBPF verifier is the reader to please: no panics, no slice indexing by variables, bounded loops, everything inlined.
#![no_std]
#![warn(missing_docs)]

pub mod classify;
pub mod crc32c;
pub mod decide;
pub mod hash;
pub mod layout;
pub mod packet;
mod reason;
pub mod trace;
mod trace_layout;

pub use classify::Matched;
pub use decide::{Decision, NONE, Scratch, Tables, Verdict, decide, matched, target_index};
pub use packet::{ETH_IPV4, ETH_IPV6, Packet};

/// Why a packet to a VIP did not take the fast path. The first group drops it, the second hands it to the stack.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Nothing happened to it.
    None = 0,
    /// No flow matches.
    NoFlow = 1,
    /// The flow's stream has no ready target.
    NoTarget = 2,
    /// The headers contradict each other or the length of the packet.
    Malformed = 3,
    /// A header is cut off.
    Truncated = 4,
    /// More extension headers than are walked.
    Extensions = 5,
    /// A later fragment whose first fragment has not been seen.
    FragmentUnknown = 6,
    /// An ICMP error that is a fragment, or that quotes a later fragment.
    FragmentedError = 7,
    /// An ICMP error that quotes a packet which the VIP cannot have sent.
    QuoteMismatch = 8,
    /// The target has no address of the packet's family.
    NoAddress = 9,
    /// The tables contradict each other: a bug.
    Internal = 10,
    /// The kernel refused to change or redirect the packet.
    Helper = 11,
    /// A fragmented SCTP packet whose port is to be translated: its checksum covers fragments that are not here.
    Untranslatable = 12,
    /// Slow path: larger than the MTU towards the target.
    SlowMtu = 16,
    /// Slow path: TTL or hop limit ends here.
    SlowTtl = 17,
    /// Slow path: IPv4 options.
    SlowOptions = 18,
    /// Forwarded on the fast path.
    Redirected = 19,
    /// Sent on behalf of a VIP: source of a locally made ICMP error set to the VIP.
    SourceSet = 20,
    /// A later fragment that came before its first one: held by user space for a moment, then decided again.
    FragmentHeld = 21,
}

impl Reason {
    /// All reasons, for listings.
    pub const ALL: [Reason; 19] = [
        Reason::None,
        Reason::NoFlow,
        Reason::NoTarget,
        Reason::Malformed,
        Reason::Truncated,
        Reason::Extensions,
        Reason::FragmentUnknown,
        Reason::FragmentedError,
        Reason::QuoteMismatch,
        Reason::NoAddress,
        Reason::Internal,
        Reason::Helper,
        Reason::Untranslatable,
        Reason::SlowMtu,
        Reason::SlowTtl,
        Reason::SlowOptions,
        Reason::Redirected,
        Reason::SourceSet,
        Reason::FragmentHeld,
    ];

    /// Name in metrics and messages.
    pub const fn name(self) -> &'static str {
        match self {
            Reason::None => "none",
            Reason::NoFlow => "no-flow",
            Reason::NoTarget => "no-target",
            Reason::Malformed => "malformed",
            Reason::Truncated => "truncated",
            Reason::Extensions => "too-many-extension-headers",
            Reason::FragmentUnknown => "fragment-before-first",
            Reason::FragmentedError => "fragmented-icmp-error",
            Reason::QuoteMismatch => "icmp-quote-mismatch",
            Reason::NoAddress => "target-without-address",
            Reason::Internal => "internal",
            Reason::Helper => "kernel-refused",
            Reason::Untranslatable => "sctp-fragment-to-translate",
            Reason::SlowMtu => "slow-mtu",
            Reason::SlowTtl => "slow-ttl",
            Reason::SlowOptions => "slow-ip-options",
            Reason::Redirected => "redirected",
            Reason::SourceSet => "icmp-source-set",
            Reason::FragmentHeld => "fragment-held",
        }
    }
}
