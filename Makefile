# hearth: `make run` on a fresh Debian with Rust 1.95 or newer fetches what is missing, builds, and opens a chat.
ARM    := aarch64-unknown-linux-musl
HEARTH := target/release/hearth

.DEFAULT_GOAL := help
.PHONY: help run test model build cross bench bench-arm soak clean

help:   ## this list
	@sed -n 's/^\([a-z]*\): *[a-z ]*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

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

bench:  ## measure: make bench [MODEL=FILE] [LLAMA_BENCH="PATH…"] [BATCHED_BENCH="PATH…"] [THREADS=N] [ROUNDS=N] [DEPTH=N] [RECORD=FILE.md] [PLOT=FILE.svg]
	@$(MAKE) --no-print-directory build
	@tests/bench --hearth $(HEARTH) $(if $(MODEL),--model $(MODEL)) $(LLAMA_BENCH:%=--llama-bench %) \
	    $(BATCHED_BENCH:%=--batched-bench %) $(if $(PLOT),--plot $(PLOT)) \
	    $(if $(THREADS),--threads $(THREADS)) $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(DEPTH),--depth $(DEPTH)) $(if $(RECORD),--record $(RECORD))

bench-arm: cross  ## count instructions a token on emulated Arm cores: make bench-arm [RECORD=1]
	@tests/bench-arm $(if $(RECORD),--record)

soak: build  ## requests of every kind against one daemon: make soak [MINUTES=N]
	@tests/soak $(HEARTH) $(MINUTES)

clean:  ## remove what was built (models stay)
	cargo clean
