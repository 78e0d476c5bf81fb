"""MTP drafting: every tree a drafter proposes has the scores of a full recomputation, after any history of rejections."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import MTP, DenseMTP, attached, batch_of, new_request, show_prompt, write_llama, write_mtp

from mtp_engine.attention.rows import StepRows
from mtp_engine.attention.torch import TorchAttention
from mtp_engine.cache import NO_LIMIT, HybridKV, Pages
from mtp_engine.config import TreeShape
from mtp_engine.drafters import LazyMTPDrafter, MTPDrafter, TorchLevels, lazy
from mtp_engine.models import loader
from mtp_engine.models.decoder import Decoder
from mtp_engine.models.mtp import MTPModule
from mtp_engine.runtime.request import Request
from mtp_engine.tree import DraftTree, VerifyResult

SWITCHES = {
    "chained": {},
    "mimo": {"chained": False, "attention": {**MTP["attention"], "sink": True, "value_scale": 0.707, "rope_dim": 4}},
    "reused": {"reused": True},
    "post_norm": {"hidden": "post_norm", "concat": "hidden_first", "own_norm": False},
    "unwindowed": {"chained": False, "attention": {**MTP["attention"], "window": None}},
    "reused_unwindowed": {"reused": True, "attention": {**MTP["attention"], "window": None}},
}


class Models(dict[str, tuple[Decoder, Path, Path]]):
    def __repr__(self) -> str:
        return "the models"  # hypothesis prints its arguments


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> "Models":
    root = tmp_path_factory.mktemp("mtp")
    folder = write_llama(root / "main")
    main = loader.load_main(folder, torch.float32, torch.device("cpu"), lambda *_: None)
    return Models({name: (main, folder, write_mtp(root / name, **changes)) for name, changes in SWITCHES.items()})


def dense_hidden(main: Decoder, tokens: list[int]) -> torch.Tensor:
    """Pre-norm hidden states of all tokens, in one pass over a fresh cache."""
    n, device = len(tokens), torch.device("cpu")
    cache = HybridKV(
        [x.attention for x in main.config.layers],
        Pages(slots=1, tokens=n + 8, page_size=8, device=device),
        max_nodes=1,
        dtype=torch.float32,
    )
    cache.pages.reserve(0, n)
    rows = StepRows.prompt(0, 0, n, device)
    return main.forward(torch.tensor([tokens]), rows.positions, TorchAttention(cache, rows))[0]


def check_scores(
    tree: DraftTree, b: int, known: list[int], hidden: torch.Tensor, dense: DenseMTP, shape: TreeShape
) -> None:
    """Every node's children are the dense model's favourites on the node's path."""
    paths = {0: known}
    for node in range(1, int(tree.size[b])):
        paths[node] = [*paths[int(tree.parents[b, node])], int(tree.tokens[b, node])]
    for node, path in paths.items():
        children = [i for i in paths if i and int(tree.parents[b, i]) == node]
        if children:
            logits = dense.next_logits(torch.tensor(path), hidden)
            chosen = logits[[int(tree.tokens[b, i]) for i in children]]
            expected = logits.topk(len(children)).values
            torch.testing.assert_close(chosen.sort(descending=True).values, expected, rtol=1e-4, atol=1e-4)


def new_drafter(kind: str, module: MTPModule, text: str, slots: int) -> MTPDrafter | LazyMTPDrafter:
    shape = TreeShape.parse(text)
    if kind == "lockstep":
        return MTPDrafter(module, shape, slots=slots, beam=4)
    return LazyMTPDrafter(module, shape, lambda module: TorchLevels(module, TorchAttention), slots=slots, beam=4)


def states(drafter: MTPDrafter | LazyMTPDrafter) -> list[torch.Tensor]:
    if isinstance(drafter, MTPDrafter):
        return [drafter._recent, drafter._hidden, drafter._carry[0], drafter._carry[-1]]
    return [drafter._past.states, *drafter._past.outputs]


def move(drafter: MTPDrafter | LazyMTPDrafter, request: Request, slot: int, lean: bool) -> None:
    """To another slot, through a saved state; of the old one nothing is left."""
    old, tokens, cache = request.slot, request.length, drafter.cache
    assert cache
    state = drafter.save(old, tokens, lean=lean)
    rows = cache.save(old, 0, tokens, drafter.reread)
    for group in cache.groups:
        everywhere = group.rows(torch.tensor([old]), torch.arange(200)[None])[0]
        group.k[:, everywhere] = group.v[:, everywhere] = 1e3
    for table in states(drafter):
        table[old] = 1e3
    drafter.release(old)
    if not lean:
        cache.load(slot, 0, tokens, rows, drafter.reread)
    drafter.load(slot, request.prompt + request.output, state, 0)
    request.slot = slot


@pytest.mark.parametrize("kind", ["lockstep", "lazy"])
@pytest.mark.parametrize("name", SWITCHES)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_drafts_equal_full_recomputation(
    models: "Models", name: str, kind: str, monkeypatch: pytest.MonkeyPatch, data: st.DataObject
) -> None:
    monkeypatch.setattr(lazy, "_PENDING", 9)
    monkeypatch.setattr(lazy, "_PIECE", 5)
    main, folder, mtp_folder = models[name]
    shape = data.draw(st.sampled_from(["chain:3", "2x2x1", "3x1x2", "tree:6", "1x3"]))
    module = loader.load_mtp(mtp_folder, main, 0, lambda *_: None)
    drafter = attached(new_drafter(kind, module, shape, 3), behind=3 * 4)
    shape = drafter.shape
    dense = DenseMTP.load(folder, mtp_folder)
    texts = data.draw(st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=60), min_size=1, max_size=2))
    slots = data.draw(st.permutations([0, 1, 2]))
    requests = [new_request(slot, text) for slot, text in zip(slots, texts, strict=False)]
    for r in requests:
        hidden = dense_hidden(main, r.prompt[:-1]) if len(r.prompt) > 1 else torch.empty(0, 0)
        show_prompt(drafter, r.slot, r.prompt, hidden, data.draw(st.sampled_from([1, 2, 3, 7, 64])))
    came_whole = set[Request]()
    for _ in range(data.draw(st.integers(1, 6))):
        batch = batch_of(requests)
        tree = drafter.draft(batch)
        kept = [data.draw(st.integers(0, drafter.depth)) for _ in requests]  # drafts accepted this time
        path = torch.arange(tree.max_depth + 1).repeat(len(requests), 1)  # as if the tree were a chain
        tokens = torch.zeros_like(path)
        hiddens = torch.zeros(*path.shape, 32)
        for b, r in enumerate(requests):
            known = r.prompt + r.output
            all_hidden = dense_hidden(main, known)
            if len(known) > 1:
                check_scores(tree, b, known, all_hidden[:-1], dense, shape)
            else:
                assert int(tree.size[b]) == 1, "nothing can be drafted before there is a hidden state"
            new = data.draw(st.lists(st.integers(1, 60), min_size=kept[b] + 1, max_size=kept[b] + 1))
            hiddens[b, : len(new)] = dense_hidden(main, known + new[:-1])[len(known) - 1 :]
            tokens[b, : len(new)] = torch.tensor(new)
            r.output += new
        counts = torch.tensor(kept) + 1
        drafter.observe(batch, VerifyResult(path, tokens, counts), hiddens)
        if data.draw(st.booleans()):
            lost = batch_of(requests)
            for _ in range(data.draw(st.integers(0, 2))):  # steps in flight, of which nothing will count
                drafter.draft(lost)
                drafter.observe(lost, VerifyResult(path, tokens, counts), torch.randn_like(hiddens))
                lost = replace(lost, lengths=lost.lengths + counts, bound=lost.bound + 4)
            for b, r in enumerate(requests):
                del r.output[len(r.output) - data.draw(st.integers(0, kept[b])) :]  # an answer cut in mid-step
                # the states of a whole history are there unless the request has come to its slot with fewer
                lean = drafter.history < NO_LIMIT and r not in came_whole and data.draw(st.booleans())
                came_whole |= set() if lean else {r}
                move(drafter, r, (set(slots) - {each.slot for each in requests}).pop(), lean)


def test_stale_rows_would_be_caught(models: "Models") -> None:
    """The reference is sharp enough: change one token two back, and layer 2's logits move."""
    _, folder, mtp_folder = models["mimo"]
    dense = DenseMTP.load(folder, mtp_folder)
    hidden = torch.randn(10, 32)
    a, b = (torch.tensor([*range(1, 11), x, 5, 6]) for x in (7, 8))
    assert (dense.next_logits(a, hidden) - dense.next_logits(b, hidden)).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["lockstep", "lazy"])
def test_truncated_prefill_is_exact(models: "Models", kind: str) -> None:
    """Only the last windows of a long prompt are given to the MTP layers; the draft is that of the whole prompt."""
    for name in ("chained", "mimo"):
        main, folder, mtp_folder = models[name]
        drafter = attached(
            new_drafter(kind, loader.load_mtp(mtp_folder, main, 0, lambda *_: None), "2x1x1", 1), slots=1
        )
        prompt = torch.randint(1, 60, (120,), generator=torch.Generator().manual_seed(3)).tolist()
        hidden = dense_hidden(main, prompt[:-1])
        for chunk in (1, 7, 50, 500):
            drafter.release(0)
            show_prompt(drafter, 0, prompt, hidden, chunk)
            assert int(drafter._first[0]) > 60, "the prompt's beginning was left out"
            tree = drafter.draft(batch_of([new_request(0, prompt)]))
            check_scores(tree, 0, prompt, hidden, DenseMTP.load(folder, mtp_folder), drafter.shape)


@pytest.mark.parametrize(
    ("depth", "text", "nodes"), [(3, "tree:31", 32), (3, "tree:63", 64), (1, "tree:9", 10), (1, "tree:63", 17)]
)
def test_a_tree_is_as_large_as_it_says(models: "Models", tmp_path: Path, depth: int, text: str, nodes: int) -> None:
    main, _, _ = models["mimo"]
    module = loader.load_mtp(write_mtp(tmp_path / "mtp", depth=depth), main, 0, lambda *_: None)
    drafter = attached(MTPDrafter(module, TreeShape.parse(text), slots=1), slots=1)
    prompt = [5, 9, 14, 3, 44]
    show_prompt(drafter, 0, prompt, dense_hidden(main, prompt[:-1]))
    tree = drafter.draft(batch_of([new_request(0, prompt)]))
    assert tree.nodes == int(tree.size[0]) == drafter.max_nodes == nodes


def test_best_n_tree_holds_the_best_nodes(models: "Models") -> None:
    """tree:N against brute force over all paths of a small vocabulary."""
    main, folder, mtp_folder = models["mimo"]
    drafter = attached(
        MTPDrafter(
            loader.load_mtp(mtp_folder, main, 0, lambda *_: None),
            TreeShape.parse("tree:6"),
            slots=1,
        ),
        slots=1,
    )
    prompt = [5, 9, 14, 3, 44]
    hidden = dense_hidden(main, prompt[:-1])
    show_prompt(drafter, 0, prompt, hidden)
    tree = drafter.draft(batch_of([new_request(0, prompt)]))
    dense, scores = DenseMTP.load(folder, mtp_folder), {}
    frontier: dict[tuple[int, ...], float] = {(): 0.0}
    for _ in range(3):
        level = {}
        for path, score in frontier.items():
            log_p = dense.next_logits(torch.tensor(prompt + list(path)), hidden).log_softmax(-1)
            level.update({(*path, t): score + float(log_p[t]) for t in range(61)})
        scores |= level
        frontier = dict(itertools.islice(sorted(level.items(), key=lambda item: -item[1]), 20))
    best = {path for path, _ in sorted(scores.items(), key=lambda item: -item[1])[:6]}
    paths: dict[int, tuple[int, ...]] = {0: ()}
    for node in range(1, 7):
        paths[node] = (*paths[int(tree.parents[0, node])], int(tree.tokens[0, node]))
    assert set(paths.values()) - {()} == best
