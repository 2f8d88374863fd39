################################################################################
#
# hearth
#
################################################################################

HEARTH_SITE = $(realpath $(call qstrip,$(BR2_PACKAGE_HEARTH_SOURCE)))
HEARTH_SITE_METHOD = local
HEARTH_VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' "$(HEARTH_SITE)/Cargo.toml" 2>/dev/null | head -n 1)
HEARTH_LICENSE = MIT or Apache-2.0
HEARTH_LICENSE_FILES = LICENSE-MIT LICENSE-APACHE
# legal-info would archive the whole folder, what was built in it included: the sources are the tree that this package lies in.
HEARTH_REDISTRIBUTE = NO
HOST_HEARTH_REDISTRIBUTE = NO
HEARTH_OVERRIDE_SRCDIR_RSYNC_EXCLUSIONS = --exclude=/target --exclude=/buildroot
HOST_HEARTH_OVERRIDE_SRCDIR_RSYNC_EXCLUSIONS = $(HEARTH_OVERRIDE_SRCDIR_RSYNC_EXCLUSIONS)
# `hearth pack`, for the card.
HEARTH_DEPENDENCIES = host-hearth

HEARTH_TARGET = aarch64-unknown-linux-musl
HEARTH_TARGET_ENV = CARGO_TARGET_AARCH64_UNKNOWN_LINUX_MUSL

# Rust's own linker and C library, and hearth's own profile instead of what Buildroot sets for every crate. No path of this machine
# gets into the program.
HEARTH_CARGO_ENV = \
	$(HEARTH_TARGET_ENV)_LINKER=rust-lld \
	$(HEARTH_TARGET_ENV)_RUSTFLAGS="-Crelocation-model=static --remap-path-prefix=$(@D)=hearth --remap-path-prefix=$(BR_CARGO_HOME)=cargo" \
	CARGO_PROFILE_RELEASE_CODEGEN_UNITS=1 \
	CARGO_PROFILE_RELEASE_LTO=fat \
	CARGO_PROFILE_RELEASE_OPT_LEVEL=3

# Buildroot vendors the crates of downloaded packages, not of local ones. Cargo checks each against the hash in Cargo.lock.
define HEARTH_CONFIGURE_CMDS
	cd $(@D) && $(TARGET_MAKE_ENV) $(PKG_COMMON_CARGO_ENV) \
		cargo fetch --locked --target $(HEARTH_TARGET) --target $(RUSTC_HOST_NAME)
endef

define HOST_HEARTH_CONFIGURE_CMDS
	cd $(@D) && $(HOST_MAKE_ENV) $(PKG_COMMON_CARGO_ENV) \
		cargo fetch --locked --target $(RUSTC_HOST_NAME)
endef

define HEARTH_INSTALL_TARGET_CMDS
	$(INSTALL) -D -m 0755 $(@D)/target/$(HEARTH_TARGET)/release/hearth $(TARGET_DIR)/init
endef

define HOST_HEARTH_INSTALL_CMDS
	$(INSTALL) -D -m 0755 $(@D)/target/release/hearth $(HOST_DIR)/bin/hearth
endef

# legal-info: the crates that are linked into the program, with the licence of each.
define HEARTH_LIST_CRATES
	cd $(HEARTH_DIR) && $(TARGET_MAKE_ENV) $(PKG_COMMON_CARGO_ENV) \
		cargo tree --offline --locked --edges normal --target $(HEARTH_TARGET) --prefix none --format '{p}, {l}' \
		| sed 's/ (.*),/,/; s/ (\*)$$//' | LC_ALL=C sort -u \
		>$(LICENSE_FILES_DIR_TARGET)/$(HEARTH_BASENAME)/crates.txt
endef
HEARTH_POST_LEGAL_INFO_HOOKS += HEARTH_LIST_CRATES

$(eval $(cargo-package))
$(eval $(host-cargo-package))

# The list of crates wants cargo and the crates.
hearth-legal-info: hearth-configure
