# hearth: `make run` on a fresh Debian with Rust 1.95 or newer fetches what is missing, builds, and opens a chat.
ARM    := aarch64-unknown-linux-musl
AMD    := x86_64-unknown-linux-musl
HEARTH := target/release/hearth
BOARD  := virt
CARD   := target/image/hearth-$(BOARD)-$(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1).img

.DEFAULT_GOAL := help
.PHONY: help run test model build cross cross-amd64 image image-lock buildroot qemu oci bench bench-arm soak load clean

help:   ## this list
	@sed -n 's/^\([a-z0-9-]*\): *[a-z0-9 -]*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

run: build  ## fetch the default model, start the daemon, open a chat
	@image/chat $(HEARTH)

test:   ## everything that CI checks
	@tests/all

model:  ## fetch the default model where it is absent; its path is the last line
	@image/model

build:  ## target/release/hearth for this host
	@.ci/need rust cc
	cargo build --release --locked

cross:  ## target/aarch64-unknown-linux-musl/release/hearth: static, stripped
	@.ci/need rust cc binutils
	@.cargo/musl-target
	cargo build --release --locked --target $(ARM)
	@tests/static-binary target/$(ARM)/release/hearth

image: build cross  ## a card's image in target/image: make image BOARD=rpi3|zero2w|rpi4|rpi5|virt [MODEL=FILE.gguf]
	@image/build $(BOARD) "$(or $(MODEL),$$(image/model | tail -n 1))" $(HEARTH) target/$(ARM)/release/hearth target/image

buildroot:  ## the same card with a kernel of its own: make buildroot BOARD=rpi4 BUILDROOT=DIR [MODEL=FILE.gguf]
	@buildroot/build $(BOARD) "$(BUILDROOT)" "$(MODEL)"

image-lock:  ## write image/inputs.lock anew: the newest kernels and firmware that Debian has
	@image/inputs --renew

qemu:  ## boot the card that `make image` made in QEMU, its console in this terminal: make qemu BOARD=virt|rpi3|zero2w|rpi4; ^A x leaves
	@[ -f $(CARD) ] || $(MAKE) --no-print-directory image BOARD=$(BOARD)
	@image/qemu $(BOARD) $(CARD)

cross-amd64:  ## target/x86_64-unknown-linux-musl/release/hearth: the same for PCs and servers
	@.ci/need rust cc binutils
	@.cargo/musl-target x86_64
	cargo build --release --locked --target $(AMD)

oci: cross cross-amd64  ## an OCI image for arm64 and amd64 in target/oci, without Docker; image/compose.yaml runs it
	@.ci/need python
	@image/oci target/oci/hearth.tar arm64=target/$(ARM)/release/hearth amd64=target/$(AMD)/release/hearth

bench:  ## measure: make bench [MODEL=FILE] [LLAMA_BENCH="PATH…"] [BATCHED_BENCH="PATH…"] [THREADS=N] [ROUNDS=N] [DEPTH=N] [RECORD=FILE.md] [PLOT=FILE.svg]
	@$(MAKE) --no-print-directory build
	@tests/bench --hearth $(HEARTH) $(if $(MODEL),--model $(MODEL)) $(LLAMA_BENCH:%=--llama-bench %) \
	    $(BATCHED_BENCH:%=--batched-bench %) $(if $(PLOT),--plot $(PLOT)) \
	    $(if $(THREADS),--threads $(THREADS)) $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(DEPTH),--depth $(DEPTH)) $(if $(RECORD),--record $(RECORD))

bench-arm: cross  ## count instructions a token on emulated Arm cores: make bench-arm [RECORD=1]
	@tests/bench-arm $(if $(RECORD),--record)

soak: build image  ## requests of every kind against one daemon, 64 clients at once, half of them hostile, then cuts of power and failures of the board: make soak [MINUTES=N] [CUTS=N] [FAULTS=N]
	@tests/soak $(HEARTH) $(MINUTES)
	@tests/siege $(HEARTH) $$(( $(or $(MINUTES),10) * 60 ))
	@tests/faults $(HEARTH) $(CARD) $(or $(FAULTS),100)
	@tests/power-cuts $(HEARTH) $(CARD) $(or $(CUTS),1000)

load: build  ## measure many clients at once: make load [RECORD=FILE.md]
	@tests/load $(HEARTH) $(if $(RECORD),--record $(RECORD))

clean:  ## remove what was built (models stay)
	cargo clean
