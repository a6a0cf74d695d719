//! Enums by name in JSON, as CRI's own tools print them (`CONTAINER_RUNNING`); a number nobody knows stays a number.

use serde::Serializer;

use super::runtime::{
    CgroupDriver, ContainerState, MountPropagation, NamespaceMode, PodSandboxState, Signal,
};

fn name_or_number<S: Serializer>(name: Option<&'static str>, number: i32, out: S) -> Result<S::Ok, S::Error> {
    match name {
        Some(name) => out.serialize_str(name),
        None => out.serialize_i32(number),
    }
}

macro_rules! named {
    ($($(#[$doc:meta])* $function:ident: $kind:ty),* $(,)?) => {$(
        $(#[$doc])*
        pub fn $function<S: Serializer>(number: &i32, out: S) -> Result<S::Ok, S::Error> {
            name_or_number(<$kind>::try_from(*number).ok().map(|value| value.as_str_name()), *number, out)
        }
    )*};
}

named! {
    /// `SANDBOX_READY` or `SANDBOX_NOTREADY`.
    pod_state: PodSandboxState,
    /// `CONTAINER_CREATED`, `CONTAINER_RUNNING`, `CONTAINER_EXITED` or `CONTAINER_UNKNOWN`.
    container_state: ContainerState,
    /// `SIGNAL_SIGTERM` and the like.
    signal: Signal,
    /// `PROPAGATION_PRIVATE` and the like.
    propagation: MountPropagation,
    /// `POD`, `CONTAINER`, `NODE` or `TARGET`.
    namespace_mode: NamespaceMode,
    /// `SYSTEMD` or `CGROUPFS`.
    cgroup_driver: CgroupDriver,
}

#[cfg(test)]
mod tests {
    use crate::api::runtime::ContainerStatus;

    #[test]
    fn states_are_names_and_unknown_numbers_stay_numbers() {
        let status = ContainerStatus { state: 2, stop_signal: 9999, ..Default::default() };
        let json = serde_json::to_value(&status).unwrap();
        assert_eq!(json["state"], "CONTAINER_EXITED");
        assert_eq!(json["stopSignal"], 9999);
    }
}
