# shellcheck shell=bash
# Sourced by the scripts in hack/: a docker-registry on loopback, and an image made from busybox-static.

# start_registry DIRECTORY: sets registry (host:port) and registry_pid. The caller ends it by that pid.
start_registry() {
  local port
  for port in $(shuf -i 20000-60000 -n 20); do
    ss -Hltn "sport = :$port" | grep -q . || break
  done
  registry=127.0.0.1:$port
  cat >"$1/registry.yml" <<CONFIG
version: 0.1
log: {level: error}
storage: {filesystem: {rootdirectory: $1/registry}}
http: {addr: $registry}
CONFIG
  # In a session of its own: Ctrl-C is for the caller.
  setsid docker-registry serve "$1/registry.yml" >"$1/registry.log" 2>&1 &
  # shellcheck disable=SC2034  # for the caller
  registry_pid=$!

  for _ in $(seq 100); do
    ! curl -sf "http://$registry/v2/" >/dev/null || return 0
    sleep 0.1
  done
  echo "${0##*/}: docker-registry does not answer; see $1/registry.log" >&2
  return 1
}

# push_blob NAME FILE
push_blob() {
  local location digest
  digest=sha256:$(sha256sum "$2" | cut -d' ' -f1)
  location=$(curl -sfi -X POST "http://$registry/v2/$1/blobs/uploads/" | tr -d '\r' | sed -n 's/^[Ll]ocation: //p')
  case $location in /*) location=http://$registry$location ;; esac
  case $location in *\?*) location+="&digest=$digest" ;; *) location+="?digest=$digest" ;; esac
  curl -sf -X PUT -H "Content-Type: application/octet-stream" --data-binary @"$2" "$location"
}

# push_image NAME TAG CONFIG-JSON TAR…: gzips the tars into layers and pushes them, the lowest first.
push_image() {
  local name=$1 tag=$2 config=$3 tar layers="" ids="" work
  shift 3
  work=$(mktemp -d)
  for tar in "$@"; do
    gzip -1 -n -c "$tar" >"$work/layer"
    push_blob "$name" "$work/layer"
    ids+="${ids:+,}\"sha256:$(sha256sum "$tar" | cut -d' ' -f1)\""
    layers+="${layers:+,}{\"mediaType\":\"application/vnd.oci.image.layer.v1.tar+gzip\",\"digest\":\"sha256:$(sha256sum "$work/layer" | cut -d' ' -f1)\",\"size\":$(stat -c %s "$work/layer")}"
  done
  printf '{"architecture":"amd64","os":"linux","config":%s,"rootfs":{"type":"layers","diff_ids":[%s]}}' "$config" "$ids" >"$work/config"
  push_blob "$name" "$work/config"
  printf '{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:%s","size":%s},"layers":[%s]}' \
    "$(sha256sum "$work/config" | cut -d' ' -f1)" "$(stat -c %s "$work/config")" "$layers" >"$work/manifest"
  curl -sf -X PUT -H "Content-Type: application/vnd.oci.image.manifest.v1+json" --data-binary @"$work/manifest" \
    "http://$registry/v2/$name/manifests/$tag"
  rm -r "$work"
}

# busybox_tar FILE: busybox with all its applets, and a passwd file.
busybox_tar() {
  local root applet
  root=$(mktemp -d)
  mkdir -p "$root"/{bin,etc,tmp,root}
  cp /bin/busybox "$root/bin/busybox"
  for applet in $(/bin/busybox --list); do [ "$applet" = busybox ] || ln -s busybox "$root/bin/$applet"; done
  echo 'root:x:0:0:root:/root:/bin/sh' >"$root/etc/passwd"
  echo 'root:x:0:' >"$root/etc/group"
  chmod 755 "$root"
  chmod 1777 "$root/tmp"
  tar --owner=0 --group=0 --numeric-owner -C "$root" -cf "$1" .
  rm -r "$root"
}
