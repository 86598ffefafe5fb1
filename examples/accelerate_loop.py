"""The loader under Hugging Face Accelerate: each process takes its share by rank, so the loader is not "prepared".

accelerate launch examples/accelerate_loop.py photos.beton --model resnet18 --epochs 3
"""

import argparse

import timm
import torch
from accelerate import Accelerator
from torch.nn import functional as F

import fastload
from fastload import transforms


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--steps", type=int, help="stop each epoch after so many batches")
    args = parser.parse_args()

    accelerator = Accelerator()
    data = fastload.open(args.data)
    train = fastload.Loader(
        data,
        args.batch_size,
        transforms=transforms.train(args.size),
        shuffle=True,
        drop_last=True,  # all processes then make equally many steps
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        device=accelerator.device,
    )
    model = timm.create_model(args.model, num_classes=len(data.classes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    model, optimizer = accelerator.prepare(model, optimizer)

    model.train()
    for epoch in range(args.epochs):
        for step, (images, labels) in enumerate(train):
            if step == args.steps:
                break
            with accelerator.autocast():
                loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
        accelerator.print(f"epoch {epoch}: loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
