# shellcheck shell=bash
# Sourced by the scripts in hack/: need_rust puts a cargo on PATH that can build this checkout.
need_rust() {
  local checkout
  checkout=$(cd "${BASH_SOURCE[0]%/*}/../.." && pwd)
  [ ! -d "$HOME/.cargo/bin" ] || PATH=$HOME/.cargo/bin:$PATH
  # Debian's own cargo is too old, and does not know rust-toolchain.toml: rustup's is wanted.
  if ! command -v rustup >/dev/null && ! cargo_is_new_enough; then
    install_packages curl ca-certificates
    echo "${0##*/}: installing Rust with rustup in ${CARGO_HOME:-$HOME/.cargo}" >&2
    curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y -q --no-modify-path --profile minimal --default-toolchain none || {
      echo "${0##*/}: rustup cannot be fetched: install Rust $(wanted_rust) or newer, put cargo on PATH, and try again" >&2
      return 1
    }
    PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH
  fi
  if command -v rustup >/dev/null && ! (cd "$checkout" && cargo --version >/dev/null 2>&1); then
    echo "${0##*/}: installing the toolchain of rust-toolchain.toml" >&2
    (cd "$checkout" && rustup toolchain install "$(wanted_rust)" --profile minimal --component clippy,rustfmt)
  fi
  install_packages build-essential pkg-config libseccomp-dev
}

# The version that rust-toolchain.toml names.
wanted_rust() { sed -n 's/^channel = "\(.*\)"$/\1/p' "${BASH_SOURCE[0]%/*}/../../rust-toolchain.toml"; }

# Is there a cargo as new as the one that rust-toolchain.toml names?
cargo_is_new_enough() {
  local version
  version=$(cargo --version 2>/dev/null | cut -d' ' -f2) || return 1
  [ -n "$version" ] && printf '%s\n%s\n' "$(wanted_rust)" "$version" | sort -CV
}
