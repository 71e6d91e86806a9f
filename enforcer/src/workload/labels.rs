//! The labels of a container, from what its runtime wrote about it on this host. Whatever can't be read gives none.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::Identity;

/// Of larger files nothing is read.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// Of more labels, or longer ones, none is taken: which of them count must not depend on their order.
const MAX_LABELS: usize = 512;
const MAX_LABEL_BYTES: usize = 8 << 10;
/// How many namespaces of containerd are looked into.
const MAX_NAMESPACES: usize = 64;

/// Where Docker describes its containers.
const DOCKER: &str = "var/lib/docker/containers";
/// Where containerd's bundles are, below a namespace: of its own packages, and of k3s and RKE2.
const CONTAINERD: [&str; 2] =
    ["run/containerd/io.containerd.runtime.v2.task", "run/k3s/containerd/io.containerd.runtime.v2.task"];
/// Where the bundles of Podman and CRI-O are.
const STORAGE: [&str; 2] =
    ["run/containers/storage/overlay-containers", "var/lib/containers/storage/overlay-containers"];
/// The annotation in which CRI-O puts the labels, as a JSON object.
const CRIO_LABELS: &str = "io.kubernetes.cri-o.Labels";

pub(super) type Labels = BTreeMap<String, String>;

/// `config.v2.json` of Docker.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Docker {
    config: DockerConfig,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerConfig {
    labels: Option<Labels>,
}

/// `config.json` of a bundle (OCI runtime specification).
#[derive(Deserialize)]
struct Bundle {
    annotations: Option<Labels>,
}

/// The labels of a workload's container, on the host whose root is at `host_root`.
pub(super) fn of(host_root: &Path, identity: &Identity) -> Labels {
    let Some(id) = &identity.container_id else { return Labels::new() };
    let found = match identity.runtime {
        Some("docker") => docker(host_root, id),
        Some("containerd") => containerd(host_root, id),
        Some("podman" | "cri-o") => storage(host_root, id),
        _ => containerd(host_root, id).or_else(|| storage(host_root, id)).or_else(|| docker(host_root, id)),
    };
    let fits = |labels: &Labels| {
        let bytes = labels.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>();
        labels.len() <= MAX_LABELS && bytes <= MAX_LABEL_BYTES
    };
    found.filter(fits).unwrap_or_default()
}

fn docker(host_root: &Path, id: &str) -> Option<Labels> {
    let file: Docker = read(&host_root.join(DOCKER).join(id).join("config.v2.json"))?;
    file.config.labels
}

fn containerd(host_root: &Path, id: &str) -> Option<Labels> {
    let mut bundles = Vec::new();
    for base in CONTAINERD {
        let namespaces = fs::read_dir(host_root.join(base)).into_iter().flatten().flatten();
        let files = namespaces.take(MAX_NAMESPACES).map(|entry| entry.path().join(id).join("config.json"));
        bundles.extend(files.filter(|file| file.is_file()));
    }
    // Two containers of one id: which is meant, the cgroup does not say.
    let [bundle]: [PathBuf; 1] = bundles.try_into().ok()?;
    annotations(&bundle)
}

fn storage(host_root: &Path, id: &str) -> Option<Labels> {
    let file = |base| host_root.join(base).join(id).join("userdata/config.json");
    STORAGE.into_iter().map(file).find(|file| file.is_file()).and_then(|file| annotations(&file))
}

/// The annotations of a bundle, and the labels that are in one of them. Those that the runtime wrote itself win: a label may have any name.
fn annotations(bundle: &Path) -> Option<Labels> {
    let annotations = read::<Bundle>(bundle)?.annotations?;
    let inner = annotations.get(CRIO_LABELS).and_then(|text| serde_json::from_str::<Labels>(text).ok());
    let mut labels = inner.unwrap_or_default();
    labels.extend(annotations);
    labels.remove(CRIO_LABELS);
    Some(labels)
}

fn read<T: DeserializeOwned>(path: &Path) -> Option<T> {
    // Asked before opening, because opening a pipe would wait for its writer.
    if !fs::metadata(path).ok()?.is_file() {
        return None;
    }
    let mut bytes = Vec::new();
    File::open(path).ok()?.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).ok()?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return None;
    }
    serde_json::from_slice(&bytes).ok()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    struct Host(tempfile::TempDir);

    impl Host {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn write(&self, path: &str, text: &str) {
            let path = self.0.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }

        fn docker(&self, labels: &Value) {
            let text = json!({"ID": ID, "Config": {"Labels": labels, "Env": ["SECRET=x"]}}).to_string();
            self.write(&format!("{DOCKER}/{ID}/config.v2.json"), &text);
        }

        fn labels(&self, path: &str) -> Vec<(String, String)> {
            of(self.0.path(), &Identity::of(path)).into_iter().collect()
        }
    }

    fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn each_runtime_has_its_files() {
        let annotated =
            |value: &str| json!({"ociVersion": "1.2.0", "annotations": {"app": value}}).to_string();
        let host = Host::new();
        host.docker(&json!({"app": "docker", "tier": "x"}));
        host.write(&format!("{}/k8s.io/{ID}/config.json", CONTAINERD[0]), &annotated("containerd"));
        host.write(&format!("{}/{ID}/userdata/config.json", STORAGE[1]), &annotated("podman"));
        assert_eq!(host.labels(&format!("/docker/{ID}")), pairs(&[("app", "docker"), ("tier", "x")]));
        let machine = format!("/machine.slice/libpod-{ID}.scope");
        assert_eq!(host.labels(&machine), pairs(&[("app", "podman")]));
        let nerdctl = format!("/system.slice/nerdctl-{ID}.scope");
        assert_eq!(host.labels(&nerdctl), pairs(&[("app", "containerd")]));
        // The path does not say whose it is.
        let pod = format!("/kubepods/pod8c2f6c4e-1f0a-4f5e-9d3b-0a1b2c3d4e5f/{ID}");
        assert_eq!(host.labels(&pod), pairs(&[("app", "containerd")]));
        assert_eq!(host.labels("/system.slice/agent.service"), []);
        assert_eq!(host.labels(&format!("/docker/{}", ID.replace('0', "f"))), []);
    }

    #[test]
    fn labels_inside_an_annotation_do_not_hide_the_runtimes_own() {
        let host = Host::new();
        let inner = json!({"app": "agent", "io.kubernetes.pod.name": "forged"}).to_string();
        let text = json!({"annotations": {CRIO_LABELS: inner, "io.kubernetes.pod.name": "real"}}).to_string();
        host.write(&format!("{}/{ID}/userdata/config.json", STORAGE[0]), &text);
        let scope =
            format!("/kubepods.slice/kubepods-pod8c2f6c4e_1f0a_4f5e_9d3b_0a1b2c3d4e5f.slice/crio-{ID}.scope");
        assert_eq!(host.labels(&scope), pairs(&[("app", "agent"), ("io.kubernetes.pod.name", "real")]));
    }

    #[test]
    fn what_can_not_be_read_whole_gives_none() {
        let host = Host::new();
        let of = |labels: &Value| {
            host.docker(labels);
            host.labels(&format!("/docker/{ID}")).len()
        };
        assert_eq!(of(&json!({"a": "b"})), 1);
        assert_eq!(of(&Value::Null), 0);
        assert_eq!(of(&json!({"a": 1})), 0);
        assert_eq!(of(&json!({"a": "x".repeat(MAX_LABEL_BYTES)})), 0);
        assert_eq!(of(&json!({"a": "x".repeat(2 << 20)})), 0);
        let many: BTreeMap<String, &str> = (0..=MAX_LABELS).map(|n| (n.to_string(), "x")).collect();
        assert_eq!(of(&json!(many)), 0);
        host.write(&format!("{DOCKER}/{ID}/config.v2.json"), "{\"Config\": {\"Labels\": {\"a\": \"b\"}}");
        assert_eq!(host.labels(&format!("/docker/{ID}")), []);
        // Two of one id.
        let text = json!({"annotations": {"a": "b"}}).to_string();
        for namespace in ["default", "k8s.io"] {
            host.write(&format!("{}/{namespace}/{ID}/config.json", CONTAINERD[0]), &text);
        }
        assert_eq!(host.labels(&format!("/system.slice/nerdctl-{ID}.scope")), []);
    }
}
