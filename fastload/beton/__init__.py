"""The container: `.beton` version 2, the format of FFCV, with an index of our own in a region that FFCV ignores.

``Writer`` makes a file that FFCV's ``Loader`` opens; ``Reader`` opens ours and theirs. This room knows bytes only:
what a JPEG is, it does not care. The layout, exact to the byte, is in docs/format.md.

>>> with Reader("photos.beton") as file:
...     file.image(0).data
"""

from fastload.beton.layout import EncodedImage, Field
from fastload.beton.reader import Reader, Spans
from fastload.beton.writer import Writer

__all__ = ["EncodedImage", "Field", "Reader", "Spans", "Writer"]
