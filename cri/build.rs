//! Generates the gRPC code of `proto/` without protoc.

use std::error::Error;

/// Fields that hold an enum and are shown by `hull … -o json`; protobuf keeps them as numbers, people want names.
const NAMED_ENUMS: &[(&str, &str)] = &[
    ("PodSandbox.state", "pod_state"),
    ("PodSandboxStatus.state", "pod_state"),
    ("Container.state", "container_state"),
    ("ContainerStatus.state", "container_state"),
    ("ContainerStatus.stop_signal", "signal"),
    ("Mount.propagation", "propagation"),
    ("NamespaceOption.network", "namespace_mode"),
    ("NamespaceOption.pid", "namespace_mode"),
    ("NamespaceOption.ipc", "namespace_mode"),
    ("UserNamespace.mode", "namespace_mode"),
    ("LinuxRuntimeConfiguration.cgroup_driver", "cgroup_driver"),
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    println!("cargo::rerun-if-changed=build.rs");
    let files = protox::compile(["proto/runtime.proto", "proto/hull.proto"], ["proto"])?;
    let mut builder = tonic_prost_build::configure()
        .build_transport(true)
        .btree_map(".")
        // Calls that hull does not have yet answer UNIMPLEMENTED by themselves.
        .generate_default_stubs(true)
        // Its fields are secrets; api::redacted writes a Debug that keeps them.
        .skip_debug([".runtime.v1.AuthConfig"])
        .message_attribute(".runtime.v1", "#[derive(serde::Serialize)]\n#[serde(rename_all = \"camelCase\")]")
        .message_attribute(
            ".hull.v1.InfoReply",
            "#[derive(serde::Serialize)]\n#[serde(rename_all = \"camelCase\")]",
        );
    for (field, name) in NAMED_ENUMS {
        let attribute = format!("#[serde(serialize_with = \"crate::api::json::{name}\")]");
        builder = builder.field_attribute(format!(".runtime.v1.{field}"), attribute);
    }
    builder.compile_fds(files)?;
    Ok(())
}
