"""Trains one of the tutorial's MNIST flows (fastflow.models.mnist_flow) for the other examples, and saves it.

From a clean clone, after `make setup` (10 minutes on 2 cores; 300 steps, 3 minutes, give a rough model):

    .venv/bin/python docs/examples/train_mnist.py multiscale --out multiscale.pt
"""

import argparse

import torch
from tqdm import tqdm

import fastflow
from fastflow import data
from fastflow.evaluate import evaluate
from fastflow.models import mnist_flow


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", choices=("simple", "vardeq", "multiscale"))
    parser.add_argument("--out", required=True)
    parser.add_argument("--data", default="mnist", help="mnist, or a .npz file of 28x28 images")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    source = data.load(options.data, options.data_dir, 28)
    batches = data.Batches(source, options.batch_size, seed=0)
    model = mnist_flow(options.variant, reversible=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    for step in (bar := tqdm(range(options.steps), desc=options.variant)):
        loss = model(batches[step][0], seed=step).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"{loss.item():.3f} bits/dim")
    fastflow.save(options.out, model.eval())
    print(f"{options.out}: {evaluate(model, source.test[:500]).mean():.3f} bits/dim on 500 test images")


if __name__ == "__main__":
    main()
