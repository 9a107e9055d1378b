# Sourced by build.sh and check.sh: where images live, and with which storage driver.
# Names of images, layers and temporary files stay apart from the machine's own containers, so that a clean-up is one rm -rf.
export CONTAINER_CACHE=${CONTAINER_CACHE:-/var/tmp/imagenet-sd-container}
mkdir -p "$CONTAINER_CACHE/tmp"
export TMPDIR=$CONTAINER_CACHE/tmp

# overlay shares the 8 GB of wheels between layers and containers; vfs, which works everywhere, copies them for each.
storage_driver() {
  local probe
  probe=$(mktemp -d)
  mkdir "$probe"/{lower,upper,work,merged}
  if mount -t overlay overlay -o "lowerdir=$probe/lower,upperdir=$probe/upper,workdir=$probe/work" "$probe/merged" 2>/dev/null
  then
    umount "$probe/merged"
    echo overlay
  else
    echo vfs
  fi
  rm -rf "$probe"
}
STORAGE_DRIVER=${STORAGE_DRIVER:-$(storage_driver)}
export STORAGE_DRIVER

buildah() {
  command buildah --root "$CONTAINER_CACHE/storage" --runroot "$CONTAINER_CACHE/run" "$@"
}
