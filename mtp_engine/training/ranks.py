"""The ranks of a training run that share the main model. Each does what the others do, with the same weights and another part
of every step's rows: nobody leads."""

import atexit
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from mtp_engine.config import EngineConfig, TreeShape
from mtp_engine.errors import EngineError
from mtp_engine.hub.hub import ModelFiles
from mtp_engine.parallel.codec import Codec
from mtp_engine.parallel.launch import Children
from mtp_engine.parallel.shard import Shard
from mtp_engine.runtime.lead import Beside, Team
from mtp_engine.runtime.ranks import Alone, Ranks
from mtp_engine.team import meet
from mtp_engine.training.dialogues import DialogueSettings
from mtp_engine.training.job import Job
from mtp_engine.training.objective import Objective
from mtp_engine.training.optimiser import Rates
from mtp_engine.training.processes import Process
from mtp_engine.training.trainer import TrainSettings

if TYPE_CHECKING:
    from mtp_engine.parallel.processes import Processes

_REMEDY = "run the same command again, which goes on from the last checkpoint"


@final
@dataclass(frozen=True)
class RankJob:
    """What a process that we start is to do. port: of the store where the ranks meet. config: the main engine's, settled."""

    shard: Shard
    port: int
    config: EngineConfig
    job: Job


RANK_JOB = Codec(RankJob, Shard, EngineConfig, TreeShape, Job, DialogueSettings, TrainSettings, Objective, Rates)


@final
class Alike(Beside):
    """One rank's Team, of an engine that every rank asks for the same things in the same order."""

    def __init__(self, processes: "Processes", children: Children | None = None) -> None:
        super().__init__(processes, children)
        atexit.register(self.close)  # what the interpreter's end finds of process groups crashes it

    def ranks(self, **changes: Any) -> Ranks:
        return Alone()

    def close(self) -> None:
        """End the others: what they do is of no use without this one. Closing twice does no harm."""
        atexit.unregister(self.close)
        if self._children:
            self._children.close(wait=False)
        self._processes.close()


def bring_together(job: Job, config: EngineConfig, files: ModelFiles) -> tuple[Alike, EngineConfig]:
    """The ranks that share the main model, and this one's configuration. config: settled. Raises EngineError as form_team."""
    if "TORCHELASTIC_RUN_ID" not in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise EngineError("--tensor-parallel starts its own processes, or torchrun does: unset WORLD_SIZE")

    def work(shard: Shard, port: int, own: EngineConfig) -> bytes:
        return RANK_JOB.write(RankJob(shard, port, own, job))

    processes, children, config = meet(config, files, "mtp_engine.training.rank", work, _REMEDY)
    return Alike(processes, children), config


def rank_of(team: Team) -> Process:
    """This process among those of `bring_together`."""
    assert isinstance(team, Alike)
    return Process(team.group.shard.rank, team.group.size, team.group, team.check)
