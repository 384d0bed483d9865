//! The BIRD configuration as a pure function of what is wanted.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use ipnet::IpNet;

use crate::gateway::{Attraction, Bfd, Bgp, Family, Gateway, Protocol};

/// Name of the BFD protocol. No gateway can be called so: resource names are lower case.
pub const BFD_PROTOCOL: &str = "NBR-BFD";

/// What does not change while the component runs.
#[derive(Clone, Debug)]
pub struct Base {
    /// Interface on the external network.
    pub interface: String,
    /// BIRD's router id; fixed, so that a pod without an IPv4 address has one too.
    pub router_id: Ipv4Addr,
    /// Kernel table of learnt routes.
    pub table: u32,
    /// Seconds between scans of the kernel's table.
    pub kernel_scan: u32,
    /// Several gateways become one multipath route.
    pub ecmp: bool,
    /// Log file and its size in bytes; rotated once.
    pub log_file: Option<(PathBuf, u64)>,
    /// Everything goes to stderr, not only errors.
    pub log_all: bool,
    /// Hold time in seconds where the gateway names none.
    pub hold_time: u32,
    /// Our autonomous system where the gateway names none.
    pub local_as: u32,
    /// The gateway's autonomous system where it names none.
    pub remote_as: u32,
    /// Our BGP port where the gateway names none.
    pub local_port: u16,
    /// The gateway's BGP port where it names none.
    pub remote_port: u16,
    /// Next hops of static default routes that replace everything learnt from gateways.
    pub vrrps: Vec<IpAddr>,
}

/// Password of a gateway's session, as far as it is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Password {
    /// The gateway wants none.
    None,
    /// Known.
    Known(String),
    /// Wanted, but not there (yet): the gateway stays out of the file.
    Missing,
}

/// What changes: the attractor, its secrets, and which VIPs may be announced.
#[derive(Clone, Debug)]
pub struct Inputs<'a> {
    /// VIPs and gateways.
    pub attraction: &'a Attraction,
    /// One per gateway, in the same order.
    pub passwords: &'a [Password],
    /// Families whose VIPs are announced.
    pub advertise: &'a BTreeSet<Family>,
}

/// Text of `bird.conf`. The same input gives the same bytes.
pub fn render(base: &Base, inputs: &Inputs<'_>) -> String {
    let mut out = String::from("# Written by meridio frontend; changes are overwritten.\n");
    head(&mut out, base);
    filters(&mut out);
    for family in Family::BOTH {
        template(&mut out, base, family);
    }
    for family in inputs.advertise {
        vips(&mut out, *family, &inputs.attraction.vips);
    }
    for next_hop in &base.vrrps {
        let channel = Family::of(*next_hop);
        let default = default_route(channel);
        let _ = writeln!(
            out,
            "protocol static {{\n\t{channel} {{ import filter default_rt; }};\n\troute {default} via {next_hop}%'{}' onlink;\n}}\n",
            base.interface
        );
    }
    for family in Family::BOTH {
        let wanted = inputs.attraction.vips.iter().any(|vip| Family::of_net(vip) == family);
        kernel(&mut out, base, family, wanted);
    }
    let mut static_bfd = Bfd::default();
    for (gateway, password) in inputs.attraction.gateways.iter().zip(inputs.passwords) {
        match (&gateway.protocol, password) {
            (Protocol::Bgp(_), Password::Missing) => {
                let _ = writeln!(out, "# gateway {} waits for its password\n", gateway.name);
            }
            (Protocol::Bgp(bgp), password) => self::bgp(&mut out, base, gateway, bgp, password),
            (Protocol::Static, _) => {
                static_gateway(&mut out, base, gateway);
                static_bfd = gateway.bfd.unwrap_or(static_bfd);
            }
        }
    }
    // BIRD has one set of timers per interface for sessions that static routes ask for.
    let _ = writeln!(
        out,
        "protocol bfd '{BFD_PROTOCOL}' {{\n\taccept direct;\n\tinterface \"{}\" {{{}\n\t}};\n}}",
        base.interface,
        bfd_options(static_bfd, "\n\t\t")
    );
    out
}

/// The text with everything in it that an attractor may bring sooner or later: VIPs of both families, and gateways whose
/// password is still missing. If BIRD takes this it takes what is rendered of the attractor at any time.
pub fn render_whole(base: &Base, attraction: &Attraction) -> String {
    let stand_in = |gateway: &Gateway| gateway.auth().map_or(Password::None, |_| Password::Known("-".to_owned()));
    let passwords: Vec<_> = attraction.gateways.iter().map(stand_in).collect();
    render(base, &Inputs { attraction, passwords: &passwords, advertise: &Family::BOTH.into() })
}

/// The same text with passwords masked, for logs.
pub fn masked(text: &str) -> String {
    let mask = |line: &str| match line.split_once("password \"") {
        Some((before, _)) => format!("{before}password \"********\";"),
        None => line.to_owned(),
    };
    text.lines().map(mask).collect::<Vec<_>>().join("\n")
}

/// A router id from the host name, for pods without an IPv4 address: stable over restarts, different between pods
/// (FNV-1a, 32 bits; never 0.0.0.0).
pub fn router_id_of(hostname: &str) -> Ipv4Addr {
    let hash = hostname.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    Ipv4Addr::from(hash.max(1))
}

/// Name of the protocol that has the VIPs of a family while they are announced.
pub fn vip_protocol(family: Family) -> String {
    format!("VIP{}", suffix(family))
}

fn default_route(family: Family) -> &'static str {
    match family {
        Family::V4 => "0.0.0.0/0",
        Family::V6 => "0::/0",
    }
}

fn suffix(family: Family) -> char {
    match family {
        Family::V4 => '4',
        Family::V6 => '6',
    }
}

fn head(out: &mut String, base: &Base) {
    if let Some((path, size)) = &base.log_file {
        let path = path.display();
        let _ = writeln!(out, "log \"{path}\" {size} \"{path}.backup\" all;");
    }
    let classes = if base.log_all { "all" } else { "{ error, fatal, bug, warning }" };
    let _ = write!(
        out,
        "log stderr {classes};\n\nrouter id {};\n\nprotocol device {{\n\tscan time 2;\n}}\n\n",
        base.router_id
    );
}

fn filters(out: &mut String) {
    out.push_str(
        "# What a static gateway gives: defaults.
filter default_rt {
	if net = 0.0.0.0/0 then accept;
	if net = ::/0 then accept;
	reject;
}

# What may leave towards the kernel: defaults, and what gateways told.
filter cluster_breakout {
	if net = 0.0.0.0/0 then accept;
	if net = ::/0 then accept;
	if source = RTS_BGP then accept;
	reject;
}

# What gateways are told: VIPs, nothing else.
filter cluster_access {
	if net = 0.0.0.0/0 then reject;
	if net = ::/0 then reject;
	if source = RTS_STATIC && dest != RTD_BLACKHOLE then accept;
	reject;
}

",
    );
}

/// Only the family of the session is offered; real routers refuse a capability they did not ask for.
/// BIRD's own waiting times would leave a session away for over 30 s after a flap.
fn template(out: &mut String, base: &Base, family: Family) {
    let _ = writeln!(
        out,
        "template bgp LINK{} {{
	debug {{ events, states, interfaces }};
	direct;
	hold time {};
	connect delay time 1;
	connect retry time 2;
	error wait time 1, 2;
	error forget time 10;
	bfd off;
	graceful restart off;
	setkey off;
	{family} {{
		import none;
		export none;
		next hop self;
	}};
}}
",
        suffix(family),
        base.hold_time
    );
}

fn vips(out: &mut String, family: Family, vips: &[IpNet]) {
    let mut own = vips.iter().filter(|vip| Family::of_net(vip) == family).peekable();
    if own.peek().is_none() {
        return;
    }
    let _ = writeln!(out, "protocol static {} {{\n\t{family} {{ preference 110; }};", vip_protocol(family));
    for vip in own {
        let _ = writeln!(out, "\troute {vip} via \"lo\";");
    }
    out.push_str("}\n\n");
}

fn kernel(out: &mut String, base: &Base, family: Family, wanted: bool) {
    let export = if wanted { "filter cluster_breakout" } else { "none" };
    let merge = if base.ecmp { "\n\tmerge paths on;" } else { "" };
    let _ = writeln!(
        out,
        "protocol kernel KERNEL{} {{
	{family} {{
		import none;
		export {export};
	}};
	scan time {};
	kernel table {};{merge}
}}
",
        suffix(family),
        base.kernel_scan,
        base.table
    );
}

fn bfd_options(bfd: Bfd, separator: &str) -> String {
    let mut out = String::new();
    for (name, value, unit) in [
        ("min rx interval", bfd.min_rx, " ms"),
        ("min tx interval", bfd.min_tx, " ms"),
        ("multiplier", bfd.multiplier, ""),
    ] {
        if value != 0 {
            let _ = write!(out, "{separator}{name} {value}{unit};");
        }
    }
    out
}

fn or<T: Default + PartialEq>(value: T, fallback: T) -> T {
    if value == T::default() { fallback } else { value }
}

fn bgp(out: &mut String, base: &Base, gateway: &Gateway, bgp: &Bgp, password: &Password) {
    let family = gateway.family();
    let import = if base.vrrps.is_empty() { "filter cluster_breakout" } else { "none" };
    let _ = writeln!(
        out,
        "protocol bgp '{}' from LINK{} {{
	interface \"{}\";
	neighbor {} port {} as {};
	local port {} as {};",
        gateway.protocol_name(),
        suffix(family),
        base.interface,
        gateway.address,
        or(bgp.remote_port, base.remote_port),
        or(bgp.remote_asn, base.remote_as),
        or(bgp.local_port, base.local_port),
        or(bgp.local_asn, base.local_as),
    );
    if bgp.hold_time != 0 {
        let _ = writeln!(out, "\thold time {};", bgp.hold_time);
    }
    if let Some(bfd) = gateway.bfd {
        let options = bfd_options(bfd, "\n\t\t");
        let _ = if options.is_empty() { writeln!(out, "\tbfd on;") } else { writeln!(out, "\tbfd {{{options}\n\t}};") };
    }
    if let Password::Known(password) = password {
        let _ = writeln!(out, "\tpassword \"{password}\";");
    }
    let _ = writeln!(out, "\t{family} {{\n\t\timport {import};\n\t\texport filter cluster_access;\n\t}};\n}}\n");
}

fn static_gateway(out: &mut String, base: &Base, gateway: &Gateway) {
    let family = gateway.family();
    let import = if base.vrrps.is_empty() { "filter default_rt" } else { "none" };
    let bfd = if gateway.bfd.is_some() { " bfd" } else { "" };
    let _ = writeln!(
        out,
        "protocol static '{}' {{\n\t{family} {{ import {import}; }};\n\troute {} via {}%'{}'{bfd};\n}}\n",
        gateway.protocol_name(),
        default_route(family),
        gateway.address,
        base.interface,
    );
}

#[cfg(test)]
mod tests;
