"""A plain PyTorch loop on a .beton file: fastload.Loader in the place of torch's DataLoader.

python examples/plain_loop.py photos.beton --model resnet18 --epochs 3
"""

import argparse

import timm
import torch
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

    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = fastload.open(args.data)
    # Every tenth image is held out. A subset is a view: nothing is copied.
    held = [i for i in range(len(data)) if i % 10 == 0]
    learned = [i for i in range(len(data)) if i % 10]
    train = fastload.Loader(
        data.subset(learned),
        args.batch_size,
        transforms=transforms.train(args.size),
        shuffle=True,
        device=device,
    )
    valid = fastload.Loader(
        data.subset(held), args.batch_size, transforms=transforms.eval(args.size), device=device
    )

    model = timm.create_model(args.model, num_classes=len(data.classes))
    model = model.to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)

    for epoch in range(args.epochs):
        model.train()
        for step, (images, labels) in enumerate(train):
            if step == args.steps:
                break  # leaving early is fine: no thread and no memory stays behind
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.inference_mode():
            hits = sum((model(images).argmax(1) == labels).sum() for images, labels in valid)
        print(f"epoch {epoch}: loss {loss.item():.4f}, accuracy {int(hits) / len(held):.4f}")


if __name__ == "__main__":
    main()
