//! Logs: one JSON object per line with the keys of the original in containers, human text on terminals.

use std::fmt;
use std::io::IsTerminal;
use std::sync::OnceLock;
use std::time::SystemTime;

use serde_json::{Map, Value};
use tokio::signal::unix::{SignalKind, signal};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::prelude::*;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{EnvFilter, Registry, reload};

type Handle = reload::Handle<EnvFilter, Registry>;

static CONFIGURED: OnceLock<(Handle, String)> = OnceLock::new();

/// Starts logging to stdout: JSON when it is not a terminal, human text otherwise. `level` is the component's `LOG_LEVEL`
/// (`INFO`, `DEBUG`, `TRACE`; anything else means `INFO`, as in the original). Inside a tokio runtime it also installs the
/// signals: SIGUSR2 sets TRACE, SIGUSR1 returns to `level`. A second call in the same process does nothing.
pub fn init(service_id: &str, level: &str) {
    let (filter, handle) = reload::Layer::new(filter(level));
    let registry = tracing_subscriber::registry().with(filter);
    let started = if std::io::stdout().is_terminal() {
        registry.with(tracing_subscriber::fmt::layer().with_target(false)).try_init()
    } else {
        let format = Json { service_id: service_id.to_owned() };
        registry.with(tracing_subscriber::fmt::layer().event_format(format)).try_init()
    };
    if started.is_err() || CONFIGURED.set((handle, level.to_owned())).is_err() {
        return;
    }
    if tokio::runtime::Handle::try_current().is_ok() {
        tokio::spawn(follow_signals());
    }
}

/// Changes the level of a running process; `None` returns to the configured one.
pub fn set_level(level: Option<&str>) {
    if let Some((handle, configured)) = CONFIGURED.get() {
        let level = level.unwrap_or(configured);
        if handle.reload(filter(level)).is_ok() {
            tracing::info!(level, "log level set");
        }
    }
}

async fn follow_signals() {
    let (Ok(mut back), Ok(mut trace)) = (signal(SignalKind::user_defined1()), signal(SignalKind::user_defined2()))
    else {
        return;
    };
    loop {
        tokio::select! {
            _ = back.recv() => set_level(None),
            _ = trace.recv() => set_level(Some("TRACE")),
        }
    }
}

/// The libraries below are only interesting when something is wrong with them.
fn filter(level: &str) -> EnvFilter {
    let level = match level.to_ascii_uppercase().as_str() {
        "DEBUG" => "debug",
        "TRACE" => "trace",
        "WARN" | "WARNING" => "warn",
        "ERROR" => "error",
        _ => "info",
    };
    let quiet = [
        "h2",
        "hyper",
        "hyper_util",
        "tower",
        "rustls",
        "tokio_rustls",
        "tonic",
        "netlink_proto",
        "netlink_packet_route",
        "runtime",
        "tokio",
    ];
    let directives = quiet.iter().fold(level.to_owned(), |all, name| format!("{all},{name}=warn"));
    EnvFilter::new(directives)
}

/// `{"severity","timestamp","service_id","message","version","extra_data":{..}}`.
struct Json {
    service_id: String,
}

#[derive(Default)]
struct Fields {
    message: String,
    extra: Map<String, Value>,
}

impl Fields {
    fn put(&mut self, field: &Field, value: Value) {
        if field.name() == "message" {
            self.message = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        } else {
            self.extra.insert(field.name().to_owned(), value);
        }
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, format!("{value:?}").into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value.into());
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, value.into());
    }
}

fn severity(level: Level) -> &'static str {
    match level {
        Level::ERROR => "error",
        Level::WARN => "warning",
        Level::INFO => "info",
        Level::DEBUG | Level::TRACE => "debug",
    }
}

impl<S, N> FormatEvent<S, N> for Json
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let timestamp = humantime::format_rfc3339_millis(SystemTime::now()).to_string().replace('Z', "+00:00");
        let line = serde_json::json!({
            "severity": severity(*event.metadata().level()),
            "timestamp": timestamp,
            "service_id": self.service_id,
            "message": fields.message,
            "version": env!("CARGO_PKG_VERSION"),
            "extra_data": fields.extra,
        });
        writeln!(writer, "{line}")
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);

    impl Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn keys_of_the_original() {
        let buffer = Buffer::default();
        let writer = buffer.clone();
        let layer = tracing_subscriber::fmt::layer()
            .event_format(Json { service_id: "Meridio-nsp".to_owned() })
            .with_writer(move || writer.clone());
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            tracing::warn!(vip = "20.0.0.1/32", count = 3, "vip refused");
        });
        let line: Value = serde_json::from_slice(&buffer.0.lock().unwrap()).unwrap();
        assert_eq!(line["severity"], "warning");
        assert_eq!(line["service_id"], "Meridio-nsp");
        assert_eq!(line["message"], "vip refused");
        assert_eq!(line["extra_data"], serde_json::json!({"vip": "20.0.0.1/32", "count": 3}));
        assert!(line["timestamp"].as_str().unwrap().ends_with("+00:00"));
        assert!(line["version"].is_string());
    }
}
