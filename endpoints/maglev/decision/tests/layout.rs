//! The layout of the maps, in words: who changes it has to change [`LAYOUT_VERSION`] too, or a new process reads what an old one has
//! written as something else.

use std::mem::{offset_of, size_of};

use meridio_decision::Reason;
use meridio_decision::layout::*;

/// Size of a struct and offset of each field. It does not compile if a field is not named.
macro_rules! shape {
    ($name:ident { $($field:ident),* $(,)? }) => {{
        fn complete($name { $($field: _),* }: $name) {}
        let _ = complete;
        let fields = [$(format!("{} {}", stringify!($field), offset_of!($name, $field))),*].join(", ");
        format!("{} {}: {fields}\n", stringify!($name), size_of::<$name>())
    }};
}

macro_rules! numbers {
    ($($name:ident),* $(,)?) => { [$(format!("{} {}", stringify!($name), $name)),*].join(", ") + "\n" };
}

fn described() -> String {
    let mut text = String::new();
    text += &shape!(Config { switches, flags, version, record, hold });
    text += &shape!(Vector { summary, first, words, pad });
    text += &shape!(ByteMatch { protocol, size, offset, mask, value });
    text += &shape!(ByteList { statements });
    text += &shape!(FlowEntry { slot, counter });
    text += &shape!(StreamEntry { active, ready, rows, chunk, target_base, max_targets, flags, swaps, written });
    text += &shape!(TargetEntry { v6, v4, ifindex4, ifindex6, mark, mtu, direct });
    text += &shape!(FragmentKey { src, dst, id, protocol });
    text += &shape!(FragmentValue { seen, slot, identifier, counter, pad });
    text += &shape!(NatKey { generation, class, protocol, direction, port });
    text += &shape!(PrefixKey { bits, space, address });
    text += &shape!(Counter { packets, bytes });
    text += &shape!(Masked { net, mask });
    text += &shape!(Ports { low, high });
    text += &shape!(Trace { until, protocols, only_dropped, sources, destinations, source_ports, destination_ports });
    text += &shape!(TraceEvent {
        time,
        src,
        dst,
        next_hop,
        flags,
        protocol,
        ports,
        bytes,
        segments,
        ttl,
        ifindex_in,
        ifindex_out,
        verdict,
        reason,
        generation,
        flow,
        counter,
        slot,
        row,
        identifier,
        nat_port,
        pad
    });
    text += &format!("PortMap {}, Chunk {}, ", size_of::<PortMap>(), size_of::<Chunk>());
    text += &format!("of each CPU: flows {FLOW_COUNTERS}, targets {MAX_TARGETS}\n");
    text += &numbers!(MAX_FLOWS, WORDS, MAX_BYTE_MATCHES, MAX_BYTE_LISTS, MAX_STREAMS, MAX_TARGETS, CHUNK_ROWS);
    text += &numbers!(PROTO_BASE, DST_BASE, SRC_BASE, DPORT_BASE, SPORT_BASE, BYTES_BASE, VECTORS);
    text += &numbers!(VIP_PREFIXES, SOURCE_PREFIXES, NAT_ENTRIES, MAX_REASONS, TRACE_LOST, TRACE_RING, UNUSED);
    text += &numbers!(PORT_CLASS, IPV4_SPACE, PREFIX_KEY_BITS, NOT_A_VIP);
    text += &format!("{:?} {:?}\n", PORT_TRANSLATED, Reason::ALL.map(|reason| reason as u32));
    text
}

/// What version 6 means.
const VERSION_6: &str = "\
Config 24: switches 0, flags 4, version 12, record 16, hold 20
Vector 320: summary 0, first 8, words 16, pad 272
ByteMatch 12: protocol 0, size 1, offset 2, mask 4, value 8
ByteList 48: statements 0
FlowEntry 8: slot 0, counter 4
StreamEntry 56: active 0, ready 4, rows 12, chunk 16, target_base 24, max_targets 28, flags 32, swaps 36, written 40
TargetEntry 40: v6 0, v4 16, ifindex4 20, ifindex6 24, mark 28, mtu 32, direct 36
FragmentKey 40: src 0, dst 16, id 32, protocol 36
FragmentValue 24: seen 0, slot 8, identifier 12, counter 16, pad 20
NatKey 16: generation 0, class 4, protocol 8, direction 10, port 12
PrefixKey 24: bits 0, space 4, address 8
Counter 16: packets 0, bytes 8
Masked 32: net 0, mask 16
Ports 4: low 0, high 2
Trace 304: until 0, protocols 8, only_dropped 12, sources 16, destinations 144, source_ports 272, destination_ports 288
TraceEvent 128: time 0, src 8, dst 24, next_hop 40, flags 56, protocol 60, ports 64, bytes 68, segments 72, ttl 76, ifindex_in 80, ifindex_out 84, verdict 88, reason 92, generation 96, flow 100, counter 104, slot 108, row 112, identifier 116, nat_port 120, pad 124
PortMap 131072, Chunk 131200, of each CPU: flows 4096, targets 32768
MAX_FLOWS 2048, WORDS 32, MAX_BYTE_MATCHES 4, MAX_BYTE_LISTS 32, MAX_STREAMS 256, MAX_TARGETS 32768, CHUNK_ROWS 65600
PROTO_BASE 0, DST_BASE 8, SRC_BASE 2056, DPORT_BASE 6152, SPORT_BASE 10248, BYTES_BASE 14344, VECTORS 14376
VIP_PREFIXES 2048, SOURCE_PREFIXES 65536, NAT_ENTRIES 4096, MAX_REASONS 32, TRACE_LOST 31, TRACE_RING 524288, UNUSED 255
PORT_CLASS 4095, IPV4_SPACE 2, PREFIX_KEY_BITS 32, NOT_A_VIP 4294967295
[32768, 16384] [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 16, 17, 18, 19, 20, 21]
";

#[test]
fn a_changed_layout_has_a_new_version() {
    assert_eq!(LAYOUT_VERSION, 6, "write down here what the new version means");
    let now = described();
    for (now, then) in now.lines().zip(VERSION_6.lines()) {
        assert_eq!(now, then, "another layout has to have another LAYOUT_VERSION");
    }
    assert_eq!(now.lines().count(), VERSION_6.lines().count(), "it is now:\n{now}");
}
