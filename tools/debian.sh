#!/bin/sh
# What the tests need besides Python: the font that the emoji are drawn with, and a browser for the report.
# On Debian and Ubuntu, installs what is missing; elsewhere, says so.
set -eu
missing=
python3 -c 'import ensurepip' 2>/dev/null || missing="$missing python3-venv"
{ fc-list 2>/dev/null || find /usr/share/fonts /usr/local/share/fonts -type f 2>/dev/null; } |
  grep -qi 'NotoColorEmoji' || missing="$missing fonts-noto-color-emoji"
for b in chromium chromium-browser google-chrome; do command -v "$b" >/dev/null && break; done || missing="$missing chromium"
[ -n "$missing" ] || exit 0
if ! command -v apt-get >/dev/null; then
  echo "please install what these Debian packages hold:$missing" >&2
  exit 0
fi
root=
[ "$(id -u)" = 0 ] || root=sudo
$root apt-get update -qq
# shellcheck disable=SC2086
$root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing
