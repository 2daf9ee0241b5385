"""Typed configuration: the schema, its composition by Hydra, its checks, DeepSpeed's dictionary."""
