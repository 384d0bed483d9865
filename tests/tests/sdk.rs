//! The examples of nsm-sdk as a user runs them: one process each, in network namespaces, next to `meridio nsm` and `meridio identity`.

#![allow(clippy::unwrap_used)] // Tests state what they expect by unwrapping it.

use meridio_tests::scene;
use nsm_kernel::{Netns, ping};
use std::{
    fs::File,
    net::IpAddr,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus},
    time::{Duration, Instant},
};

const LIMIT: Duration = Duration::from_secs(30);

/// A process that is killed when the test is over.
struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    fn terminate(&mut self) -> ExitStatus {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        let begin = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(begin.elapsed() < LIMIT, "it does not end:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until it has printed `text`.
    fn says(&mut self, text: &str) {
        let begin = Instant::now();
        while !self.log().contains(text) {
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none() && begin.elapsed() < LIMIT, "{text:?} is missing ({ended:?}):\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct World(tempfile::TempDir);

impl World {
    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn url(&self, name: &str) -> String {
        format!("unix://{}", self.path(name).display())
    }

    /// Starts a program with this environment and nothing else, in `netns`, under the identity `name`.
    fn start(&self, name: &str, netns: &Netns, program: &Path, args: &[&str], env: &[(&str, &str)]) -> Process {
        let log = self.path(&format!("{name}.log"));
        let file = File::create(&log).unwrap();
        let child = Command::new("nsenter")
            .arg(format!("--net=/proc/{}/fd/{}", std::process::id(), netns.fd().as_raw_fd()))
            .arg(program)
            .args(args)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("SPIFFE_ENDPOINT_SOCKET", self.url(&format!("workloads/{name}/agent.sock")))
            .env("HEALTH_SOCKET", "")
            .env("TMPDIR", self.0.path())
            .envs(env.iter().copied())
            .stdout(file.try_clone().unwrap())
            .stderr(file)
            .spawn()
            .unwrap();
        Process { child, log }
    }
}

async fn answers(netns: &Netns, ip: IpAddr) -> bool {
    for _ in 0..5 {
        if ping::probe(netns, None, ip, Duration::from_secs(1)).await {
            return true;
        }
    }
    false
}

async fn interfaces(netns: &Netns) -> usize {
    netns.netlink().await.unwrap().links().await.unwrap().iter().filter(|link| link.name != "lo").count()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_and_a_client_meet_ping_part_and_fail_in_one_sentence() {
    let world = World(tempfile::tempdir().unwrap());
    for name in ["node", "nse", "nsc", "other"] {
        std::fs::create_dir_all(world.path("workloads").join(name)).unwrap();
    }
    let (node_ns, nse_ns, nsc_ns) =
        (Netns::anonymous().unwrap(), Netns::anonymous().unwrap(), Netns::anonymous().unwrap());
    let meridio = scene::binary().unwrap();
    let (endpoint, client) = (scene::example("endpoint").unwrap(), scene::example("client").unwrap());
    let manager = world.url("nsm.io.sock");
    let (workloads, state) = (world.path("workloads"), world.path("ca"));
    let identity =
        [("IDENTITY_WORKLOADS", workloads.to_str().unwrap()), ("IDENTITY_STATE_DIR", state.to_str().unwrap())];
    let _identity = world.start("identity", &node_ns, &meridio, &["identity"], &identity);
    let node = [("NSM_LISTEN_ON", manager.as_str()), ("NSM_STATE_DIR", "")];
    let mut running = world.start("node", &node_ns, &meridio, &["nsm"], &node);
    // Without it the endpoint would rightly warn that there is no manager.
    running.says("manager and forwarder started");

    let settings = [
        ("NSM_NAME", "nse-1"),
        ("NSM_CONNECT_TO", manager.as_str()),
        ("NSM_SERVICE_NAMES", "icmp-responder"),
        // Room for one client.
        ("NSM_CIDR_PREFIX", "[172.16.1.0/31],[fd00::/127]"),
    ];
    let mut nse = world.start("nse", &nse_ns, &endpoint, &[], &settings);
    let service = [
        ("NSM_NAME", "nsc-1"),
        ("NSM_CONNECT_TO", manager.as_str()),
        ("NSM_NETWORK_SERVICES", "kernel://icmp-responder/nsm-1"),
    ];
    let mut nsc = world.start("nsc", &nsc_ns, &client, &[], &service);
    nse.says("serving as nse-1");
    nsc.says("connected: nsc-1-0 from [\"172.16.1.1/32\", \"fd00::1/128\"] to [\"172.16.1.0/32\", \"fd00::/128\"]");
    nse.says(" is served");
    for (netns, ip) in [(&nsc_ns, "172.16.1.0"), (&nsc_ns, "fd00::"), (&nse_ns, "172.16.1.1"), (&nse_ns, "fd00::1")] {
        assert!(answers(netns, ip.parse().unwrap()).await, "{ip} does not answer");
    }

    // The second client finds no address: what it says names connection, element, process and cause once.
    let other = Netns::anonymous().unwrap();
    let second = [&service[1..], &[("NSM_NAME", "nsc-2")]].concat();
    let mut refused = world.start("other", &other, &client, &[], &second);
    refused.says("trying again");
    let line = refused.log().lines().find(|line| line.contains("trying again")).unwrap().to_owned();
    assert!(line.contains("nse-1/point2pointipam (connection "), "{line}");
    for word in ["nsc-2-0", "point2pointipam", "(connection ", "no address is free"] {
        assert_eq!(line.matches(word).count(), 1, "{word:?} once in {line}");
    }
    drop(refused);

    assert!(nsc.terminate().success(), "{}", nsc.log());
    nse.says(" leaves");
    assert_eq!((interfaces(&nsc_ns).await, interfaces(&nse_ns).await), (0, 0));
    assert!(nse.terminate().success(), "{}", nse.log());
    let log = nse.log();
    assert!(!log.contains("WARN") && !log.contains("ERROR"), "{log}");
}
