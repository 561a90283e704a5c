"""Train the autoencoder, with a checkpoint after every epoch."""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stem_dask.core.errors import ConfigError
from stem_dask.training import import_torch
from stem_dask.training.dataset import Normalization, PatternDataset
from stem_dask.training.loader import loader
from stem_dask.training.model import autoencoder, load, save

if TYPE_CHECKING:
    import torch

#: --precision -> type of autocast in torch
PRECISIONS = {"32": "float32", "bf16": "bfloat16", "16": "float16"}

#: share of the steps in which the learning rate rises
_WARM_UP = 0.05


@dataclass(frozen=True)
class FitOptions:
    """What decides about the weights besides the data: ``loss`` is mse, l1 or poisson; ``memory`` and ``threads`` as of `loader`."""

    epochs: int = 50
    batch: int = 128
    latent: int = 32
    lr: float = 1e-3
    loss: str = "mse"
    seed: int = 42
    device: str = "cpu"
    precision: str = "32"
    memory: str | int = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "lr"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise ConfigError(f"{name} is {value}; expected a number above 0")
        if self.precision == "16" and self.device == "cpu":
            raise ConfigError("precision is 16 on the CPU, where float16 is slow; use bf16 or 32, or device cuda")  # fmt: skip


def fit(
    train: PatternDataset,
    val: PatternDataset | None,
    options: FitOptions,
    path: str,
    about: Mapping[str, Any],
    progress: Callable[[dict[str, Any]], None] = lambda epoch: None,
    resume: bool = True,
) -> tuple["torch.nn.Module", list[dict[str, Any]]]:
    """Train, or go on at the last epoch of a checkpoint; returns the network and a history of ``{"epoch", "train", "val"}``.

    The checkpoint at ``path`` is replaced after every epoch, then ``progress`` gets the new entry of the history. ``resume`` goes
    on at a checkpoint with the same ``about``, plain values that identify the training. On a CPU, equal data, options and number
    of threads give equal weights, whether interrupted or not. Raises ConfigError when the loss is no longer finite, or an option
    does not fit the data, and StoreError when the checkpoint cannot be written.
    """
    torch = import_torch()
    saved = load_checkpoint(path) if resume else None
    if saved is not None and saved["about"] != about:
        saved = None
    memory = saved["loader"]["memory"] if saved else options.memory
    reading: dict[str, Any] = {"seed": options.seed, "memory": memory, "threads": options.threads}
    batches = loader(train, options.batch, **reading)
    judged = None if val is None else loader(val, options.batch, shuffle=False, **reading)
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay
        torch.manual_seed(options.seed)
        net = autoencoder(train.shape[1:], options.latent).to(options.device)
        optimizer = torch.optim.AdamW(net.parameters(), lr=options.lr)
        steps = options.epochs * len(batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / steps))
        scaler = torch.amp.GradScaler(options.device, enabled=options.precision == "16")
        parts = {"weights": net, "optimizer": optimizer, "schedule": schedule, "scaler": scaler, "loader": batches}  # fmt: skip
        history: list[dict[str, Any]] = []

        def checkpoint() -> None:
            state = {name: part.state_dict() for name, part in parts.items()}
            save({**state, "random": torch.get_rng_state(), "history": history, "about": about}, path)  # fmt: skip

        if saved is None:
            checkpoint()
        else:
            for name, part in parts.items():
                part.load_state_dict(saved[name])
            torch.set_rng_state(saved["random"])
            history = saved["history"]
        loss_of = pattern_losses(net, options, train.normalization)
        for epoch in range(len(history) + 1, options.epochs + 1):
            net.train()
            seen = []
            for batch in batches:
                losses = loss_of(batch["patterns"])[0]
                optimizer.zero_grad()
                scaler.scale(losses.mean()).backward()
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                scaler.step(optimizer)
                scaler.update()
                schedule.step()
                seen.append(losses.detach())
            found: dict[str, Any] = {"epoch": epoch, "train": float(torch.cat(seen).mean()), "val": None}  # fmt: skip
            if not math.isfinite(found["train"]):
                raise ConfigError(
                    f"the loss is {found['train']} in epoch {epoch}; use a lower lr than {options.lr:g}, or precision 32 (or do the patterns hold NaN?)"
                )
            net.eval()
            if judged is not None:
                with torch.no_grad():
                    seen = [loss_of(batch["patterns"])[0] for batch in judged]
                found["val"] = float(torch.cat(seen).mean())
            history.append(found)
            checkpoint()
            progress(found)
    return net.eval(), history


def load_checkpoint(path: str) -> dict[str, Any] | None:
    """The content of a checkpoint of this package; None if there is none."""
    parts = ("weights", "optimizer", "schedule", "scaler", "loader", "random", "history", "about")
    return load(path, "checkpoint", *parts) if os.path.exists(path) else None


def pattern_losses(
    net: "torch.nn.Module", options: FitOptions, normalization: Normalization
) -> Callable[[Any], tuple[Any, Any]]:
    """A function of (B, 1, H, W) patterns: the loss of each, (B,), and their reconstructions.

    ``mse`` and ``l1`` compare normalized values. ``poisson`` is half the deviance of the counts, 0 where they agree:
    ``rate - counts + counts log(counts / rate)``.
    """
    torch = import_torch()
    kind, place = getattr(torch, PRECISIONS[options.precision]), torch.device(options.device).type

    def losses(patterns: Any) -> tuple[Any, Any]:
        x = patterns.to(options.device, torch.float32, non_blocking=True)
        with torch.autocast(place, kind, enabled=kind != torch.float32):
            y = net(x)
        y = y.float()
        if options.loss == "poisson":
            n = _counts(x, normalization).clamp(min=0)
            # a rate is above 0; softplus keeps a gradient where the output is not
            rate = torch.nn.functional.softplus(_counts(y, normalization), beta=20) + 1e-6
            loss = rate - n + torch.xlogy(n, n) - n * rate.log()
        else:
            loss = (y - x).abs() if options.loss == "l1" else (y - x) ** 2
        return loss.mean((1, 2, 3)), y

    return losses


def _counts(values: Any, normalization: Normalization) -> Any:
    """Counts of normalized values."""
    if normalization.method == "log-zscore":
        values = values * normalization.std + normalization.mean
    if normalization.method.startswith("log"):
        return values.clamp(max=20).expm1()
    return values**2 if normalization.method == "sqrt" else values


def _rate(done: float) -> float:
    """Learning rate relative to the highest: a linear rise, then half a cosine."""
    return min(1.0, (done + 1e-3) / _WARM_UP) * (1 + math.cos(math.pi * done)) / 2
