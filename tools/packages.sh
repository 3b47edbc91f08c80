#!/bin/sh
# Install the Debian packages named in bindep.txt that are missing. No daemon
# of theirs is started: the lab starts its own.
set -eu
cd "$(dirname "$0")/.."

missing=
for package in $(sed -n 's/^\([a-z0-9.+-]*\) \[platform:dpkg\].*/\1/p' \
        bindep.txt); do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null |
        grep -q '^install ok installed' || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

echo "Installing Debian packages:$missing"
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' > "$policy"
    chmod +x "$policy"
fi
export DEBIAN_FRONTEND=noninteractive
apt-get -qq update
# shellcheck disable=SC2086
apt-get -qq install --yes --no-install-recommends $missing > /dev/null
