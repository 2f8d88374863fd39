#!/bin/sh
# post-image.sh IMAGES BOARD: the card, from what Buildroot made in IMAGES, by the same assembly that makes one from Debian's packages.
#
# HEARTH_MODEL names the model to lay on it, a .gguf or .hearth; without it the default model is fetched.
set -eu
images=$1 board=$2
hearth=$(cd "$(dirname "$0")/../../.." && pwd)
model=${HEARTH_MODEL:-$("$hearth/image/model" | tail -n 1)}
# As the kernel itself says it.
linux=$(gzip -dc "$images/Image.gz" | grep -a -o -m 1 'Linux version [0-9][^ ]*' | head -n 1 | cut -d' ' -f3)

# Firmware goes nowhere without its notice.
for notice in "$BUILD_DIR"/rpi-firmware-*/boot/LICENCE.broadcom; do
	[ ! -f "$notice" ] || cp "$notice" "$images/rpi-firmware/"
done

# What the card's manifest says of its parts.
{
	echo "buildroot $BR2_VERSION_FULL"
	echo "linux $linux $(sha256sum <"$images/Image.gz" | cut -d' ' -f1)"
	echo "rootfs $(sha256sum <"$images/rootfs.cpio" | cut -d' ' -f1)"
} >"$images/inputs.txt"

export BUILT="$images"
exec "$hearth/image/build" "$board" "$model" "$HOST_DIR/bin/hearth" "$TARGET_DIR/init" "$images"
