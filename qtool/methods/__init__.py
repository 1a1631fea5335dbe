"""One method, one file: see qtool.registry."""
