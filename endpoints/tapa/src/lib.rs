//! Target access point ambassador: the side-car that turns a pod into a target.
