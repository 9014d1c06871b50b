"""FlashAttention and the KV cache in pure Python."""
