# shellcheck shell=bash
# Sourced by the scripts in hack/: need_rust puts a cargo on PATH that can build this checkout.
need_rust() {
  [ ! -d "$HOME/.cargo/bin" ] || PATH=$HOME/.cargo/bin:$PATH
  if ! command -v cargo >/dev/null; then
    install_packages curl ca-certificates
    echo "${0##*/}: installing the Rust toolchain with rustup" >&2
    curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y -q --profile minimal --default-toolchain none ||
      { echo "${0##*/}: no Rust toolchain, and rustup cannot be fetched: install Rust (rust-toolchain.toml says which) and try again" >&2; return 1; }
    PATH=$HOME/.cargo/bin:$PATH
  fi
  install_packages build-essential pkg-config libseccomp-dev
}
