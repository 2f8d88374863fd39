"""Runs a test's script inside a virtual environment that holds what its list names, versions and hashes, and nothing else."""
import hashlib, os, pathlib, subprocess, sys

CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "hearth"


def environment(pins, script):
    """Returns inside of it; the first time it is made, in the cache folder, and `script` begins again there."""
    pins, script = pathlib.Path(pins), pathlib.Path(script).resolve()
    key = hashlib.sha256(pins.read_bytes() + sys.version.encode()).hexdigest()[:16]
    place = CACHE / f"{pins.stem}-{key}"
    if os.environ.get("HEARTH_PINNED") == key:
        return
    if not (place / "whole").exists():
        # Without ensurepip, which Debian keeps in a package of its own: pip installs into the environment from outside.
        subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", place], check=True)
        pip = [sys.executable, "-m", "pip", "--python", place / "bin/python", "install", "--quiet", "--only-binary=:all:"]
        subprocess.run([*pip, "--no-deps", "--require-hashes", "-r", pins], check=True)
        (place / "whole").touch()
    os.execve(place / "bin/python", [place / "bin/python", script, *sys.argv[1:]], os.environ | {"HEARTH_PINNED": key})
