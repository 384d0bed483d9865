//! Compiles the proto files without a system `protoc`.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    // NSM's files import each other by bare name.
    let sets: [(&str, &[&str]); 2] = [
        (".", &["networkservice.proto", "connection.proto", "connectioncontext.proto", "registry.proto"]),
        ("spiffe", &["workload.proto"]),
    ];
    for (folder, files) in sets {
        for file in files {
            println!("cargo:rerun-if-changed={folder}/{file}");
        }
        let descriptors = protox::compile(files, [folder])?;
        tonic_prost_build::configure()
            // Ordered maps make the encoding of a message deterministic.
            .btree_map(".")
            .codec_path("crate::codec::Codec")
            .compile_fds(descriptors)?;
    }
    Ok(())
}
