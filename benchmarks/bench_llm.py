"""Time and memory of a step of fine-tuning a language model with adapters on K data sets, on one thread.

    python benchmarks/bench_llm.py [--repeats 9] [--width 192] [--layers 4] [--length 128] [--tasks 4] [--batch 4]

A step is all forward and backward passes of one micro-batch per data set. Shared parameters are the adapters. Every time is
relative to plain accumulation, one ``loss.backward()`` for each data set, in the same run. Memory is the peak of tensors of a
step, without the model.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from record import FOLDER, write
from timing import summaries, times_in_turns

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from any directory

from balance import Balancer
from balance.profiling import peak_memory
from experiments.problems.llm import ModelConfig, losses, micro_batches, pretraining
from experiments.problems.llm.model import LanguageModel

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

PLAIN = "plain, one pass per data set"


class Setup(NamedTuple):
    """A model with fresh adapters, and a batch of all data sets."""

    model: LanguageModel
    tasks: tuple[str, ...]
    batch: tuple[Tensor, ...]

    def losses(self, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Return the losses of the data sets that are in a batch."""
        return losses(self.model(batch[0]), batch, self.tasks)


def setup(options: argparse.Namespace, *, checkpointing: bool) -> Setup:
    """Return a model with random weights and adapters on random tokens, half of which are answers."""
    torch.manual_seed(0)
    tasks = tuple(f"task{k}" for k in range(options.tasks))
    shape = pretraining.Shape(options.width, options.layers, 4, 0)
    model = LanguageModel(pretraining.fresh(shape), ModelConfig(gradient_checkpointing=checkpointing), tasks)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    tokens = torch.randint(256, (options.batch, options.tasks, options.length))
    answers = torch.arange(options.length).expand_as(tokens) >= options.length // 2
    return Setup(model.train(), tasks, (tokens, answers, answers.sum((0, 2)).double()))


def variants(of: Setup) -> dict[str, Callable[[], object]]:
    """Return steps by name."""

    def plain() -> None:
        for part in micro_batches(of.batch):
            sum(of.losses(part).values()).backward()

    def plain_joint() -> None:
        sum(of.losses(of.batch).values()).backward()

    def collected(loss: str, gradient: str | None) -> Callable[[], object]:
        balancer = Balancer(of.tasks, loss=loss, gradient=gradient)

        def step() -> None:
            with balancer.collect():
                for part in micro_batches(of.batch):
                    balancer.backward(of.losses(part), shared=of.model.parameters())

        return step

    def joint(gradient: str, **choices: Any) -> Callable[[], object]:
        balancer = Balancer(of.tasks, gradient=gradient, **choices)
        return lambda: balancer.backward(of.losses(of.batch), shared=of.model.parameters())

    return {
        PLAIN: plain,
        "plain, one joint pass": plain_joint,
        "uw, collect()": collected("uw", None),
        "nashmtl, collect()": collected("ls", "nashmtl"),
        "go4align + pcgrad, collect()": collected("go4align", "pcgrad"),
        "nashmtl, joint": joint("nashmtl"),
        "nashmtl, joint, memory=gramian": joint("nashmtl", memory="gramian"),
    }


def measure(options: argparse.Namespace, *, checkpointing: bool) -> tuple[str, dict[str, dict[str, Any]]]:
    """Measure all steps of a model, and return a title and rows by step."""
    of = setup(options, checkpointing=checkpointing)
    steps = variants(of)
    peaks = {}
    for name, step in steps.items():
        step()  # warms up
        of.model.zero_grad()
        peaks[name] = peak_memory(step)
        of.model.zero_grad()
    rows = summaries(times_in_turns(steps, of.model.zero_grad, repeats=options.repeats, budget=float("inf")), PLAIN)
    for name, peak in peaks.items():
        rows[name]["mib"] = round(peak / 2**20, 2)
    adapters = sum(parameter.numel() for parameter in of.model.parameters() if parameter.requires_grad)
    frozen = sum(parameter.numel() for parameter in of.model.parameters()) - adapters
    title = f"K={options.tasks} adapters={adapters} frozen={frozen} batch={options.batch} length={options.length}"
    return f"{title} checkpointing={checkpointing}", rows


def main() -> None:
    """Measure without and with gradient checkpointing, print the tables and write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name, default in (("repeats", 9), ("width", 192), ("layers", 4), ("length", 128), ("tasks", 4), ("batch", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", type=Path, default=FOLDER / "results", help="folder of the JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for checkpointing in (False, True):
        title, rows = measure(options, checkpointing=checkpointing)
        results[title] = rows
        print(f"\n{title}")
        for name, row in rows.items():
            times = f"{row['ms']:9.1f} ms {row['ratio']:6.2f} x"
            print(f"  {name:32s} {times} {row['mib']:9.1f} MiB   (quartiles {row['spread_ms']:.1f} ms apart)")
    write(results, "llm", options.output)


if __name__ == "__main__":
    main()
