//! Registries of network services and endpoints: elements, stock chains and clients.
