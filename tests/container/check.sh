#!/usr/bin/env bash
# Build the image and use it as its users do: as an ordinary user, with the source read-only and no network.
#
#   tests/container/check.sh               as root on Debian with buildah, debootstrap and iproute2
set -euo pipefail
cd "$(dirname "$0")/../.."
for program in buildah debootstrap unshare ip; do
  command -v "$program" >/dev/null || { echo "container: no $program; apt install buildah debootstrap iproute2" >&2; exit 2; }
done
# shellcheck source=tests/container/storage.sh
source tests/container/storage.sh
exec 9>"$CONTAINER_CACHE/lock"
flock 9 # one check at a time: they share the layers
buildah rm --all >/dev/null 2>&1 || true # containers of a check that was killed

name=localhost/imagenet-sd:test
containers=()
finish() {
  for container in "${containers[@]}"; do buildah rm "$container" >/dev/null || true; done
  rm -rf "${results:-}"
}
trap finish EXIT
started=$SECONDS
step() { echo "container: [$((SECONDS - started)) s] $*"; }

commit=$(git rev-parse HEAD 2>/dev/null || echo unknown)
tests/container/build.sh "$name" 9>&-
step "built; the cache holds $(du -sh "$CONTAINER_CACHE" 2>/dev/null | cut -f1)"
buildah rmi --prune >/dev/null 2>&1 || true # layers of earlier sources

# ===== what the image says of itself =====
setting() { buildah inspect --type image --format "$1" "$name"; }
expect() { [[ "$2" == $3 ]] || { echo "container: $1 is '$2', not '$3'" >&2; exit 1; }; }
expect user "$(setting '{{.OCIv1.Config.User}}')" 1000
expect volumes "$(setting '{{.OCIv1.Config.Volumes}}')" '*/app/data*/app/runs*/cache*'
expect labels "$(setting '{{.OCIv1.Config.Labels}}')" "*image.revision:$commit*"
expect environment "$(setting '{{.OCIv1.Config.Env}}')" '*NVIDIA_VISIBLE_DEVICES=all*'
expect "what it was built with" "$(setting '{{.History}}' | grep -c run/lent || true)" 0
start=$(setting '{{range .OCIv1.Config.Entrypoint}}{{.}} {{end}}{{range .OCIv1.Config.Cmd}}{{.}} {{end}}')

# ===== running =====
# The folders a user would mount. No network: a namespace of its own, with nothing but the loopback that DDP's ranks use.
results=$(mktemp -d)
install -d -m 1777 "$results"/{data,runs,cache}
offline() { # offline CONTAINER COMMAND...; OPTIONS are buildah's
  local container=$1; shift
  # shellcheck disable=SC2016 # $@ is the inner shell's
  unshare --net bash -c 'ip link set lo up; exec "$@"' - \
    buildah run "${OPTIONS[@]}" --volume "$results/data:/app/data" --volume "$results/runs:/app/runs" \
    --volume "$results/cache:/cache" "$container" -- "$@"
}
OPTIONS=()
container=$(buildah from --pull-never "$name"); containers+=("$container")
# buildah may mount the image's own volumes over those of the command line; docker and podman prefer the latter.
buildah config --volume /app/data- --volume /app/runs- --volume /cache- "$container"

step "docker run imagenet-sd: $start"
# shellcheck disable=SC2086 # words of the entry point
shown=$(offline "$container" $start 2>"$results/tini.log") # tini minds that a chroot has no PID 1
expect "the default command's output" "$shown" '*usage: make TARGET*'

expect "the user" "$(offline "$container" id -un)" app
offline "$container" bash -c 'for place in /app /app/train.py /app/utils /opt/venv; do
    [ ! -w "$place" ] || { echo "container: $place can be written by the user" >&2; exit 1; }; done
  [ ! -e /run/lent/pip.conf ] && [ ! -s /etc/pip.conf ] || { echo "container: settings of the build stayed" >&2; exit 1; }
  ! (exec 3<>/dev/tcp/1.1.1.1/53) 2>/dev/null || { echo "container: there is a network" >&2; exit 1; }'
step "any user id (docker run --user, Apptainer)"
OPTIONS=(--user 4242:4242)
offline "$container" python generate.py --classes 100 --out data/none --dry-run >/dev/null
OPTIONS=()

step "make demo, in its smallest setting"
# 7 images of 10 classes are the fewest that fill a batch of 64.
offline "$container" make demo IMAGES_PER_CLASS=7 SEEDS=0 >"$results/demo.log" 2>&1 || { tail -30 "$results/demo.log" >&2; exit 1; }
test -s "$results/runs/demo/report.html" || { echo "container: make demo left no report" >&2; exit 1; }
expect "the owner of the results" "$(stat -c %u "$results/runs/demo/report.html")" 1000
tail -1 "$results/demo.log"

# The tests need pytest and its like, which the image does not have: they are added in a throw-away container.
step "the unit tests"
mapfile -t lend < "$CONTAINER_CACHE/lend"
buildah run --user root "${lend[@]}" "$container" -- \
  /opt/venv/bin/pip install -q --no-cache-dir --disable-pip-version-check --no-deps --require-hashes -r requirements-dev.lock
offline "$container" python -m pytest -p no:cacheprovider -n 2 -q -m "not slurm and not browser" tests
step "done"
