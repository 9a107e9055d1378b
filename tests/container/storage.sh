# Sourced by build.sh and check.sh: images, layers and temporary files live apart from the machine's own containers, so
# that neither sees the other and a clean-up is one `rm -rf`.
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

export CONTAINERS_STORAGE_CONF=$CONTAINER_CACHE/storage.conf
printf '[storage]\ndriver = "%s"\ngraphroot = "%s/storage"\nrunroot = "%s/run"\n' \
  "$STORAGE_DRIVER" "$CONTAINER_CACHE" "$CONTAINER_CACHE" >"$CONTAINERS_STORAGE_CONF"
# Neither a container engine nor user namespaces are needed: a chroot will do.
export BUILDAH_ISOLATION=chroot
