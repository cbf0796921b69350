"""Data: builders (YAML to data sets), data sets (what a sample is), loaders (what a batch is)."""
