//! Address allocation for the conduits of a trench.
