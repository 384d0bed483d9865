//! Paths through one load balancer: policy routes in the gateway, chosen by a mark, send a packet to the VIP by way of that one.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::Result;

use super::udp;
use crate::namespace::Namespace;
use crate::topology::{GATEWAY_INTERFACE, Trench, lb_address};

/// First of the marks and tables in the gateway.
const BASE: u32 = 100;

/// Mark that sends packets through load balancer `number` (1 or 2).
pub fn mark(number: u8) -> u32 {
    BASE + u32::from(number)
}

/// Sets the gateway's rules and tables up.
///
/// # Errors
/// If the kernel refuses a rule or a route.
pub fn install(gateway: &Namespace, trench: &Trench) -> Result<()> {
    let mut lines = String::new();
    for number in [1, 2] {
        let (v4, v6) = lb_address(number);
        let mark = mark(number);
        lines += &format!("rule add fwmark {mark} lookup {mark} priority {mark}\n");
        lines += &format!("route add {} via {v4} dev {GATEWAY_INTERFACE} table {mark}\n", trench.vip4);
        lines += &format!("-6 rule add fwmark {mark} lookup {mark} priority {mark}\n");
        lines += &format!("-6 route add {} via {v6} dev {GATEWAY_INTERFACE} table {mark}\n", trench.vip6);
    }
    for line in lines.lines() {
        // `ip -batch` takes no family per line.
        let args: Vec<&str> = line.split_whitespace().collect();
        gateway.output("ip", &args)?;
    }
    Ok(())
}

/// Outcome of sending the same 5-tuples through both load balancers.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Agreement {
    /// 5-tuples tried.
    pub tried: u64,
    /// Those that both sent to the same target.
    pub same: u64,
    /// Targets seen.
    pub targets: BTreeSet<String>,
    /// The first few that differed or were lost.
    pub differences: Vec<String>,
}

/// Sends `count` 5-tuples, each through load balancer 1 and then 2, and compares who answers.
pub async fn agreement(vip: IpAddr, count: u16) -> Agreement {
    let mut result = Agreement::default();
    for number in 0..count {
        result.tried += 1;
        match both(vip, number).await {
            Ok((one, two, port)) => {
                if one == two {
                    result.same += 1;
                } else if result.differences.len() < 5 {
                    result.differences.push(format!("source port {port}: {one} by lb-1, {two} by lb-2"));
                }
                result.targets.extend([one, two]);
            }
            Err(error) if result.differences.len() < 5 => result.differences.push(format!("{error:#}")),
            Err(_) => {}
        }
    }
    result
}

async fn both(vip: IpAddr, number: u16) -> Result<(String, String, u16)> {
    let first = udp::socket(vip, 0, mark(1))?;
    let port = first.local_addr()?.port();
    let patience = Duration::from_secs(1);
    let (one, _) = udp::exchange(&first, format!("path1.{number}").as_bytes(), patience).await?;
    drop(first);
    let second = udp::socket(vip, port, mark(2))?;
    let (two, _) = udp::exchange(&second, format!("path2.{number}").as_bytes(), patience).await?;
    Ok((one, two, port))
}

/// Hosts that answer `count` 5-tuples through load balancer `number`, and how many packets were lost.
pub async fn survey(vip: IpAddr, number: u8, count: u16) -> (BTreeSet<String>, u16) {
    let mut tasks = tokio::task::JoinSet::new();
    for packet in 0..count {
        tasks.spawn(async move {
            let socket = udp::socket(vip, 0, mark(number))?;
            udp::exchange(&socket, format!("survey.{packet}").as_bytes(), Duration::from_millis(500)).await
        });
    }
    let (mut hosts, mut lost) = (BTreeSet::new(), 0);
    while let Some(done) = tasks.join_next().await {
        match done {
            Ok(Ok((host, _))) => drop(hosts.insert(host)),
            _ => lost += 1,
        }
    }
    (hosts, lost)
}
