"""The check of a device, without one."""
