"""`python -m mtp_engine.rank`: another rank of an engine that several processes share; parallel/launch.py starts it."""

import os

from mtp_engine.parallel.launch import handed


def main() -> None:
    given = handed()  # first: from now on it ends with who started it
    import torch

    from mtp_engine.engine import Engine
    from mtp_engine.parallel.processes import Processes, join_store
    from mtp_engine.runtime.lead import Follower, leave
    from mtp_engine.team import WORK, by_kernels

    try:
        work = WORK.read(given)
        torch.set_num_threads(work.config.threads)
        store, device = join_store(work.port, work.shard.size), torch.device(work.config.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # where what names no index goes
        processes = Processes(store, work.shard, device, kernels=by_kernels(work.config))
        Engine.follow(work.files, work.config, Follower(processes))
    except BaseException as error:
        leave(error)
    os._exit(0)


if __name__ == "__main__":
    main()
