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

/// What can be killed and started again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Component {
    /// Hands out identities on the node.
    SpireAgent,
    /// Signs identities.
    SpireServer,
    /// Registry, a process apart from the manager's.
    Registry,
    /// Manager and forwarder of the node.
    Node,
}

/// Everything between a client and an endpoint.
#[derive(Debug)]
pub struct Mesh {
    programs: PathBuf,
    infra: Namespace,
    server: Arc<Process>,
    agent: Arc<Process>,
    registry: Arc<Process>,
    node: Arc<Process>,
    directory: tempfile::TempDir,
    _lock: Lock,
}

impl Mesh {
    /// Starts all of it, with peers out of `programs`; `workloads` are hard links that get identities, beside our own components.
    ///
    /// # Errors
    /// If a part does not come up in time; its log is named.
    pub async fn start(programs: &Path, workloads: &[&str]) -> Result<Self> {
        let lock = Lock::take(ID)?;
        let left = cleanup::sweep(ID)?;
        if !left.is_empty() {
            println!("removed what an earlier run left: {}", left.join(", "));
        }
        let directory = tempfile::Builder::new().prefix("peers-").tempdir().context("make a directory")?;
        let infra = Namespace::create(&format!("{}infra", cleanup::prefix(ID)), None)?;
        infra.ip("link set lo up")?;
        let path = |name: &str| directory.path().join(name);
        let process = |program: PathBuf, args: &[&str], env: &[(&str, String)]| {
            let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let log = path(&format!("{name}.log"));
            Process::new(ID, "node", plan(program, args, env), log)
        };

        let program = |name: &str| programs.join(name);
        std::fs::write(path("server.conf"), server_config(directory.path())).context("write server.conf")?;
        std::fs::write(path("agent.conf"), agent_config(directory.path())).context("write agent.conf")?;
        let server_conf = path("server.conf").display().to_string();
        let server = process(program(SERVER_KEY), &["run", "-config", &server_conf], &[]);
        server.start(&infra)?;
        healthy(&infra, &program(SERVER_KEY), &path("server.sock"), &server).await?;

        let binary = scene::binary()?;
        let own = std::env::current_exe().context("find the test's own file")?.canonicalize()?;
        entry(&infra, programs, directory.path(), "test", &own)?;
        for name in ["registry", "nsmgr"] {
            link(&binary, &path(name))?;
            entry(&infra, programs, directory.path(), name, &path(name))?;
        }
        for name in workloads {
            link(&program("nsm"), &path(name))?;
            entry(&infra, programs, directory.path(), name, &path(name))?;
        }
        let token = token(&infra, programs, directory.path())?;
        let agent_conf = path("agent.conf").display().to_string();
        let agent = process(program("spire-agent"), &["run", "-config", &agent_conf, "-joinToken", &token], &[]);
        agent.start(&infra)?;
        healthy(&infra, &program("spire-agent"), &path("agent.sock"), &agent).await?;

        let socket = |name: &str| format!("unix://{}", path(name).display());
        let common = |name: &str| {
            vec![
                ("SPIFFE_ENDPOINT_SOCKET", socket("agent.sock")),
                ("NSM_NAME", name.to_owned()),
                ("NSM_MAX_TOKEN_LIFETIME", format!("{}s", TOKEN_LIFETIME.as_secs())),
                ("NSM_STATE_DIR", path(&format!("state-{name}")).display().to_string()),
                ("HEALTH_SOCKET", String::new()),
            ]
        };
        for name in ["registry", "nsmgr"] {
            std::fs::create_dir(path(&format!("state-{name}"))).context("make a state directory")?;
        }
        let mut env = common("registry");
        env.push(("NSM_LISTEN_ON", socket("registry-node.sock")));
        env.push(("NSM_REGISTRY_LISTEN_ON", "tcp://127.0.0.1:5002".to_owned()));
        let registry = process(path("registry"), &["nsm"], &env);
        let mut env = common("nsmgr");
        env.push(("NSM_LISTEN_ON", format!("{},tcp://127.0.0.1:5001", socket("nsm.io.sock"))));
        env.push(("NSM_REGISTRY_URL", "tcp://127.0.0.1:5002".to_owned()));
        env.push(("NODE_NAME", "node-a".to_owned()));
        let node = process(path("nsmgr"), &["nsm"], &env);
        registry.start(&infra)?;
        node.start(&infra)?;
        let mesh = Mesh { programs: programs.to_owned(), infra, server, agent, registry, node, directory, _lock: lock };
        mesh.listening().await?;
        Ok(mesh)
    }

    async fn listening(&self) -> Result<()> {
        let socket = self.path("nsm.io.sock");
        let began = Instant::now();
        while tokio::net::UnixStream::connect(&socket).await.is_err() {
            if began.elapsed() > PATIENCE {
                bail!("the manager does not listen on {}; {}", socket.display(), tail(self.node.log()));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
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

    /// Starts the Go peer `name` (one of the workloads), as `client` or `endpoint`, in `namespace`.
    ///
    /// # Errors
    /// If it cannot be executed.
    pub fn go(
        &self,
        name: &str,
        role: &str,
        service: &str,
        interface: &str,
        namespace: &Namespace,
    ) -> Result<Arc<Process>> {
        let env = [
            ("SPIFFE_ENDPOINT_SOCKET", self.socket("agent.sock")),
            ("NSM_NAME", name.to_owned()),
            ("NSM_CONNECT_TO", self.manager()),
            ("NSM_SERVICE_NAME", service.to_owned()),
            ("NSM_MAX_TOKEN_LIFETIME", format!("{}s", TOKEN_LIFETIME.as_secs())),
            ("NSM_LISTEN_ON", self.path(&format!("{name}.sock")).display().to_string()),
            ("NSM_INTERFACE", interface.to_owned()),
            ("NSM_PROTOS", concat!(env!("CARGO_MANIFEST_DIR"), "/../proto/nsm").to_owned()),
        ];
        let process = Process::new(ID, name, plan(self.path(name), &[role], &env), self.path(&format!("{name}.log")));
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
            Component::Node => {
                self.node.restart(&self.infra)?;
                self.listening().await
            }
        }
    }

    /// The last lines of every log, for a failure's message.
    pub fn logs(&self) -> String {
        [&self.server, &self.agent, &self.registry, &self.node].map(|process| tail(process.log())).join("\n")
    }
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

/// Lets processes that run `program` be `spiffe://example.org/<name>`.
fn entry(namespace: &Namespace, programs: &Path, directory: &Path, name: &str, program: &Path) -> Result<()> {
    let (id, selector) = (format!("spiffe://example.org/{name}"), format!("unix:path:{}", program.display()));
    let (socket, life) = (directory.join("server.sock").display().to_string(), SVID_LIFETIME.to_string());
    let server = programs.join(SERVER_KEY).display().to_string();
    let args =
        ["entry", "create", "-socketPath", &socket, "-parentID", AGENT_ID, "-spiffeID", &id, "-selector", &selector];
    namespace.output(&server, &[&args[..], &["-x509SVIDTTL", &life]].concat()).map(drop)
}

/// A join token for the agent.
fn token(namespace: &Namespace, programs: &Path, directory: &Path) -> Result<String> {
    let socket = directory.join("server.sock").display().to_string();
    let server = programs.join(SERVER_KEY).display().to_string();
    let said = namespace.output(&server, &["token", "generate", "-socketPath", &socket, "-spiffeID", AGENT_ID])?;
    let token = said.lines().find_map(|line| line.strip_prefix("Token: "));
    token.map(|token| token.trim().to_owned()).with_context(|| format!("spire-server token generate said {said:?}"))
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
