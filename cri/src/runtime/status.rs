//! Status: whether pods can be run, and what can be asked for.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::json;

use super::Runtime;
use crate::api::runtime::{
    RuntimeCondition, RuntimeFeatures, RuntimeHandler, RuntimeHandlerFeatures, RuntimeStatus, StatusRequest,
    StatusResponse,
};
use crate::sandbox::Launcher;

impl Runtime {
    /// Conditions as kubelet reads them: RuntimeReady and NetworkReady.
    pub fn status(&self, request: &StatusRequest) -> StatusResponse {
        let condition = |kind: &str, problem: Option<String>, reason: &str| RuntimeCondition {
            r#type: kind.into(),
            status: problem.is_none(),
            reason: if problem.is_some() { reason.into() } else { String::new() },
            message: problem.unwrap_or_default(),
        };
        let mut conditions = vec![
            condition("RuntimeReady", None, ""),
            condition("NetworkReady", self.network.ready().err(), "NetworkPluginNotReady"),
        ];
        for (name, launcher) in self.launchers.iter().filter(|(_, launcher)| launcher.has_own_kernel()) {
            let kind = format!("RuntimeHandlerReady/{name}");
            conditions.push(condition(&kind, launcher.problem(), "MachinesUnavailable"));
        }
        let user_namespaces = self.user_namespaces.is_ok();
        // mount_setattr with AT_RECURSIVE is older than every kernel that mounts files as EROFS.
        let features = |machine: bool| RuntimeHandlerFeatures {
            recursive_read_only_mounts: true,
            // The guest's kernel is hull's own.
            user_namespaces: user_namespaces || machine,
        };
        let handler = |name: &str, launcher: &Arc<dyn Launcher>| RuntimeHandler {
            name: name.to_owned(),
            features: Some(features(launcher.has_own_kernel())),
        };
        // kubelet asks for the default one by no name.
        let default = self.launchers.get(&self.config.runtimes.default).map(|launcher| handler("", launcher));
        let named = self.launchers.iter().map(|(name, launcher)| handler(name, launcher));
        StatusResponse {
            status: Some(RuntimeStatus { conditions }),
            info: if request.verbose { self.verbose() } else { BTreeMap::new() },
            runtime_handlers: default.into_iter().chain(named).collect(),
            features: Some(RuntimeFeatures {
                supplemental_groups_policy: true,
                user_namespaces_host_network: user_namespaces,
                mount_options: true,
            }),
        }
    }

    /// Runtime handlers that can run no pods here, and why not.
    pub(crate) fn handler_problems(&self) -> BTreeMap<String, String> {
        let problem =
            |(name, launcher): (&String, &Arc<dyn Launcher>)| Some((name.clone(), launcher.problem()?));
        self.launchers.iter().filter_map(problem).collect()
    }

    fn verbose(&self) -> BTreeMap<String, String> {
        let info = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "bootId": self.boot_id,
            "startedAt": self.started_at,
            "noUserNamespaces": self.user_namespaces.as_ref().err(),
            "apparmor": self.apparmor,
            "selinux": self.selinux.is_some(),
            "pods": self.objects.pods().len(),
            "containers": self.objects.containers().len(),
            "cgroups": {
                "unified": self.layout.unified,
                "unifiedControllers": self.layout.unified_controllers,
                "v1": self.layout.v1.iter().map(|one| &one.mount_point).collect::<Vec<_>>(),
            },
        });
        let config = serde_json::to_string(&self.config).unwrap_or_default();
        BTreeMap::from([("hull".into(), info.to_string()), ("config".into(), config)])
    }
}
