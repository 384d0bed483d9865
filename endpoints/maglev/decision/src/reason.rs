//! The reasons in words for users: what each means, and what to do about it.

use crate::Reason;

impl Reason {
    /// Whether the packet is dropped.
    pub const fn drops(self) -> bool {
        !matches!(
            self,
            Reason::None
                | Reason::SlowMtu
                | Reason::SlowTtl
                | Reason::SlowOptions
                | Reason::Redirected
                | Reason::SourceSet
                | Reason::FragmentHeld
        )
    }

    /// The reason with this number.
    pub fn from_number(number: u32) -> Option<Reason> {
        Reason::ALL.into_iter().find(|reason| *reason as u32 == number)
    }

    /// What it means.
    pub const fn meaning(self) -> &'static str {
        match self {
            Reason::None => "nothing happened to the packet",
            Reason::NoFlow => "the destination is a VIP, but no flow matches the packet",
            Reason::NoTarget => {
                "a flow matches, but its stream is not there or has no ready target, or the one that got the first \
                 fragment is gone"
            }
            Reason::Malformed => "the headers contradict each other or the length of the packet",
            Reason::Truncated => "the packet ends within a header",
            Reason::Extensions => "more than 8 IPv6 extension headers",
            Reason::FragmentUnknown => {
                "a later fragment whose first one was not seen in the 2 s before and up to 200 ms after it"
            }
            Reason::FragmentedError => "an ICMP error that is a fragment, or quotes one without ports",
            Reason::QuoteMismatch => "an ICMP error about a packet that did not come from the VIP",
            Reason::NoAddress => "the target has no address of the packet's IP version",
            Reason::Internal => "the tables contradict each other: a bug",
            Reason::Helper => "the kernel refused to change the packet, or a reply on its way out",
            Reason::Untranslatable => "a fragmented SCTP packet, or reply, whose port is to be translated",
            Reason::SlowMtu => "larger than the MTU towards the target: the kernel's own stack fragments it or answers",
            Reason::SlowTtl => "TTL or hop limit ends here: the kernel's own stack answers",
            Reason::SlowOptions => "IPv4 options: the kernel's own stack forwards it",
            Reason::Redirected => "forwarded to the target's link",
            Reason::SourceSet => "an ICMP error of this machine left with the VIP as source",
            Reason::FragmentHeld => {
                "a fragment that came before its first one: held for up to 200 ms, then decided again"
            }
        }
    }

    /// What to do about it.
    pub const fn advice(self) -> &'static str {
        match self {
            Reason::NoFlow => {
                "`meridio why` says which flow fails by what; add a flow, or correct its VIPs, ports, protocols or \
                 source subnets"
            }
            Reason::NoTarget => {
                "open the stream in a target, and look at the load balancer's health report for targets that it \
                 cannot reach"
            }
            Reason::Malformed | Reason::Truncated => {
                "look at the sender, and at what changes packets on the way; scans look like this as well"
            }
            Reason::Extensions => "look at the sender; no honest one sends this many",
            Reason::FragmentUnknown => {
                "all fragments of a packet have to reach one load balancer: make the gateway hash on addresses only, \
                 or lower the sender's packet size"
            }
            Reason::FragmentedError => "nothing, if rare; else look for a router with a tiny MTU",
            Reason::QuoteMismatch => "nothing, if rare; else somebody makes up ICMP errors",
            Reason::NoAddress => {
                "give the target's conduit both IP versions (IPAM_IP_FAMILY), or take the VIP out of the flow"
            }
            Reason::Internal => "restart the load balancer, and report it with its log",
            Reason::Helper => "look into the kernel's log for memory that ran out",
            Reason::Untranslatable => {
                "let the association find the path's MTU: SCTP fragments by itself, and its checksum spans what IP \
                 fragments do not hold together"
            }
            Reason::FragmentHeld => "nothing, if rare; else look for what reorders packets on the way",
            Reason::SlowMtu => {
                "nothing, if rare; for throughput give the conduit the MTU of the external network, or the clients \
                 a smaller one"
            }
            Reason::SlowTtl => "nothing if it is a traceroute, else look for a loop",
            Reason::SlowOptions | Reason::None | Reason::Redirected | Reason::SourceSet => "nothing",
        }
    }
}
