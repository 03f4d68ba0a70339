#!/bin/sh
# Installs the Debian packages that the tests, the demo and the benchmarks run for real, where they are missing.
# It leaves what is there alone: no configuration of an installed Postfix or Dovecot is read or written, and servers that are
# installed here are neither started nor enabled, since the tests start their own on ports of their own.
set -eu
python=${1:-python3}

missing=
need() { # COMMAND PACKAGE
  PATH="$PATH:/usr/sbin:/sbin" command -v "$1" >/dev/null 2>&1 || missing="$missing $2"
}
need postfix postfix
need dovecot dovecot-imapd
[ -x /usr/lib/dovecot/imap ] || missing="$missing dovecot-imapd"
[ -x /usr/lib/dovecot/lmtp ] || missing="$missing dovecot-lmtpd"
need swaks swaks
need msmtp msmtp
need mbsync isync
ls /usr/lib/*/sasl2/libplain.so* >/dev/null 2>&1 || missing="$missing libsasl2-modules"    # how mbsync logs in
need neomutt neomutt
[ -x /bin/kill ] || missing="$missing procps"   # ExecReload= of the units
need curl curl
[ -n "$(ls -d /usr/lib/postgresql/*/bin/postgres 2>/dev/null)" ] || missing="$missing postgresql"
need haproxy haproxy
need openssl openssl
need systemd-analyze systemd
[ -e /etc/ssl/certs/ca-certificates.crt ] || missing="$missing ca-certificates"
"$python" -c 'import ensurepip, venv' 2>/dev/null || missing="$missing python3-venv"
[ -z "$missing" ] && exit 0

missing=$(printf '%s\n' $missing | sort -u | tr '\n' ' ')
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then
  echo "malote: these Debian packages are missing: $missing" >&2
  echo "malote: nothing was installed; as root: apt-get install --no-install-recommends $missing" >&2
  exit 1
fi

echo "installing Debian packages: $missing"
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then     # 101: do not start services while packages are installed
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod 755 "$policy"
  trap 'rm -f "$policy"' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
case " $missing " in *" postfix "*)
  echo "postfix postfix/main_mailer_type select No configuration" | debconf-set-selections 2>/dev/null || true ;;
esac
apt-get update -qq
apt-get install -y -qq --no-install-recommends $missing >/dev/null
for unit in postfix dovecot postgresql; do
  case " $missing " in *" $unit"*)
    if command -v systemctl >/dev/null 2>&1; then systemctl disable --quiet "$unit" 2>/dev/null || true; fi ;;
  esac
done
