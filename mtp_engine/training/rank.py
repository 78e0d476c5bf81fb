"""`python -m mtp_engine.training.rank`: another rank of a training run that several processes share; parallel/launch.py
starts it."""

import threading

from mtp_engine.parallel.launch import handed


def main() -> None:
    given = handed()  # first: from now on it ends with who started it
    import torch

    from mtp_engine.parallel.processes import Processes, join_store
    from mtp_engine.runtime.lead import leave
    from mtp_engine.training.ranks import RANK_JOB, Alike
    from mtp_engine.training.run import Training

    try:
        work = RANK_JOB.read(given)
        device = torch.device(work.config.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # where what names no index goes
        processes = Processes(join_store(work.port, work.shard.size), work.shard, device)
        for _ in Training(work.job, form=lambda *_: (Alike(processes), work.config)).run():
            pass
    except BaseException as error:
        leave(error)
    threading.Event().wait()  # until the first rank has written what it has to write, and ends this one


if __name__ == "__main__":
    main()
