//! Compiles the proto files without a system `protoc`.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    // NSM's files import each other by bare name, so each folder is an include path of its own.
    let sets: [(&str, &[&str]); 3] = [
        ("nsm", &["networkservice.proto", "connection.proto", "connectioncontext.proto", "registry.proto"]),
        ("nsp", &["nsp.proto", "ipam.proto", "ambassador.proto", "loadbalancer.proto"]),
        ("spiffe", &["workload.proto"]),
    ];
    for (folder, files) in sets {
        println!("cargo:rerun-if-changed={folder}");
        let descriptors = protox::compile(files, [folder])?;
        tonic_prost_build::configure()
            // Ordered maps make the encoding of a message deterministic.
            .btree_map(".")
            .compile_fds(descriptors)?;
    }
    Ok(())
}
