#!/bin/sh
# post-fakeroot.sh TARGET: what gets into the initramfs, as a list. Whatever else Buildroot and its packages leave in TARGET goes, so that
# no option set by mistake brings a shell onto the card; what is missing ends the build.
set -eu
cd "$1"

mount_points="boot dev model proc run state sys"
files="init dev/console dev/null"

for folder in $mount_points; do mkdir -p "$folder"; done
find . -mindepth 1 -depth | sed 's|^\./||' | while read -r path; do
	case " $mount_points $files " in
		*" $path "*) ;;
		*)
			if [ -d "$path" ] && [ ! -L "$path" ]; then rmdir "$path"; else rm "$path"; fi
			;;
	esac
done
chmod 755 . init
for folder in $mount_points; do chmod 755 "$folder"; done

for file in $files; do
	[ -e "$file" ] || { echo "post-fakeroot: /$file is missing" >&2; exit 1; }
done
if [ -L init ] || [ ! -f init ]; then
	echo "post-fakeroot: /init is no program" >&2
	exit 1
fi
