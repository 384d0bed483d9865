//! What every component shares: settings, logs, health, shutdown, dialling and serving.
