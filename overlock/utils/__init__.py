"""Helpers without any knowledge of networks: errors, files, memory, distributed runs."""
