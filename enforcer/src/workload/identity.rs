//! What a cgroup's path says of the workload in it.
//!
//! Whoever runs a unit or a container may have been given the tree below it (`Delegate=`), and can name things in there as it likes. So the
//! outermost name counts, and nothing below it does: a service can't pass for another by making a cgroup with that one's name. Below a name
//! that says nothing there is nothing to learn either.

use serde::Serialize;

/// A workload by its names. Which of them it has depends on who started it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize)]
pub struct Identity {
    /// systemd's unit, `agent.service`. Of what a user's own manager runs it is that manager's, `user@1000.service`.
    pub unit: Option<String>,
    /// The innermost systemd slice around it, `system.slice`.
    pub slice: Option<String>,
    /// The container's id, as its runtime gave it: 64 hexadecimal digits.
    pub container_id: Option<String>,
    /// Who made the container, where the path says it: `docker`, `podman`, `containerd`, `cri-o`.
    pub runtime: Option<&'static str>,
    /// The Kubernetes pod's uid.
    pub pod_uid: Option<String>,
}

/// What names a container's scope, and who names it so.
const SCOPES: &[(&str, &str)] = &[
    ("docker-", "docker"),
    ("libpod-", "podman"),
    ("cri-containerd-", "containerd"),
    ("nerdctl-", "containerd"),
    ("crio-", "cri-o"),
];
/// Where Docker keeps its containers if it does not ask systemd.
const DOCKER: &str = "docker";
/// Where the kubelet keeps its pods if it does not ask systemd, by class.
const KUBEPODS: &str = "kubepods";
const CLASSES: &[&str] = &["burstable", "besteffort"];
const UNITS: &[&str] = &[".service", ".scope", ".socket", ".mount", ".swap"];
/// Digits of a container's id that people are shown.
const SHORT_ID: usize = 12;

impl Identity {
    /// Reads a path below the root of the hierarchy: `/system.slice/agent.service`.
    #[must_use]
    pub fn of(path: &str) -> Self {
        Self::read(path).0
    }

    /// The part of a path that has the workload's name. What is below it, the workload may have made itself.
    #[must_use]
    pub fn named(path: &str) -> Option<&str> {
        Self::read(path).1
    }

    fn read(path: &str) -> (Self, Option<&str>) {
        let mut identity = Self::default();
        let mut named = None;
        let mut parent = "";
        let mut end = 0;
        for name in path.split_inclusive('/') {
            end += name.len();
            let name = name.trim_end_matches('/');
            if name.is_empty() {
                continue;
            }
            let until_here = path.get(..end).map(|path| path.trim_end_matches('/'));
            if let Some((id, runtime)) = container(name, parent) {
                identity.container_id = Some(id.to_owned());
                identity.runtime = runtime;
                named = until_here;
                break;
            }
            match pod_uid(name, parent) {
                // In a pod there is no other.
                Some(_) if identity.pod_uid.is_some() => break,
                Some(uid) => {
                    identity.pod_uid = Some(uid);
                    named = until_here;
                }
                None if name.ends_with(".slice") => identity.slice = Some(name.to_owned()),
                None if is_unit(name) => {
                    identity.unit = Some(name.to_owned());
                    named = until_here;
                    break;
                }
                None if name == DOCKER
                    || name == KUBEPODS
                    || (parent == KUBEPODS && CLASSES.contains(&name)) => {}
                // Nobody knows whose this is, so what is below it could have any name.
                None => break,
            }
            parent = name;
        }
        (identity, named)
    }

    /// For people: the name that says most.
    #[must_use]
    pub fn name(&self) -> Option<String> {
        let container = self.container_id.as_ref().map(|id| {
            format!("{}/{}", self.runtime.unwrap_or("container"), id.get(..SHORT_ID).unwrap_or(id))
        });
        match (&self.pod_uid, container) {
            (Some(pod), Some(container)) => Some(format!("pod/{pod}/{container}")),
            (Some(pod), None) => Some(format!("pod/{pod}")),
            (None, Some(container)) => Some(container),
            (None, None) => self.unit.clone(),
        }
    }

    /// What the names were read from, for people.
    #[must_use]
    pub const fn source(&self) -> Option<&'static str> {
        match (&self.pod_uid, &self.container_id, &self.unit) {
            (Some(_), _, _) => Some("pod"),
            (None, Some(_), _) => Some("container"),
            (None, None, Some(_)) => Some("unit"),
            (None, None, None) => None,
        }
    }
}

/// Whether a text is a container's id in full.
pub(crate) fn is_container_id(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// The id in the name of a container's cgroup, and its runtime where that is known. (A container's monitor has a name of another form.)
fn container<'a>(name: &'a str, parent: &str) -> Option<(&'a str, Option<&'static str>)> {
    let bare = name.strip_suffix(".scope").unwrap_or(name);
    if let Some((id, runtime)) =
        SCOPES.iter().find_map(|(prefix, runtime)| Some((bare.strip_prefix(prefix)?, *runtime)))
    {
        return is_container_id(id).then_some((id, Some(runtime)));
    }
    let runtime = (parent == DOCKER).then_some(DOCKER);
    (is_container_id(name) && (runtime.is_some() || parent.starts_with("pod"))).then_some((name, runtime))
}

/// The uid in the name of a pod's cgroup, of either cgroup driver: `kubepods-burstable-pod0a1b_....slice`, `pod0a1b-...`. That of a pod
/// from a file of the kubelet is a hash, without dashes.
fn pod_uid(name: &str, parent: &str) -> Option<String> {
    let uid = match name.strip_suffix(".slice") {
        Some(slice) if slice.contains(KUBEPODS) => slice.rsplit_once("-pod")?.1.replace('_', "-"),
        None if parent == KUBEPODS || CLASSES.contains(&parent) => name.strip_prefix("pod")?.to_owned(),
        _ => return None,
    };
    is_pod_uid(&uid).then_some(uid)
}

/// Whether a text is the uid of a pod, or the hash of one from a file.
pub(crate) fn is_pod_uid(uid: &str) -> bool {
    let hex = uid.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f' | b'-'));
    let dashes = uid.bytes().filter(|byte| *byte == b'-').count();
    hex && matches!((uid.len(), dashes), (36, 4) | (32, 0))
}

/// Whether a text is the name of a unit that can have processes.
pub(crate) fn is_unit(name: &str) -> bool {
    UNITS.iter().any(|suffix| name.strip_suffix(suffix).is_some_and(|name| !name.is_empty()))
        && !name.contains('/')
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
    const POD: &str = "8c2f6c4e-1f0a-4f5e-9d3b-0a1b2c3d4e5f";

    fn names(path: &str) -> [Option<String>; 4] {
        let Identity { unit, slice, container_id, runtime, pod_uid } = Identity::of(path);
        if container_id.is_some() {
            assert_eq!(container_id.as_deref(), Some(ID));
        }
        [unit, slice, pod_uid, runtime.map(str::to_owned).or(container_id.map(|_| "?".to_owned()))]
    }

    fn expect(path: &str, unit: &str, slice: &str, pod: &str, runtime: &str) {
        let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        assert_eq!(names(path), [some(unit), some(slice), some(pod), some(runtime)], "{path}");
    }

    #[test]
    fn units_and_their_slices() {
        expect("/", "", "", "", "");
        expect("/system.slice/agent.service", "agent.service", "system.slice", "", "");
        expect("/init.scope", "init.scope", "", "", "");
        expect("/user.slice/user-1000.slice/session-3.scope", "session-3.scope", "user-1000.slice", "", "");
        expect("/a.slice/a-b.slice/x@1.service/workers", "x@1.service", "a-b.slice", "", "");
        expect("/made/by/hand", "", "", "", "");
    }

    #[test]
    fn containers_of_each_runtime_and_driver() {
        expect(&format!("/system.slice/docker-{ID}.scope"), "", "system.slice", "", "docker");
        expect(&format!("/docker/{ID}"), "", "", "", "docker");
        expect(&format!("/machine.slice/libpod-{ID}.scope/container"), "", "machine.slice", "", "podman");
        expect(&format!("/system.slice/nerdctl-{ID}.scope"), "", "system.slice", "", "containerd");
    }

    #[test]
    fn pods_of_both_drivers() {
        let underscored = POD.replace('-', "_");
        let slice = format!("kubepods-burstable-pod{underscored}.slice");
        let scope = format!("cri-containerd-{ID}.scope");
        let path = format!("/kubepods.slice/kubepods-burstable.slice/{slice}/{scope}");
        expect(&path, "", "kubepods-burstable.slice", POD, "containerd");
        let path = format!("/kubepods.slice/kubepods-pod{underscored}.slice/crio-{ID}.scope");
        expect(&path, "", "kubepods.slice", POD, "cri-o");
        expect(&format!("/kubepods/besteffort/pod{POD}/{ID}"), "", "", POD, "?");
        let hash = POD.replace('-', "");
        expect(&format!("/kubepods/pod{hash}/{ID}"), "", "", &hash, "?");
        // The kubelet's own slice around them.
        let path =
            format!("/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{underscored}.slice/{scope}");
        expect(&path, "", "kubelet-kubepods.slice", POD, "containerd");
    }

    #[test]
    fn the_named_part_ends_where_a_workload_begins() {
        let pod = format!("/kubepods/burstable/pod{POD}");
        let container = format!("{pod}/{ID}");
        for (path, named) in [
            ("/", None),
            ("/system.slice", None),
            ("/made/by/hand", None),
            ("/system.slice/agent.service", Some("/system.slice/agent.service")),
            ("/system.slice/agent.service/a/b.service", Some("/system.slice/agent.service")),
            (
                "/user.slice/user-1.slice/user@1.service/app.slice/x.scope",
                Some("/user.slice/user-1.slice/user@1.service"),
            ),
            (&format!("{pod}/x"), Some(pod.as_str())),
            (&format!("{container}/x/y"), Some(container.as_str())),
        ] {
            assert_eq!(Identity::named(path), named, "{path}");
        }
    }

    #[test]
    fn what_a_workload_makes_below_itself_does_not_count() {
        expect("/system.slice/evil.service/agent.service", "evil.service", "system.slice", "", "");
        let forged = format!("/system.slice/evil.service/docker-{ID}.scope");
        expect(&forged, "evil.service", "system.slice", "", "");
        expect(
            &format!("/system.slice/evil.service/kubepods/pod{POD}/{ID}"),
            "evil.service",
            "system.slice",
            "",
            "",
        );
        let inner = ID.replace('0', "f");
        expect(&format!("/docker/{ID}/docker/{inner}"), "", "", "", "docker");
        expect(&format!("/docker/{ID}/system.slice/agent.service"), "", "", "", "docker");
        expect(
            "/user.slice/user-1.slice/user@1.service/app.slice/agent.service",
            "user@1.service",
            "user-1.slice",
            "",
            "",
        );
    }

    #[test]
    fn what_only_looks_like_a_container_or_pod_is_none() {
        expect(&format!("/made/{ID}"), "", "", "", "");
        expect(
            &format!("/system.slice/libpod-conmon-{ID}.scope"),
            &format!("libpod-conmon-{ID}.scope"),
            "system.slice",
            "",
            "",
        );
        expect("/system.slice/docker-proxy.scope", "docker-proxy.scope", "system.slice", "", "");
        expect("/podman/x", "", "", "", "");
        expect("/lxc.payload.c1/system.slice/agent.service", "", "", "", "");
        expect(&format!("/lxc.payload.c1/docker/{ID}"), "", "", "", "");
        expect(&format!("/default/kubepods/pod{POD}/{ID}"), "", "", "", "");
        expect(&format!("/kubepods/pod{POD}/kubepods/pod{}/{ID}", POD.replace('8', "9")), "", "", POD, "");
        expect(&format!("/burstable/pod{POD}/{ID}"), "", "", "", "");
        expect(&format!("/pod{POD}/{ID}"), "", "", "", "");
        expect("/my-pod8c2f.slice/x", "", "my-pod8c2f.slice", "", "");
        expect(&format!("/docker/{}", &ID[1..]), "", "", "", "");
        expect(&format!("/docker/{}", ID.to_uppercase()), "", "", "", "");
    }

    #[test]
    fn the_name_is_the_one_that_says_most() {
        let name = |path: &str| Identity::of(path).name();
        assert_eq!(name("/system.slice/agent.service").as_deref(), Some("agent.service"));
        assert_eq!(name(&format!("/docker/{ID}")).as_deref(), Some("docker/0123456789ab"));
        let pod = format!("pod/{POD}/container/0123456789ab");
        assert_eq!(name(&format!("/kubepods/pod{POD}/{ID}")), Some(pod));
        assert_eq!(name("/made/by/hand"), None);
    }
}
