"""flash-attn 2.8.3's forward functions under their own names: `import numbaflash.flash_attn as flash_attn`.

Names, order of arguments, defaults and meanings are flash-attn's (https://github.com/Dao-AILab/flash-attention); where
they differ from `numbaflash.attention`, as in -1 for an unbounded window or an empty row's LSE of +inf, flash-attn's
hold. Arrays may be of any library; no compiler and no GPU are needed. There is no backward pass and no dropout.
"""

from .dense import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func
from .kvcache import flash_attn_with_kvcache
from .varlen import flash_attn_varlen_func, flash_attn_varlen_kvpacked_func, flash_attn_varlen_qkvpacked_func

__all__ = [
    "__version__",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

__version__ = "2.8.3"  # of flash-attn: the version whose functions these are, which callers compare with
