//! One node of a mesh for tests and benches of the NSM SDK: issuer of identities, node (in this process or as one of its own), endpoint
//! and client, joined by their real sockets with mutual TLS.

use anyhow::{Context as _, Result, bail};
use clap::Parser as _;
use nsm_chain::{
    CloseCall, Connection, Element, Endpoint, Error, Mechanism, NetworkServiceRequest, Next, RequestCall, Side,
    elements::{
        ipam::PointToPoint,
        kernel_mechanism::{INODE_URL, KERNEL, LOCAL, NAME, random_name},
        mechanisms::Mechanisms,
        null::Null,
        sendfd::{SendFdClient, SendFdServer},
    },
    registry::{NetworkService, NetworkServiceEndpoint},
    remote::Grpc,
    token,
};
use nsm_identity::X509Source;
use nsm_kernel::{Netns, elements::NOOP};
use nsm_registry::RegistryClient;
use nsm_transport::{Address, Listener, Transport};
use std::{
    os::fd::AsRawFd,
    path::PathBuf,
    process::{Child, Command},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio_util::sync::{CancellationToken, DropGuard};

/// What one operation may take.
pub const TIMEOUT: Duration = Duration::from_secs(15);
/// How long the parts wait for each other at the start.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// The service of the endpoint.
pub const SERVICE: &str = "bench";
/// Namespaces that clients are spread over; the endpoint has one for all connections.
const CLIENTS: usize = 20;
/// First argument of a process that is to be a node; `meridio nsm`'s own arguments follow.
pub const NODE_ROLE: &str = "--as-node";

/// What carries the packets of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carrier {
    /// Nothing: no kernel work.
    Nothing,
    /// A veth pair with addresses and routes, between the client's and the endpoint's namespace.
    Veth,
}

/// Issuer, folder of the sockets, and the namespaces of client, endpoint and node. Everything ends with it.
pub struct World {
    folder: tempfile::TempDir,
    /// Where the clients' interfaces are, in turn.
    pub client_ns: Vec<Netns>,
    /// Where the endpoint's interfaces are.
    pub endpoint_ns: Netns,
    /// The node's own.
    pub node_ns: Netns,
    stop: CancellationToken,
    _guard: DropGuard,
}

#[derive(clap::Parser)]
struct Cli {
    #[command(flatten)]
    settings: meridio_nsm::Settings,
}

/// Settings of `meridio nsm` from its arguments alone.
fn settings(args: &[String]) -> Result<meridio_nsm::Settings> {
    Ok(Cli::try_parse_from(std::iter::once("nsm").chain(args.iter().map(String::as_str)))?.settings)
}

impl World {
    /// Starts the issuer.
    ///
    /// # Errors
    /// No namespace can be made (root is needed).
    pub async fn start() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let stop = CancellationToken::new();
        let issuer = meridio_identity::Settings {
            state_dir: folder.path().join("ca"),
            trust_domain: "example.org".into(),
            workloads: folder.path().join("workloads"),
            svid_ttl: Duration::from_secs(24 * 3600).into(),
            health_socket: String::new(),
        };
        std::fs::create_dir_all(&issuer.workloads)?;
        tokio::spawn(meridio_identity::run(issuer, stop.clone()));
        let netns = || Netns::anonymous().context("make a network namespace (as root)");
        Ok(Self {
            folder,
            client_ns: (0..CLIENTS).map(|_| netns()).collect::<Result<_>>()?,
            endpoint_ns: netns()?,
            node_ns: netns()?,
            _guard: stop.clone().drop_guard(),
            stop,
        })
    }

    /// A file of this world.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A socket of this world.
    pub fn url(&self, name: &str) -> String {
        format!("unix://{}", self.path(name).display())
    }

    /// The Workload API socket of one workload.
    ///
    /// # Errors
    /// Its folder cannot be made.
    pub fn workload(&self, name: &str) -> Result<String> {
        let folder = self.path("workloads").join(name);
        std::fs::create_dir_all(&folder)?;
        Ok(format!("unix://{}/agent.sock", folder.display()))
    }

    /// The identity of one workload.
    ///
    /// # Errors
    /// It is not issued in time.
    pub async fn source(&self, name: &str) -> Result<X509Source> {
        Ok(X509Source::connect(&self.workload(name)?, PATIENCE).await?)
    }

    fn node_args(&self, name: &str, manager: Option<&str>) -> Result<Vec<String>> {
        let mut args = vec![
            format!("--name={name}"),
            format!("--listen-on={}", self.url(name)),
            "--state-dir=".to_owned(),
            "--health-socket=".to_owned(),
            format!("--spiffe-endpoint-socket={}", self.workload(name)?),
        ];
        args.extend(manager.map(|url| format!("--connect-to={url}")));
        Ok(args)
    }

    /// Starts manager and forwarder in this process; they listen on `url(name)`.
    ///
    /// # Errors
    /// The settings are refused.
    pub fn node_here(&self, name: &str) -> Result<()> {
        let settings = settings(&self.node_args(name, None)?)?;
        let stop = self.stop.clone();
        tokio::spawn(async move {
            if let Err(cause) = meridio_nsm::run(settings, stop).await {
                eprintln!("the node has failed: {cause:#}");
            }
        });
        Ok(())
    }

    /// Starts this program again as a node, in a namespace of its own: manager and forwarder, or the forwarder of `manager`.
    ///
    /// # Errors
    /// The process cannot be started.
    pub fn node(&self, name: &str, manager: Option<&str>) -> Result<Process> {
        let program = std::env::current_exe()?;
        let mut command = self.command(&program);
        command.arg(NODE_ROLE).args(self.node_args(name, manager)?);
        Ok(Process(command.spawn().context("start a node")?))
    }

    /// A program in the node's namespace, without the environment of this one.
    pub fn command(&self, program: &std::path::Path) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net=/proc/{}/fd/{}", std::process::id(), self.node_ns.fd().as_raw_fd()))
            .arg(program)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command
    }

    /// Starts an endpoint and registers it at `manager`.
    ///
    /// # Errors
    /// No identity, or no registration in time.
    pub async fn endpoint(&self, name: &str, manager: &str) -> Result<Nse> {
        let source = self.source(name).await?;
        let place = Arc::new(Place { netns: self.endpoint_ns.clone(), requests: AtomicUsize::new(0) });
        let chain = Endpoint::builder(name, token::from_source(source.clone(), Duration::from_secs(3600)))
            .element(PointToPoint::new(["10.0.0.0/16".parse()?]))
            .shared(place.clone())
            .element(Mechanisms::new(Side::Server).with(KERNEL, Null).with(NOOP, Null))
            .element(SendFdServer)
            .build();
        let url = self.url(&format!("{name}.sock"));
        let listener = Listener::bind(&Address::parse(&url)?).await?;
        let (transport, routes, stop) = (Transport::new(source.clone())?, chain.service().routes(), self.stop.clone());
        tokio::spawn(async move { transport.serve(vec![listener], routes, stop).await });
        let registry = RegistryClient::builder(manager, source).patience(PATIENCE).build()?;
        registry.register_ns(NetworkService { name: SERVICE.into(), ..Default::default() }).await?;
        let registration = NetworkServiceEndpoint {
            name: name.into(),
            network_service_names: vec![SERVICE.into()],
            url,
            ..Default::default()
        };
        registry.register_nse(registration).await?;
        Ok(Nse { chain, place, registry })
    }

    /// A client of `manager`; its tokens live for `lifetime`.
    ///
    /// # Errors
    /// No identity.
    pub async fn client(&self, name: &str, manager: &str, lifetime: Duration) -> Result<nsm_chain::Client> {
        let transport = Transport::new(self.source(name).await?)?.with_max_token_lifetime(lifetime);
        Ok(nsm_chain::Client::builder(name, Arc::new(Grpc::new(transport).sharing()))
            .url(manager)
            .element(SendFdClient)
            .build())
    }

    /// The request for a new connection called `id`.
    pub fn request(&self, id: &str, carrier: Carrier) -> NetworkServiceRequest {
        let mut mechanism = Mechanism { cls: LOCAL.into(), r#type: NOOP.into(), ..Default::default() };
        if carrier == Carrier::Veth {
            mechanism.r#type = KERNEL.into();
            let turn = id.bytes().fold(0_usize, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
            let netns = &self.client_ns[turn % self.client_ns.len()];
            mechanism.parameters = place(netns, "nsc");
        }
        let connection = Connection { id: id.into(), network_service: SERVICE.into(), ..Default::default() };
        NetworkServiceRequest { connection: Some(connection), mechanism_preferences: vec![mechanism] }
    }

    /// Tries until everybody has found each other.
    ///
    /// # Errors
    /// With the last cause, when patience is over.
    pub async fn ready(&self, client: &nsm_chain::Client) -> Result<()> {
        let begin = std::time::Instant::now();
        loop {
            match client.request(self.request("ready", Carrier::Veth), TIMEOUT).await {
                Ok(connection) => return Ok(client.close(connection, TIMEOUT).await?),
                Err(cause) if begin.elapsed() > PATIENCE => bail!("no connection after {PATIENCE:?}: {cause}"),
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    }
}

/// Parameters of an interface with a new name in `netns`.
fn place(netns: &Netns, prefix: &str) -> std::collections::BTreeMap<String, String> {
    let url = format!("file:///proc/self/fd/{}", netns.fd().as_raw_fd());
    [(INODE_URL.to_owned(), url), (NAME.to_owned(), random_name(prefix))].into()
}

/// Runs this process as a node if it was started as one, until it is killed.
///
/// # Errors
/// The node's own.
pub async fn run_as_node() -> Result<bool> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.split_first() {
        Some((role, args)) if role == NODE_ROLE => {
            meridio_nsm::run(settings(args)?, CancellationToken::new()).await?;
            Ok(true)
        }
        _ => Ok(false),
    }
}

/// Puts the endpoint's interfaces into its namespace and counts requests.
struct Place {
    netns: Netns,
    requests: AtomicUsize,
}

#[async_trait::async_trait]
impl Element for Place {
    fn name(&self) -> &'static str {
        "place"
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        let preferences = &mut call.message.mechanism_preferences;
        for preference in preferences.iter_mut().filter(|preference| preference.r#type == KERNEL) {
            preference.parameters = place(&self.netns, "nse");
        }
        let established = call.message.connection.as_mut().and_then(|connection| connection.mechanism.as_mut());
        if let Some(mechanism) = established.filter(|mechanism| mechanism.r#type == KERNEL) {
            let url = format!("file:///proc/self/fd/{}", self.netns.fd().as_raw_fd());
            mechanism.parameters.insert(INODE_URL.into(), url);
        }
        next.request(call).await
    }

    async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
        next.close(call).await
    }
}

/// An endpoint that serves.
pub struct Nse {
    chain: Endpoint,
    place: Arc<Place>,
    /// Its registry client.
    pub registry: RegistryClient,
}

impl Nse {
    /// Requests that it has served, refreshes included.
    pub fn requests(&self) -> usize {
        self.place.requests.load(Ordering::Relaxed)
    }

    /// Connections that it has now.
    pub fn connections(&self) -> usize {
        self.chain.hub().connections().len()
    }
}

/// A process that is killed at the end.
pub struct Process(pub Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What the kernel says about a process.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// Resident memory, bytes.
    pub resident: u64,
    /// The part of it that is not backed by files, bytes.
    pub anonymous: u64,
    /// User and system time since its start.
    pub cpu: Duration,
    /// Open descriptors.
    pub descriptors: usize,
}

/// Reads the usage of a process.
///
/// # Errors
/// It is gone.
pub fn usage(pid: u32) -> Result<Usage> {
    let gone = || format!("process {pid} is gone");
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).with_context(gone)?;
    let kilobytes = |key: &str| -> u64 {
        let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_default();
        line.trim_matches(|c: char| !c.is_ascii_digit()).parse().unwrap_or(0)
    };
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).with_context(gone)?;
    // Fields 14 and 15, counted behind the name in brackets, in ticks of 10 ms (proc(5)).
    let ticks = stat.rsplit(')').next().unwrap_or_default().split_whitespace().skip(11).take(2);
    let ticks: u64 = ticks.filter_map(|field| field.parse::<u64>().ok()).sum();
    Ok(Usage {
        resident: kilobytes("VmRSS:") * 1024,
        anonymous: kilobytes("RssAnon:") * 1024,
        cpu: Duration::from_millis(ticks * 10),
        descriptors: std::fs::read_dir(format!("/proc/{pid}/fd")).with_context(gone)?.count(),
    })
}
