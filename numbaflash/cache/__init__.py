"""The KV cache: rings of reference-counted pages."""
