"""A rank of tests/test_exchange.py, a process of its own: talks to others over memory that the processes share."""

import sys
from pathlib import Path

import torch
from torch import Tensor

if not torch.cuda.is_available():
    import os

    os.environ["TRITON_INTERPRET"] = "1"

import interpreter

from mtp_engine.kernels import exchange
from mtp_engine.kernels.exchange import Boxes


def boxes_of(rank: int, size: int, folder: Path, patience: int) -> Boxes:
    """Each rank's memory is a file; all see it at addresses of their own."""
    count = exchange.bytes_needed(size) // 4
    parts = [
        torch.from_file(str(folder / f"{each}"), shared=True, size=count, dtype=torch.int32) for each in range(size)
    ]
    stop = torch.zeros(1, dtype=torch.int32)
    boxes = Boxes.over(rank, [part.data_ptr() for part in parts], stop, torch.device("cpu"), patience)
    KEPT.extend(parts)
    return boxes


KEPT: list[Tensor] = []


def main() -> None:
    rank, size, folder, kind = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    interpreter.repair()
    torch.set_num_threads(1)
    boxes = boxes_of(rank, size, folder, 3000 if kind == "alone" else 1 << 29)
    given = torch.load(folder / "given.pt")
    found = []
    for call in given:
        x = call["x"][rank]
        if call["kind"] == "gather":
            found.append(exchange.gather(x, boxes, join=call["join"]))
        else:
            found.append(exchange.reduce(x, boxes, call["dtype"], call["residual"], few=call["few"]))
        if kind == "alone":
            found.append(boxes.stop.clone())
    torch.save(found, folder / f"found{rank}.pt")


if __name__ == "__main__":
    main()
