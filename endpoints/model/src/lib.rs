//! Trench, attractor, gateway, VIP, conduit, stream, flow and target as parsed, validated values.
