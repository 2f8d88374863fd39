"""A card's copy and the board that boots it in QEMU, for the tests that hurt both: tests/power-cuts, tests/faults."""
import json, os, pathlib, re, select, signal, socket, subprocess, tempfile, time

ROOT = pathlib.Path(__file__).resolve().parent.parent
BOOT_PATIENCE_S = 120
ANSWER_PATIENCE_S = 120
# What the console says where the card is not as it was made.
DAMAGE = ("not mounted", "is missing", "beyond repair", "made anew", "is not on the card", "no card", "left out", "PID 1 cannot")
# A short answer, since emulation is slow; compared by its logits.
REQUEST = {"prompt": "Once upon a time", "max_tokens": 2, "temperature": 0, "logits_hash": True}

os.environ["PATH"] += ":/usr/sbin:/sbin"


class Failure(Exception):
    """What is wrong, with the console so far."""


def first_card():
    """The card of tests/image-twice."""
    cards = list((ROOT / "target/image/twice/virt").glob("*.img"))
    return str(cards[0]) if cards else None


class Card:
    """A copy of a card, changed as a person changes it on a PC."""

    def __init__(self, original, folder):
        self.path = f"{folder}/card.img"
        subprocess.run(["cp", "--sparse=always", original, self.path], check=True)
        dump = subprocess.run(["sfdisk", "--dump", original], check=True, capture_output=True, text=True).stdout
        # (start, size) in bytes.
        self.partitions = [(int(start) * 512, int(size) * 512) for start, size in re.findall(r"start= *(\d+), size= *(\d+)", dump)]
        self.folder = pathlib.Path(folder)
        self.cmdline = self.read("cmdline.txt").strip()

    def boot_partition(self):
        return ["-i", f"{self.path}@@{self.partitions[0][0]}"]

    def read(self, name):
        return subprocess.run(["mtype", *self.boot_partition(), f"::{name}"], check=True, capture_output=True, text=True).stdout

    def write(self, name, text):
        file = self.folder / "file"
        file.write_text(text)
        subprocess.run(["mcopy", "-o", *self.boot_partition(), file, f"::{name}"], check=True)

    def set_cmdline(self, words):
        """The kernel's command line as it was, and these words."""
        self.write("cmdline.txt", f"{self.cmdline} {words}\n")

    def partition(self, number):
        """A partition's bytes."""
        start, size = self.partitions[number - 1]
        with open(self.path, "rb") as disk:
            disk.seek(start)
            return bytearray(disk.read(size))

    def put_partition(self, number, data):
        with open(self.path, "r+b") as disk:
            disk.seek(self.partitions[number - 1][0])
            disk.write(data)


class Board:
    """A board that boots, and its console. `drive` says what QEMU is told of the card instead of its file."""

    def __init__(self, name, card, *options, drive=None):
        self.name, self.seen, self.all = name, b"", b""
        self.pid_file = pathlib.Path(card.folder, "qemu.pid")
        self.pid_file.unlink(missing_ok=True)
        command = [ROOT / "image/qemu", "virt", card.path, "--keep", "-pidfile", self.pid_file, *options]
        more = {"CARD_DRIVE": drive} if drive else {}
        # A session of its own, so that QEMU goes with the script that started it.
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                        start_new_session=True, env=os.environ | more)
        until = time.monotonic() + BOOT_PATIENCE_S
        # The number is written at once and whole, when the machine is there.
        while not (self.pid_file.exists() and self.pid_file.read_text().endswith("\n")):
            if self.process.poll() is not None or time.monotonic() > until:
                raise Failure(f"{name}: QEMU did not start: {self.process.stdout.read().decode(errors='replace')}")
            time.sleep(0.005)
        self.pid, self.started = int(self.pid_file.read_text()), time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait(10)
        self.process.stdin.close()
        self.process.stdout.close()

    def console(self):
        return self.all.decode(errors="replace")

    def type_in(self, text):
        try:
            self.process.stdin.write(text.encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            raise Failure(f"{self.name}: QEMU ended; the console:\n{self.console()}") from None

    def read(self, patience_s):
        """Takes what comes within that time; False: nothing."""
        if not select.select([self.process.stdout], [], [], patience_s)[0]:
            return False
        got = os.read(self.process.stdout.fileno(), 4096)
        if not got:
            raise Failure(f"{self.name}: QEMU ended by itself; the console:\n{self.console()}")
        self.seen, self.all = self.seen + got, self.all + got
        return True

    def until(self, mark, patience_s):
        """What came up to `mark` and with it."""
        mark, until = mark.encode(), time.monotonic() + patience_s
        while mark not in self.seen:
            if time.monotonic() > until:
                raise Failure(f"{self.name}: waited {patience_s} s in vain for {mark!r}; the console so far:\n{self.console()}")
            self.read(0.2)
        end = self.seen.index(mark) + len(mark)
        came, self.seen = self.seen[:end], self.seen[end:]
        return came.decode(errors="replace")

    def ready(self):
        boot = self.until("hearth: ready\r\n", BOOT_PATIENCE_S)
        if wrong := [line for line in boot.splitlines() if any(words in line for words in DAMAGE)]:
            raise Failure(f"{self.name}: {wrong}; the console:\n{self.console()}")
        self.until("> ", 10)
        return boot

    def command(self, line):
        """What the console answers to a line."""
        self.type_in(f"{line}\r")
        self.until(f"{line}\r\n", 20)
        return self.until("> ", 20).removesuffix("> ")

    def ask(self):
        """A program's answer: its last object."""
        self.type_in(json.dumps(REQUEST) + "\n")
        self.until('{"done":', ANSWER_PATIENCE_S)
        return json.loads('{"done":' + self.until("\n", 10))

    def cut(self):
        """The power fails: QEMU is gone at once. What the console had said until then."""
        os.kill(self.pid, signal.SIGKILL)
        rest = self.process.communicate(timeout=30)[0]
        self.all += rest
        return (self.seen + rest).decode(errors="replace")

    def off(self):
        """Switches it off in order."""
        self.type_in("\x03/poweroff\r")
        try:
            rest = self.process.communicate(timeout=30)[0].decode(errors="replace")
        except subprocess.TimeoutExpired:
            raise Failure(f"{self.name}: the board did not go off; the console:\n{self.console()}") from None
        if "reboot: Power down" not in rest:
            raise Failure(f"{self.name}: it did not go off in order: {rest!r}")


def logits_hash_here(hearth):
    """The same answer's logits hash, from `hearth` on this host."""
    model = subprocess.run([ROOT / "image/model"], check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/hearth.sock"
        daemon = subprocess.Popen([hearth, "serve", "--model", model, "--socket", path, "--ctx", "256", "--sequences", "1"], stderr=subprocess.PIPE)
        try:
            until = time.monotonic() + BOOT_PATIENCE_S
            while not os.path.exists(path):
                if daemon.poll() is not None or time.monotonic() > until:
                    raise Failure(f"the daemon on this host did not start: {daemon.stderr.read()!r}")
                time.sleep(0.05)
            body = json.dumps(REQUEST).encode()
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(ANSWER_PATIENCE_S)
                client.connect(path)
                client.sendall(b"POST /v1/completions HTTP/1.1\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
                reply = b"".join(iter(lambda: client.recv(65536), b""))
            return json.loads(reply.split(b"\r\n\r\n", 1)[1])["hearth"]["logits_hash"]
        finally:
            daemon.kill()
            daemon.wait()
