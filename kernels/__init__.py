"""Pure functions on arrays, compiled by numba, each with a plain numpy oracle in :mod:`fastload.kernels.oracle`.

No file, no torch, no policy: a kernel gets arrays and fills ``out``. Machine code is made once and cached on disk;
:func:`cache_folder` says where, and what happens where that is not possible.
"""

from fastload.kernels.jit import cache_folder

__all__ = ["cache_folder"]
