//! Linux kernel side of network services: namespaces, links, addresses, routes, rules, neighbours.
