#!/bin/sh
# Exim and Cyrus IMAP for the tests. Their Debian packages conflict with those of Postfix and Dovecot, so they are only fetched
# (apt checks their signatures) and unpacked, with the libraries that are not installed, into a directory of this tree: nothing
# is installed, configured or removed. Without root or apt-get the tests that need them are skipped and say so.
set -eu
root=${1:-.lab}
done=$root/.unpacked-1
[ -e "$done" ] && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then
  echo "malote: Exim and Cyrus are not there (fetching them takes root and apt-get): their tests are skipped" >&2
  exit 0
fi
rm -rf "$root"
mkdir -p "$root/archives/partial" "$root/root"
echo "fetching Exim and Cyrus IMAP for the tests into $root"
fetch() { # --download-only: what apt would remove is not removed
  apt-get install -y -qq --download-only --no-install-recommends -o APT::Sandbox::User=root -o Debug::NoLocking=1 \
    -o Dir::Cache::archives="$(cd "$root/archives" && pwd)" exim4-daemon-light cyrus-imapd sasl2-bin libnss-wrapper >"$root/apt.log" 2>&1
}
fetch || { apt-get update -qq && fetch; } || {
  cat "$root/apt.log" >&2
  echo "malote: Exim and Cyrus could not be fetched" >&2
  exit 1
}
for package in "$root"/archives/*.deb; do dpkg -x "$package" "$root/root"; done
chmod u-s "$root/root/usr/sbin/exim4"    # nobody gains root from this tree; it delivers without
rm -rf "$root/archives"
touch "$done"
