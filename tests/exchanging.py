"""A rank of tests/test_exchange.py, a process of its own: it runs the kernels over memory that all of them share."""

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import interpreter
import torch

from mtp_engine.kernels import exchange

_SOON = 600  # looks after which it gives others up that do not come


def main() -> None:
    """Each rank's memory is a file, which every process sees at addresses of its own."""
    rank, size, folder, kind = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    interpreter.repair()
    torch.set_num_threads(1)
    count = exchange.bytes_needed(size) // 4
    parts = [
        torch.from_file(str(folder / f"{each}"), shared=True, size=count, dtype=torch.int32) for each in range(size)
    ]
    stop, addresses = torch.zeros(1, dtype=torch.int32), [part.data_ptr() for part in parts]
    patience = {"patience": _SOON} if kind == "alone" else {}
    boxes = exchange.Boxes.over(rank, addresses, stop, torch.device("cpu"), **patience)
    found = []
    for call in torch.load(folder / "given.pt"):
        x = call["x"][rank]
        if call["sum"]:
            found.append(
                exchange.reduce(x, boxes, call["dtype"], call["residual"], call.get("weights"), few=call["few"])
            )
        else:
            found.append(exchange.gather(x, boxes, join=call["join"]))
    torch.save([*found, stop], folder / f"found{rank}.pt")


if __name__ == "__main__":
    main()
