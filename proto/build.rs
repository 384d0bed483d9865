//! Compiles the proto files without a system `protoc`.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=nsp");
    let descriptors = protox::compile(["nsp.proto", "ipam.proto", "ambassador.proto", "loadbalancer.proto"], ["nsp"])?;
    tonic_prost_build::configure()
        // Ordered maps make the encoding of a message deterministic.
        .btree_map(".")
        .compile_fds(descriptors)?;
    Ok(())
}
