"""The loader under Lightning: pass it as any other data loader.

    python examples/lightning_module.py photos.beton --model resnet18 --epochs 3

With several processes give each its share: Loader(..., rank=trainer.global_rank, world_size=trainer.world_size) in
``train_dataloader``, and ``Trainer(use_distributed_sampler=False)``.
"""

import argparse

import lightning
import timm
import torch
from torch.nn import functional as F

import fastload
from fastload import transforms


class Classifier(lightning.LightningModule):
    """One timm model and the file it learns from."""

    def __init__(self, data: fastload.Dataset, model: str, size: int, batch_size: int) -> None:
        super().__init__()
        self.data, self.size, self.batch_size = data, size, batch_size
        self.model = timm.create_model(model, num_classes=len(data.classes))

    def train_dataloader(self) -> fastload.Loader:
        return fastload.Loader(
            self.data,
            self.batch_size,
            transforms=transforms.train(self.size),
            shuffle=True,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
        )

    def training_step(self, batch: fastload.Batch, step: int) -> torch.Tensor:
        loss = F.cross_entropy(self.model(batch.image), batch.label)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.05)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--steps", type=int, default=-1, help="stop after so many batches")
    args = parser.parse_args()

    module = Classifier(fastload.open(args.data), args.model, args.size, args.batch_size)
    trainer = lightning.Trainer(
        max_epochs=args.epochs,
        max_steps=args.steps,
        logger=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module)
    print(f"steps {trainer.global_step}, loss {trainer.callback_metrics['loss']:.4f}")


if __name__ == "__main__":
    main()
