//! SPIRE, a registry, and a node's manager and forwarder, each a process of its own in namespaces of their own.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use meridio_demo::cleanup::{self, Lock};
use meridio_demo::namespace::Namespace;
use meridio_demo::process::{Process, ProcessPlan};
use nsm_identity::X509Source;
use nsm_transport::Transport;

use crate::scene;

/// Life of all tokens.
pub const TOKEN_LIFETIME: Duration = Duration::from_secs(60);
/// Life of SVIDs, in seconds: they rotate while a scenario runs.
const SVID_LIFETIME: u32 = 60;
const ID: &str = "peers";
const PATIENCE: Duration = Duration::from_secs(30);
const AGENT_ID: &str = "spiffe://example.org/agent";
const SERVER_KEY: &str = "spire-server";

/// Version of NSM's Go SDK that a peer is built of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GoSdk {
    /// v1.14.2, of the minor version that Meridio 1.2 pins.
    Pinned,
    /// v1.15.0.
    Current,
}

impl GoSdk {
    /// Name of its program.
    pub const fn program(self) -> &'static str {
        match self {
            GoSdk::Pinned => "nsm-1.14",
            GoSdk::Current => "nsm-1.15",
        }
    }
}

/// Whose registry and manager stand between clients and endpoints. The kernel forwarder is always ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Infra {
    /// `meridio nsm`, once as registry and once as manager and forwarder in one process.
    Ours,
    /// NSM's registry and manager, and `meridio nsm` as forwarder.
    Go(GoSdk),
}

/// What can be killed and started again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Component {
    /// Hands out identities on the node.
    SpireAgent,
    /// Signs identities.
    SpireServer,
    /// Registry, a process apart from the manager's.
    Registry,
    /// Manager of the node; with [`Infra::Ours`] it is the forwarder too.
    Manager,
    /// Forwarder of the node, where it is a process apart.
    Forwarder,
}

/// Everything between a client and an endpoint.
#[derive(Debug)]
pub struct Mesh {
    programs: PathBuf,
    infra: Namespace,
    server: Arc<Process>,
    agent: Arc<Process>,
    registry: Arc<Process>,
    manager: Arc<Process>,
    forwarder: Option<Arc<Process>>,
    directory: tempfile::TempDir,
    _lock: Lock,
}

impl Mesh {
    /// Starts all of it, with peers out of `programs`; the Go processes `client` and `endpoint` that are started later get identities too, and
    /// are of `workloads`' version.
    ///
    /// # Errors
    /// If a part does not come up in time; its log is named.
    pub async fn start(programs: &Path, infra: Infra, workloads: GoSdk) -> Result<Self> {
        let lock = Lock::take(ID)?;
        let left = cleanup::sweep(ID)?;
        if !left.is_empty() {
            println!("removed what an earlier run left: {}", left.join(", "));
        }
        let directory = tempfile::Builder::new().prefix("peers-").tempdir().context("make a directory")?;
        let namespace = Namespace::create(&format!("{}infra", cleanup::prefix(ID)), None)?;
        namespace.ip("link set lo up")?;
        let start = Start { programs, directory: directory.path(), namespace: &namespace };

        let server = start.server().await?;
        let own = std::env::current_exe().context("find the test's own file")?.canonicalize()?;
        start.entry("test", &own)?;
        let (ours, go) = (scene::binary()?, |sdk: GoSdk| programs.join(sdk.program()));
        let theirs = match infra {
            Infra::Ours => ours.clone(),
            Infra::Go(sdk) => go(sdk),
        };
        for (name, program) in [
            ("registry", theirs.clone()),
            ("nsmgr", theirs),
            ("forwarder", ours),
            ("client", go(workloads)),
            ("endpoint", go(workloads)),
        ] {
            link(&program, &start.path(name))?;
            start.entry(name, &start.path(name))?;
        }
        let agent = start.agent().await?;
        let (registry, manager, forwarder) = start.infra(infra).await?;
        let programs = programs.to_owned();
        Ok(Mesh { programs, infra: namespace, server, agent, registry, manager, forwarder, directory, _lock: lock })
    }

    async fn listening(&self, socket: &str) -> Result<()> {
        listening(&self.path(socket)).await.with_context(|| self.logs())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// URL of a unix socket of that name.
    pub fn socket(&self, name: &str) -> String {
        format!("unix://{}", self.path(name).display())
    }

    /// URL of the manager.
    pub fn manager(&self) -> String {
        self.socket("nsm.io.sock")
    }

    /// The identity of this process, by SPIRE.
    ///
    /// # Errors
    /// If the agent has none for it.
    pub async fn identity(&self) -> Result<X509Source> {
        Ok(X509Source::connect(&self.socket("agent.sock"), PATIENCE).await?)
    }

    /// A transport with `identity` and tokens of [`TOKEN_LIFETIME`].
    ///
    /// # Errors
    /// If the identity makes no TLS configuration.
    pub fn transport(identity: &X509Source) -> Result<Transport> {
        Ok(Transport::new(identity.clone())?.with_max_token_lifetime(TOKEN_LIFETIME))
    }

    /// A namespace called `name` for a workload.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn namespace(&self, name: &str) -> Result<Namespace> {
        Namespace::create(&format!("{}{name}", cleanup::prefix(ID)), None)
    }

    /// Starts the Go peer `client` or `endpoint` in `namespace`; a client's interface is `interface`.
    ///
    /// # Errors
    /// If it cannot be executed.
    pub fn go(&self, role: &str, service: &str, interface: &str, namespace: &Namespace) -> Result<Arc<Process>> {
        let env = [
            ("SPIFFE_ENDPOINT_SOCKET", self.socket("agent.sock")),
            ("NSM_NAME", role.to_owned()),
            ("NSM_CONNECT_TO", self.manager()),
            ("NSM_SERVICE_NAME", service.to_owned()),
            ("NSM_MAX_TOKEN_LIFETIME", format!("{}s", TOKEN_LIFETIME.as_secs())),
            ("NSM_LISTEN_ON", self.socket(&format!("{role}.sock"))),
            ("NSM_INTERFACE", interface.to_owned()),
            ("NSM_LOG_LEVEL", std::env::var("NSM_LOG_LEVEL").unwrap_or_default()),
        ];
        let process = Process::new(ID, role, plan(self.path(role), &[role], &env), self.path(&format!("{role}.log")));
        process.start(namespace)?;
        Ok(process)
    }

    /// Kills a component and starts it again; returns when it answers.
    ///
    /// # Errors
    /// If it does not come back.
    pub async fn restart(&self, component: Component) -> Result<()> {
        match component {
            Component::SpireAgent => {
                self.agent.restart(&self.infra)?;
                healthy(&self.infra, &self.programs.join("spire-agent"), &self.path("agent.sock"), &self.agent).await
            }
            Component::SpireServer => {
                self.server.restart(&self.infra)?;
                healthy(&self.infra, &self.programs.join(SERVER_KEY), &self.path("server.sock"), &self.server).await
            }
            Component::Registry => self.registry.restart(&self.infra),
            Component::Manager => {
                self.manager.restart(&self.infra)?;
                self.listening("nsm.io.sock").await
            }
            Component::Forwarder => {
                let forwarder = self.forwarder.as_ref().context("the forwarder is the manager's process")?;
                forwarder.restart(&self.infra)?;
                self.listening("forwarder.sock").await
            }
        }
    }

    /// What can be killed, each a process of its own.
    pub fn components(&self) -> Vec<Component> {
        let mut all = vec![Component::SpireAgent, Component::SpireServer, Component::Registry, Component::Manager];
        all.extend(self.forwarder.as_ref().map(|_| Component::Forwarder));
        all
    }

    /// The last lines of every log, for a failure's message.
    pub fn logs(&self) -> String {
        let processes = [&self.server, &self.agent, &self.registry, &self.manager].into_iter().chain(&self.forwarder);
        processes.map(|process| tail(process.log())).collect::<Vec<_>>().join("\n")
    }
}

/// Where the parts of a mesh are started.
struct Start<'a> {
    programs: &'a Path,
    directory: &'a Path,
    namespace: &'a Namespace,
}

impl Start<'_> {
    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn socket(&self, name: &str) -> String {
        format!("unix://{}", self.path(name).display())
    }

    fn process(&self, program: PathBuf, args: &[&str], env: &[(&str, String)]) -> Result<Arc<Process>> {
        let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let process = Process::new(ID, "node", plan(program, args, env), self.path(&format!("{name}.log")));
        process.start(self.namespace)?;
        Ok(process)
    }

    async fn server(&self) -> Result<Arc<Process>> {
        let (config, program) = (self.path("server.conf"), self.programs.join(SERVER_KEY));
        std::fs::write(&config, server_config(self.directory)).context("write server.conf")?;
        let server = self.process(program.clone(), &["run", "-config", &config.display().to_string()], &[])?;
        healthy(self.namespace, &program, &self.path("server.sock"), &server).await?;
        Ok(server)
    }

    async fn agent(&self) -> Result<Arc<Process>> {
        let (config, program) = (self.path("agent.conf"), self.programs.join("spire-agent"));
        std::fs::write(&config, agent_config(self.directory)).context("write agent.conf")?;
        let (token, config) = (self.token()?, config.display().to_string());
        let agent = self.process(program.clone(), &["run", "-config", &config, "-joinToken", &token], &[])?;
        healthy(self.namespace, &program, &self.path("agent.sock"), &agent).await?;
        Ok(agent)
    }

    /// Registry, manager and, with NSM's, the forwarder. NSM's settings have the same names as ours.
    /// Each is started when the one before it listens: what is registered with NSM's manager while it has no registry is not reached
    /// later.
    async fn infra(&self, infra: Infra) -> Result<(Arc<Process>, Arc<Process>, Option<Arc<Process>>)> {
        let common = |name: &str| -> Result<Vec<(&str, String)>> {
            std::fs::create_dir(self.path(&format!("state-{name}"))).context("make a state directory")?;
            Ok(vec![
                ("SPIFFE_ENDPOINT_SOCKET", self.socket("agent.sock")),
                ("NSM_NAME", name.to_owned()),
                ("NSM_MAX_TOKEN_LIFETIME", format!("{}s", TOKEN_LIFETIME.as_secs())),
                ("NSM_STATE_DIR", self.path(&format!("state-{name}")).display().to_string()),
                ("NSM_LOG_LEVEL", std::env::var("NSM_LOG_LEVEL").unwrap_or_default()),
                ("HEALTH_SOCKET", String::new()),
            ])
        };
        let registry_url = "tcp://127.0.0.1:5002".to_owned();
        let mut env = common("registry")?;
        let role = match infra {
            Infra::Ours => {
                env.push(("NSM_LISTEN_ON", self.socket("registry-node.sock")));
                env.push(("NSM_REGISTRY_LISTEN_ON", registry_url.clone()));
                "nsm"
            }
            Infra::Go(_) => {
                env.push(("NSM_LISTEN_ON", format!("{registry_url},{}", self.socket("registry-node.sock"))));
                "registry"
            }
        };
        let registry = self.process(self.path("registry"), &[role], &env)?;
        listening(&self.path("registry-node.sock")).await?;
        let mut env = common("nsmgr")?;
        env.push(("NSM_LISTEN_ON", format!("{},tcp://127.0.0.1:5001", self.socket("nsm.io.sock"))));
        env.push(("NSM_REGISTRY_URL", registry_url));
        env.push(("NODE_NAME", "node-a".to_owned()));
        let role = if infra == Infra::Ours { "nsm" } else { "manager" };
        let manager = self.process(self.path("nsmgr"), &[role], &env)?;
        listening(&self.path("nsm.io.sock"))
            .await
            .with_context(|| format!("{}\n{}", tail(registry.log()), tail(manager.log())))?;
        if infra == Infra::Ours {
            return Ok((registry, manager, None));
        }
        let mut env = common("forwarder")?;
        env.push(("NSM_CONNECT_TO", self.socket("nsm.io.sock")));
        env.push(("NSM_LISTEN_ON", self.socket("forwarder.sock")));
        let forwarder = self.process(self.path("forwarder"), &["nsm"], &env)?;
        Ok((registry, manager, Some(forwarder)))
    }

    /// Output of `spire-server` with the arguments.
    fn ask(&self, args: &[&str]) -> Result<String> {
        let server = self.programs.join(SERVER_KEY).display().to_string();
        self.namespace
            .output(&server, &[args, &["-socketPath", &self.path("server.sock").display().to_string()]].concat())
    }

    /// Lets processes that run `program` be `spiffe://example.org/<name>`.
    fn entry(&self, name: &str, program: &Path) -> Result<()> {
        let (id, selector) = (format!("spiffe://example.org/{name}"), format!("unix:path:{}", program.display()));
        let life = SVID_LIFETIME.to_string();
        let args = ["entry", "create", "-parentID", AGENT_ID, "-spiffeID", &id, "-selector", &selector, "-x509SVIDTTL"];
        self.ask(&[&args[..], &[&life]].concat()).map(drop)
    }

    /// A join token for the agent.
    fn token(&self) -> Result<String> {
        let said = self.ask(&["token", "generate", "-spiffeID", AGENT_ID])?;
        let token = said.lines().find_map(|line| line.strip_prefix("Token: "));
        token.map(|token| token.trim().to_owned()).with_context(|| format!("spire-server token generate said {said:?}"))
    }
}

/// Waits until somebody accepts connections on a unix socket.
///
/// # Errors
/// If nobody does in time.
pub async fn listening(socket: &Path) -> Result<()> {
    let began = Instant::now();
    while tokio::net::UnixStream::connect(socket).await.is_err() {
        if began.elapsed() > PATIENCE {
            bail!("nobody listens on {}", socket.display());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

fn plan(program: PathBuf, args: &[&str], env: &[(&str, String)]) -> ProcessPlan {
    ProcessPlan {
        name: program.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        program,
        args: args.iter().map(|&arg| arg.to_owned()).collect(),
        env: env.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect(),
        nice: 0,
    }
}

/// A name of its own for the program, so that SPIRE knows its processes by their path.
fn link(program: &Path, name: &Path) -> Result<()> {
    if std::fs::hard_link(program, name).is_err() {
        // Another file system.
        std::fs::copy(program, name).with_context(|| format!("copy {}", program.display()))?;
    }
    Ok(())
}

/// The last lines of a log.
fn tail(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    format!("{}:\n{}", log.display(), lines[lines.len().saturating_sub(12)..].join("\n"))
}

async fn healthy(namespace: &Namespace, program: &Path, socket: &Path, process: &Process) -> Result<()> {
    let (program, socket) = (program.display().to_string(), socket.display().to_string());
    let began = Instant::now();
    while let Err(cause) = namespace.output(&program, &["healthcheck", "-socketPath", &socket]) {
        if began.elapsed() > PATIENCE {
            bail!("{program} is not healthy: {cause:#}; {}", tail(process.log()));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}

fn server_config(directory: &Path) -> String {
    let directory = directory.display();
    format!(
        r#"server {{
  bind_address = "127.0.0.1"
  bind_port = "8081"
  socket_path = "{directory}/server.sock"
  trust_domain = "example.org"
  data_dir = "{directory}/spire-server.data"
}}
plugins {{
  DataStore "sql" {{
    plugin_data {{
      database_type = "sqlite3"
      connection_string = "{directory}/spire-server.sqlite3"
    }}
  }}
  NodeAttestor "join_token" {{ plugin_data {{}} }}
  KeyManager "disk" {{ plugin_data {{ keys_path = "{directory}/spire-server.keys" }} }}
}}
"#
    )
}

fn agent_config(directory: &Path) -> String {
    let directory = directory.display();
    format!(
        r#"agent {{
  data_dir = "{directory}/spire-agent.data"
  socket_path = "{directory}/agent.sock"
  server_address = "127.0.0.1"
  server_port = "8081"
  trust_domain = "example.org"
  insecure_bootstrap = true
}}
plugins {{
  NodeAttestor "join_token" {{ plugin_data {{}} }}
  KeyManager "disk" {{ plugin_data {{ directory = "{directory}/spire-agent.data" }} }}
  WorkloadAttestor "unix" {{ plugin_data {{ discover_workload_path = true workload_size_limit = -1 }} }}
}}
"#
    )
}
