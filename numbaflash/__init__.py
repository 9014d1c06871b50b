"""FlashAttention and the KV cache in pure Python: Numba kernels for CPU and GPU.

`attention` takes arrays of any library and solves one attention problem; `RingKVCache` holds the keys and values of a
sequence that grows; `attention_batch` advances many such sequences at once; `merge` joins partial results. The
quantizers make caches smaller.
"""

from importlib.metadata import version

from .api import attention, merge
from .cache.batch import attention_batch
from .cache.quantizers import AWQQuantizer, GroupQuantizer, HQQQuantizer
from .cache.ring import RingKVCache

__all__ = [
    "AWQQuantizer",
    "GroupQuantizer",
    "HQQQuantizer",
    "RingKVCache",
    "__version__",
    "attention",
    "attention_batch",
    "merge",
]

__version__ = version("numbaflash")
