include $(sort $(wildcard $(BR2_EXTERNAL_HEARTH_PATH)/package/*/*.mk))

# An option that the kernel's own rules overrule is dropped without a word: every line of the configuration is compared with what came
# of it before the kernel is compiled, instead of on a board that does not boot.
define HEARTH_CHECK_KERNEL_CONFIG
	$(BR2_EXTERNAL_HEARTH_PATH)/board/hearth/check-kernel-config \
		$(@D)/.config \
		$(call qstrip,$(BR2_LINUX_KERNEL_CUSTOM_CONFIG_FILE)) \
		$(call qstrip,$(BR2_LINUX_KERNEL_CONFIG_FRAGMENT_FILES))
endef
LINUX_PRE_BUILD_HOOKS += HEARTH_CHECK_KERNEL_CONFIG
