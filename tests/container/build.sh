#!/usr/bin/env bash
# Build the image where no registry of images can be reached: debootstrap makes the base, `make docker` does the rest.
#
#   tests/container/build.sh [NAME]        as root on Debian; NAME is localhost/imagenet-sd:test unless given
#
# Kept between runs under $CONTAINER_CACHE (/var/tmp/imagenet-sd-container): the base, and every layer. buildah builds again
# from the first layer whose input changed ("Using cache" marks the others): with an unchanged lock and Dockerfile only the
# source is copied, in seconds; else about 6 minutes and 10 GB.
set -euo pipefail
cd "$(dirname "$0")/../.."
name=${1:-localhost/imagenet-sd:test}
# shellcheck source=tests/container/storage.sh
source tests/container/storage.sh

suite=bookworm
base=localhost/imagenet-sd-base:$suite
# The base's age matters little (the Dockerfile pins what the project runs on), its presence does.
if buildah images --quiet "$base" >/dev/null 2>&1; then
  echo "container: the base image of an earlier run is used again (rm -rf $CONTAINER_CACHE for a new one)"
else
  echo "container: making the base image with debootstrap"
  rootfs=$CONTAINER_CACHE/rootfs
  rm -rf "$rootfs"
  debootstrap --variant=minbase --include=ca-certificates "$suite" "$rootfs" >"$CONTAINER_CACHE/debootstrap.log" \
    || { tail -5 "$CONTAINER_CACHE/debootstrap.log" >&2; exit 1; }
  # minbase knows only the release itself; a Debian image also has its security updates.
  printf 'deb http://deb.debian.org/debian %s main\ndeb http://deb.debian.org/debian-security %s-security main\n' \
    "$suite" "$suite" >"$rootfs/etc/apt/sources.list"
  rm -rf "$rootfs"/var/cache/apt/*.bin "$rootfs"/var/cache/apt/archives/*.deb
  container=$(buildah from scratch)
  buildah add -q "$container" "$rootfs" / >/dev/null
  buildah commit -q --rm "$container" "$base" >/dev/null
  rm -rf "$rootfs"
fi

# This machine's own certificates and pip settings (a company's mirror, a proxy's certificate) are lent to the build as
# read-only mounts: they shape the downloads, and no byte of them stays in the image.
python=python3
python3 -m pip --version >/dev/null 2>&1 || python=${VENV:-.venv}/bin/python
lent=$CONTAINER_CACHE/lent
rm -rf "$lent"; mkdir -p "$lent"
cp /etc/ssl/certs/ca-certificates.crt "$lent/ca.crt"
{ echo "[global]"
  # Files first, then $PIP_...: as for pip itself, the later one holds.
  "$python" -m pip config list \
    | awk -F= -v q="'" '/^(global|install|:env:)\./ {
        key = $1; sub(/^[^.]*\./, "", key); value = substr($0, length($1) + 2); gsub(q, "", value); gsub(/\\n/, " ", value)
        place = /^:env:/ ? 2 : 1; if (place >= rank[key]) { rank[key] = place; set[key] = value } }
        END { for (key in set) if (key != "cert") print key " = " set[key] }'
  echo "cert = /run/lent/ca.crt"; } >"$lent/pip.conf"
lend=(--volume "$lent:/run/lent:ro" --volume "$lent/pip.conf:/etc/pip.conf:ro")
while read -r path; do # local folders and files that the settings name; an index DIR/simple points to files beside it
  path=${path%/simple}
  if [ -e "$path" ]; then lend+=(--volume "$path:$path:ro"); fi
done < <(grep -v '^cert ' "$lent/pip.conf" | grep -oE "(file://)?/[^' ]+" | sed 's,^file://,,' | sort -u)
printf '%s\n' "${lend[@]}" >"$CONTAINER_CACHE/lend" # check.sh lends the same

echo "container: building $name with the storage driver $STORAGE_DRIVER"
make docker RUNTIME=buildah IMAGE="$name" ARGS="--pull-never --build-arg BASE_IMAGE=$base ${lend[*]}"
