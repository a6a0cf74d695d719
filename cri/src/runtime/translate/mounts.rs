//! CRI's mounts, and the image's VOLUMEs that no mount covers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use hull_agent::protocol::messages::{self, Propagation, mount};

use super::invalid;
use super::user_namespace::{self, Mapping};
use crate::api::runtime::{Mount, MountPropagation};
use crate::runtime::Error;
use crate::sandbox::{HostTree, Source};
use crate::store::record::ImageVolume;

/// Options of CRI's `mount_options` that a bind mount can have.
const OPTIONS: [&str; 4] = ["nosuid", "nodev", "noexec", "noatime"];

/// Bytes of a sub path (PATH_MAX).
const MAX_SUB_PATH: usize = 4095;

/// What a container has beside its root, as far as its mounts are concerned.
#[derive(Clone, Copy, Debug)]
pub struct Own<'a> {
    /// The container's directory below hull's root.
    pub directory: &'a Path,
    /// Directories of the image's VOLUMEs: path in the container → name below `directory`.
    pub volumes: &'a BTreeMap<String, String>,
    /// The images that its mounts name.
    pub images: &'a [ImageVolume],
    /// What its pod's user namespace maps, if it has one.
    pub mapping: Option<&'a Mapping>,
    /// SELinux label of what is mounted for the container; empty: none.
    pub label: &'a str,
}

/// A mount without its source, and what that is.
type Wanted = (messages::Mount, Wants);

enum Wants {
    One(Source),
    /// An image: its layers, the uppermost first, and what of it is mounted.
    Image(Vec<Source>, String),
}

/// Mounts in the order in which they are made, each source appended to `sources` as its slot.
pub fn mounts(cri: &[Mount], own: Own<'_>, sources: &mut Vec<Source>) -> Result<Vec<messages::Mount>, Error> {
    let mut mounts: Vec<Wanted> = Vec::with_capacity(cri.len() + own.volumes.len());
    for mount in cri {
        mounts.push(match &mount.image {
            Some(_) => {
                let of_mount = |volume: &&ImageVolume| volume.container_path == mount.container_path;
                image_mount(mount, own.mapping, own.images.iter().find(of_mount))?
            }
            None => host_mount(mount, own.mapping, own.label)?,
        });
    }
    for (path, name) in uncovered(own.volumes, cri)? {
        let idmapped = own.mapping.is_some();
        let made = messages::Mount { destination: path, idmapped, ..Default::default() };
        mounts.push((made, Wants::One(Source::Own(own.directory.join(name)))));
    }
    // A mount below another one comes after it, whatever the order of the request.
    mounts.sort_by_key(|(mount, _)| mount.destination.split('/').filter(|part| !part.is_empty()).count());
    let mut slot = |source| {
        sources.push(source);
        sources.len() as u32 - 1
    };
    let with_slots = |(mut mount, wants): Wanted| {
        mount.source = Some(match wants {
            Wants::One(source) => mount::Source::Slot(slot(source)),
            Wants::Image(layers, sub_path) => {
                let layers = layers.into_iter().map(&mut slot).collect();
                mount::Source::Image(messages::ImageVolume { layers, sub_path })
            }
        });
        mount
    };
    Ok(mounts.into_iter().map(with_slots).collect())
}

/// The mounts of a request with those that CDI devices bring, which replace what is asked for at the same path.
pub fn with_devices(cri: &[Mount], of_devices: &[Mount]) -> Vec<Mount> {
    let kept = cri.iter().filter(|mount| {
        destination(&mount.container_path).map_or(true, |path| !is_mounted(of_devices, &path))
    });
    kept.chain(of_devices).cloned().collect()
}

/// KEP-4639: an image, or a part of it, read-only.
fn image_mount(cri: &Mount, pod: Option<&Mapping>, volume: Option<&ImageVolume>) -> Result<Wanted, Error> {
    let destination = destination(&cri.container_path)?;
    let refuse = |reason: &str| Err(invalid(format!("the image volume at {destination} {reason}")));
    // kubelet gives every mount of a pod with a user namespace the pod's mappings; images always have them.
    if let Err(reason) = user_namespace::of_mount(&cri.uid_mappings, &cri.gid_mappings, pod) {
        return refuse(&reason);
    }
    if !cri.host_path.is_empty() {
        return refuse("has a host path as well");
    }
    if !cri.readonly {
        return refuse("is not read-only; images cannot be written to");
    }
    if cri.propagation != i32::from(MountPropagation::PropagationPrivate) {
        return refuse("needs private propagation");
    }
    if cri.image_sub_path.contains('\0') || cri.image_sub_path.len() > MAX_SUB_PATH {
        return refuse("has a sub path that no path can be");
    }
    if let Err(reason) = check_options(cri) {
        return refuse(&reason);
    }
    let volume = volume.ok_or_else(|| {
        Error::Internal(format!("the image of the volume at {destination} is not in the record"))
    })?;
    let layer = |id: &String| {
        let id = id.parse().map_err(|_| Error::Internal(format!("{id:?} in a record is not a layer")))?;
        Ok(Source::Layer(id))
    };
    let layers = volume.layers.iter().rev().map(layer).collect::<Result<_, Error>>()?;
    let mount = messages::Mount {
        readonly: true,
        recursive_readonly: cri.recursive_read_only,
        options: cri.mount_options.clone(),
        destination,
        ..Default::default()
    };
    Ok((mount, Wants::Image(layers, cri.image_sub_path.clone())))
}

fn check_options(cri: &Mount) -> Result<(), String> {
    match cri.mount_options.iter().find(|option| !OPTIONS.contains(&option.as_str())) {
        Some(option) => Err(format!("has the option {option:?}; hull knows {}", OPTIONS.join(", "))),
        None => Ok(()),
    }
}

fn host_mount(cri: &Mount, pod: Option<&Mapping>, label: &str) -> Result<Wanted, Error> {
    let destination = destination(&cri.container_path)?;
    let refuse = |reason: &str| Err(invalid(format!("the mount at {destination} {reason}")));
    if !cri.image_sub_path.is_empty() {
        return refuse("has an image's sub path, but no image");
    }
    let idmapped = match user_namespace::of_mount(&cri.uid_mappings, &cri.gid_mappings, pod) {
        Ok(idmapped) => idmapped,
        Err(reason) => return refuse(&reason),
    };
    if !cri.host_path.starts_with('/') || cri.host_path.contains('\0') {
        return refuse(&format!("has the host path {:?}, which is not absolute", cri.host_path));
    }
    let propagation = match MountPropagation::try_from(cri.propagation) {
        Ok(MountPropagation::PropagationPrivate) => Propagation::Private,
        Ok(MountPropagation::PropagationHostToContainer) => Propagation::HostToContainer,
        Ok(MountPropagation::PropagationBidirectional) => Propagation::Bidirectional,
        Err(_) => return refuse(&format!("has the unknown propagation {}", cri.propagation)),
    };
    if pod.is_some() && propagation == Propagation::Bidirectional {
        return refuse("has Bidirectional propagation, which is not possible out of a user namespace");
    }
    // KEP-3857: what these conditions allow is exactly what can be promised to be read-only.
    if cri.recursive_read_only && !cri.readonly {
        return refuse("is recursive_read_only without being readonly");
    }
    if cri.recursive_read_only && propagation != Propagation::Private {
        return refuse("is recursive_read_only, which needs private propagation");
    }
    if let Err(reason) = check_options(cri) {
        return refuse(&reason);
    }
    let mount = messages::Mount {
        destination,
        readonly: cri.readonly,
        recursive_readonly: cri.recursive_read_only,
        propagation: propagation.into(),
        options: cri.mount_options.clone(),
        idmapped,
        source: None,
    };
    let label = (cri.selinux_relabel && !label.is_empty()).then(|| label.to_owned());
    let tree = HostTree { path: PathBuf::from(&cri.host_path), propagation, label };
    Ok((mount, Wants::One(Source::Tree(tree))))
}

/// A path inside the container: absolute, without `..`; a relative one is taken from the root, as kubelet means it.
fn destination(path: &str) -> Result<String, Error> {
    if path.is_empty() || path.contains('\0') {
        return Err(invalid(format!("{path:?} cannot be the container path of a mount")));
    }
    let mut parts = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => return Err(invalid(format!("the container path {path:?} of a mount contains \"..\""))),
            part => parts.push(part),
        }
    }
    if parts.is_empty() {
        return Err(invalid("a mount cannot cover the container's root"));
    }
    Ok(format!("/{}", parts.join("/")))
}

/// True if a mount covers this very path.
pub fn is_mounted(cri: &[Mount], path: &str) -> bool {
    cri.iter().any(|mount| destination(&mount.container_path).is_ok_and(|mounted| mounted == path))
}

fn uncovered(volumes: &BTreeMap<String, String>, cri: &[Mount]) -> Result<Vec<(String, String)>, Error> {
    let uncovered = volumes.iter().filter(|(path, _)| !is_mounted(cri, path));
    Ok(uncovered.map(|(path, name)| (path.clone(), name.clone())).collect())
}

/// The image's VOLUMEs that get a directory of the container's own: path inside the container → name of the directory
/// below the container's. The image's path never becomes part of a host path (containerd CVE-2022-23648).
pub fn volumes(image: &[String], cri: &[Mount]) -> Result<BTreeMap<String, String>, Error> {
    let mut volumes = BTreeMap::new();
    for path in image {
        let path = destination(path).map_err(|error| invalid(format!("the image's VOLUME: {error}")))?;
        if !is_mounted(cri, &path) {
            let name = format!("volume-{}", volumes.len());
            volumes.entry(path).or_insert(name);
        }
    }
    Ok(volumes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::runtime::{IdMapping, ImageSpec};

    fn mount(container: &str, host: &str) -> Mount {
        Mount { container_path: container.into(), host_path: host.into(), ..Default::default() }
    }

    fn translate(cri: &[Mount]) -> Result<(Vec<messages::Mount>, Vec<Source>), Error> {
        let mut sources = vec![Source::Own("/writable".into())];
        let mounts = mounts(cri, own(&[]), &mut sources)?;
        Ok((mounts, sources))
    }

    fn own(images: &[ImageVolume]) -> Own<'_> {
        static NONE: BTreeMap<String, String> = BTreeMap::new();
        Own { directory: Path::new("/own"), volumes: &NONE, images, mapping: None, label: "" }
    }

    #[test]
    fn an_image_becomes_its_layers_the_uppermost_first() {
        let layer = |digit: &str| format!("sha256:{}", digit.repeat(64));
        let volume = ImageVolume {
            container_path: "/image".into(),
            layers: vec![layer("a"), layer("b")],
            ..Default::default()
        };
        let image = Mount {
            image: Some(ImageSpec { image: "x".into(), ..Default::default() }),
            image_sub_path: "etc".into(),
            readonly: true,
            ..mount("/image", "")
        };
        let mut sources = Vec::new();
        let made =
            mounts(&[mount("/a", "/b"), image.clone()], own(std::slice::from_ref(&volume)), &mut sources);
        let made = made.unwrap();
        let expected = messages::ImageVolume { layers: vec![1, 2], sub_path: "etc".into() };
        assert_eq!(made[1].source, Some(mount::Source::Image(expected)));
        assert!(made[1].readonly);
        assert_eq!(sources[1], Source::Layer(layer("b").parse().unwrap()));
        for image in [
            Mount { readonly: false, ..image.clone() },
            Mount { host_path: "/x".into(), ..image.clone() },
            Mount { propagation: MountPropagation::PropagationHostToContainer.into(), ..image.clone() },
            Mount { image_sub_path: "a\0b".into(), ..image.clone() },
            Mount { mount_options: vec!["rw".into()], ..image.clone() },
            Mount { image: None, ..image },
        ] {
            let refused =
                mounts(std::slice::from_ref(&image), own(std::slice::from_ref(&volume)), &mut Vec::new());
            assert!(matches!(refused, Err(Error::Invalid(_))), "{image:?}");
        }
    }

    #[test]
    fn parents_are_mounted_before_what_lies_below_them() {
        let cri = [mount("/a/b/c", "/1"), mount("/a", "/2"), mount("x/y", "/3")];
        let (mounts, sources) = translate(&cri).unwrap();
        let order: Vec<_> = mounts.iter().map(|mount| mount.destination.as_str()).collect();
        assert_eq!(order, ["/a", "/x/y", "/a/b/c"]);
        assert_eq!(mounts[0].source, Some(mount::Source::Slot(1)));
        let tree = HostTree { path: "/2".into(), propagation: Propagation::Private, label: None };
        assert_eq!(sources[1], Source::Tree(tree));
    }

    #[test]
    fn recursive_read_only_is_refused_where_it_cannot_be_promised() {
        let recursive = Mount { recursive_read_only: true, ..mount("/a", "/b") };
        assert!(translate(std::slice::from_ref(&recursive)).is_err());
        let readonly = Mount { readonly: true, ..recursive };
        assert!(translate(std::slice::from_ref(&readonly)).unwrap().0[0].recursive_readonly);
        let shared = Mount { propagation: MountPropagation::PropagationHostToContainer.into(), ..readonly };
        assert!(translate(&[shared]).is_err());
    }

    #[test]
    fn what_cannot_be_done_is_refused_clearly() {
        let mapping = IdMapping { host_id: 1, container_id: 0, length: 1 };
        for cri in [
            mount("", "/b"),
            mount("/", "/b"),
            mount("/../etc", "/b"),
            mount("/a", "b"),
            mount("/a", ""),
            Mount { image: Some(ImageSpec::default()), ..mount("/a", "") },
            Mount { uid_mappings: vec![mapping], ..mount("/a", "/b") },
            Mount { mount_options: vec!["suid".into()], ..mount("/a", "/b") },
            Mount { propagation: 9, ..mount("/a", "/b") },
        ] {
            assert!(translate(std::slice::from_ref(&cri)).is_err(), "{cri:?}");
        }
    }

    #[test]
    fn an_images_volume_gets_a_directory_whose_name_is_ours() {
        let image = ["/data".to_owned(), "/etc/../../etc".to_owned()];
        assert!(volumes(&image, &[]).is_err());
        let image = ["/data".to_owned(), "/cache/".to_owned(), "/data/".to_owned(), "/host".to_owned()];
        let found = volumes(&image, &[mount("/host/", "/somewhere")]).unwrap();
        let expected = [("/cache", "volume-1"), ("/data", "volume-0")];
        assert_eq!(found, expected.map(|(path, name)| (path.to_owned(), name.to_owned())).into());
    }
}
