"""The typed config: YAML and overrides in, one validated `Config` out; sweeps; DeepSpeed's JSON. Imports no torch."""
