//! Compiles the protobuf contract without a protoc on the machine.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let file = "proto/vasto.proto";
    println!("cargo:rerun-if-changed={file}");
    let descriptors = protox::compile([file], ["proto"])?;
    tonic_prost_build::configure()
        .bytes(".vasto.Frame.packed")
        .bytes(".vasto.LogPart.batches")
        .bytes(".vasto.CopyPart.data")
        .bytes(".vasto.MovedRows.packed")
        .compile_fds(descriptors)?;
    Ok(())
}
