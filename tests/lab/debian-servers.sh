#!/bin/sh
# Exim and Cyrus IMAP for the tests, and promtool (of Prometheus). The Debian packages of the first two conflict with those of Postfix
# and Dovecot, and of the third only that program is wanted; so they are only fetched (apt checks their signatures) and unpacked, with
# the libraries that are not installed, into a directory of this tree: nothing is installed, configured, started or removed. Without
# root or apt-get the tests that need them are skipped and say so.
set -eu
root=${1:-.lab}
servers=$root/.unpacked-1
promtool=$root/.promtool-1
[ -e "$servers" ] && [ -e "$promtool" ] && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then
  echo "malote: Exim, Cyrus and promtool are not there (fetching them takes root and apt-get): their tests are skipped" >&2
  exit 0
fi
fetch() { # PACKAGE...: --download-only, so what apt would remove is not removed
  apt-get install -y -qq --download-only --no-install-recommends -o APT::Sandbox::User=root -o Debug::NoLocking=1 \
    -o Dir::Cache::archives="$(cd "$root/archives" && pwd)" "$@" >"$root/apt.log" 2>&1
}
get() { # PACKAGE...
  rm -rf "$root/archives"
  mkdir -p "$root/archives/partial" "$root/root"
  fetch "$@" || { apt-get update -qq && fetch "$@"; } || {
    cat "$root/apt.log" >&2
    echo "malote: $* could not be fetched" >&2
    exit 1
  }
}

if [ ! -e "$servers" ]; then
  echo "fetching Exim and Cyrus IMAP for the tests into $root"
  rm -rf "$root"
  get exim4-daemon-light cyrus-imapd sasl2-bin libnss-wrapper
  for package in "$root"/archives/*.deb; do dpkg -x "$package" "$root/root"; done
  chmod u-s "$root/root/usr/sbin/exim4"    # nobody gains root from this tree; it delivers without
  touch "$servers"
fi
if [ ! -e "$promtool" ]; then
  echo "fetching promtool for the tests into $root"
  get prometheus
  dpkg --fsys-tarfile "$root"/archives/prometheus_*.deb | tar -x -C "$root" --strip-components=3 ./usr/bin/promtool
  touch "$promtool"
fi
rm -rf "$root/archives"
