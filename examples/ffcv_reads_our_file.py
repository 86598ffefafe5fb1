"""FFCV's own Loader reads a file that fastload wrote: the same container, in both directions.

    python examples/ffcv_reads_our_file.py photos.beton

Needs FFCV, which installs from source only: apt install libopencv-dev libturbojpeg0-dev pkg-config, then
pip install 'fastload[ffcv]'.
"""

import argparse

import numpy as np
from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder
from ffcv.loader import Loader, OrderOption

import fastload


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64)
    args = parser.parse_args()

    ours = fastload.open(args.data)
    theirs = Loader(
        args.data,
        batch_size=args.batch_size,
        num_workers=2,
        order=OrderOption.SEQUENTIAL,
        drop_last=False,
        pipelines={
            "image": [CenterCropRGBImageDecoder((args.size, args.size), ratio=1.0)],
            "label": [IntDecoder()],
            # Fields that are not named here are read with FFCV's defaults; None leaves a field out.
            **{name: None for name in ours.fields if name not in ("image", "label")},
        },
    )
    labels, means = [], []
    for images, batch_labels in theirs:
        labels.append(np.array(batch_labels).reshape(-1))  # FFCV reuses its buffers: keep copies
        means.append(np.array(images, dtype=np.float64).mean(axis=(1, 2)))
    same = np.array_equal(np.concatenate(labels), ours.labels)
    print(
        f"{len(ours)} images, labels equal: {same}, mean colour {np.concatenate(means).mean(axis=0).round(1)}"
    )


if __name__ == "__main__":
    main()
