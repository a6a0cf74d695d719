# shellcheck shell=bash
# Sourced by the scripts in hack/: install_packages NAME… installs the Debian packages that are missing.
install_packages() {
  local missing=() package
  for package in "$@"; do
    [ "$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null || true)" = installed ] || missing+=("$package")
  done
  [ "${#missing[@]}" -gt 0 ] || return 0
  if [ "$(id -u)" != 0 ]; then
    echo "${0##*/}: missing Debian packages: ${missing[*]}. Run as root, or: apt-get install ${missing[*]}" >&2
    return 1
  fi
  echo "${0##*/}: installing ${missing[*]}" >&2
  # One installer at a time: scripts may run side by side.
  (
    flock 9
    export DEBIAN_FRONTEND=noninteractive
    # The list of packages may be missing or old on a fresh machine.
    apt-get install -y -q --no-install-recommends "${missing[@]}" >/dev/null 2>&1 ||
      { apt-get update -q >/dev/null && apt-get install -y -q --no-install-recommends "${missing[@]}" >/dev/null; }
  ) 9>/var/lock/hull-packages.lock
}
