"""`numbaflash demo`: a real language model whose attention runs in the service."""
