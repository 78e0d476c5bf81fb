"""What a model's matrices are multiplied with when it reads text: their second moments, for compensate.py."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mtp_engine.models.onnx.blocks import Precision
from mtp_engine.models.onnx.build import HEAD, Builder
from mtp_engine.models.onnx.session import open_session

_FINE = Precision(qkv=15, out=15, gate_up=15, down=15, head=15)
_ROWS = 512  # of a text that are read, in one call


def second_moments(builder: Builder, texts: Sequence[Sequence[int]], folder: Path, threads: int) -> dict[str, Tensor]:
    """Sums of x x^T over the tokens of `texts`, by the names of Builder.products, and HEAD. Writes to `folder`, which is the
    caller's to delete. Some thousand tokens are enough (bench/LOG.md)."""
    config = builder.config
    fine = replace(builder, precision=replace(_FINE, weights=builder.precision.weights), seconds={})
    fine.embedding(folder / "embedding.bin")
    fine.main(folder / "probe.onnx", (), probe=True)
    table = np.memmap(folder / "embedding.bin", np.float32, "r", shape=(config.vocab_size, config.hidden_size))
    session, names = open_session(folder / "probe.onnx", threads), fine.products()
    shapes = {each.name: each.shape for each in session.get_inputs()}
    sums: dict[str, Tensor] = {}
    for text in texts:
        tokens = np.array(text[:_ROWS])
        inputs = {"x": table[tokens][None], "positions": np.arange(len(tokens))[None]}
        for name, shape in shapes.items():  # nothing is cached: one row that nobody sees
            if name.startswith("mask"):
                seen = np.tri(len(tokens), dtype=bool)
                inputs[name] = np.where(np.pad(seen, ((0, 0), (1, 0))), 0, -np.inf).astype(np.float32)
            elif name.startswith("sizes"):
                inputs[name] = np.array([1, len(tokens)])
            elif name not in inputs:
                inputs[name] = np.zeros((1, *shape[1:]), np.float32)
        *found, hidden = session.run([*names, "hidden"], inputs)
        last = torch.from_numpy(hidden[0])
        normed = last * last.square().mean(-1, keepdim=True).add(config.norm_eps).rsqrt()
        for name, x in zip([*names, HEAD], [*(torch.from_numpy(each[0]) for each in found), normed], strict=True):
            product = x.T @ x
            sums[name] = sums[name] + product if name in sums else product
    return sums
