/// Messages, generated from proto/agent.proto.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod messages {
    include!(concat!(env!("OUT_DIR"), "/hull.agent.v1.rs"));
}
