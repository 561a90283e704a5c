"""Train a small network of your own on any file of patterns: python train_autoencoder.py FILE FOLDER."""

import sys
from pathlib import Path

import torch
from torch import nn

import stem_dask as sd


def main(path: str, folder: str, epochs: int = 5) -> float:
    """Train a convolutional autoencoder; returns the last validation loss."""
    torch.manual_seed(0)
    patterns = sd.PatternDataset(path)  # normalize="log-zscore"
    parts = patterns.split(val=0.2)  # blocks of the scan, with a guard around them
    train = sd.loader(parts["train"], 32)  # an iterable of batches, shuffled anew in every epoch
    val = sd.loader(parts["val"], 32, shuffle=False)

    _, height, width = patterns.shape
    cells = 4 * 4 * 16
    encoder = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.GELU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.GELU(),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(cells, 8),
    )  # fmt: skip
    decoder = nn.Sequential(
        nn.Linear(8, cells), nn.Unflatten(1, (16, 4, 4)), nn.Upsample((height, width), mode="bilinear"),
        nn.Conv2d(16, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 1, 3, padding=1),
    )  # fmt: skip
    network = nn.Sequential(encoder, decoder)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)

    loss = torch.tensor(torch.nan)
    for epoch in range(epochs):
        for batch in train:  # {"patterns": (B, 1, H, W), "index": (B,)}
            x = batch["patterns"]
            optimizer.zero_grad()
            nn.functional.mse_loss(network(x), x).backward()
            optimizer.step()
        with torch.no_grad():
            errors = [(network(b["patterns"]) - b["patterns"]).square().mean() for b in val]
        loss = torch.stack(errors).mean()
        print(f"epoch {epoch}: validation loss {loss:.4f}")

    latent = torch.empty(len(patterns), 8)
    whole = sd.PatternDataset(path, normalize=parts["train"].normalization)
    with torch.no_grad():
        for batch in sd.loader(whole, 32, shuffle=False):
            latent[batch["index"]] = encoder(batch["patterns"])
    Path(folder).mkdir(parents=True, exist_ok=True)
    torch.save(
        {"network": network.state_dict(), "latent": whole.to_scan(latent)}, f"{folder}/example.pt"
    )
    return float(loss)


if __name__ == "__main__":
    main(*sys.argv[1:3])
