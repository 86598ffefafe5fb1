"""Measuring: ``bench`` and ``model`` answer a user's question, ``compare`` measures peers, ``harness`` keeps all fair.

Only the public API of fastload is used here, so what is measured is what users get. The trade-off: stages inside the engine are
not timed apart.

>>> fastload.bench("photos.beton", "resnet18").verdict.sentence
"""
