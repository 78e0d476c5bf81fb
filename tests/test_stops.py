"""Stop strings, wherever they lie in the steps: nothing after one is emitted, shown or kept."""

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decode_loop import Models, Scripted, decode, make_loop, prompts

from mtp_engine.config import SamplingParams
from mtp_engine.drafters import RootDrafter
from mtp_engine.errors import EngineError
from mtp_engine.sampling.stops import Ends, StopStrings, VisibleText

LETTERS = "ab"


class Letters:
    """Token t is the t-th of these pieces; the last ones are unfinished characters that come out with the next."""

    PIECES = ("", "a", "b", "ab", "ba", "aab", "a", "b")

    def __init__(self) -> None:
        self.held = ""

    def push(self, ids: Iterable[int]) -> str:
        out = ""
        for token in ids:
            piece = self.PIECES[token % 8]
            out, self.held = (out + self.held + piece, "") if token % 8 < 6 else (out, self.held + piece)
        return out

    def flush(self) -> str:
        out, self.held = self.held, ""
        return out


def text_of(tokens: Iterable[int]) -> str:
    decoder = Letters()
    return decoder.push(tokens) + decoder.flush()


@settings(max_examples=400, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 7), min_size=1, max_size=25),
    stops=st.lists(st.text(LETTERS, min_size=1, max_size=5), min_size=1, max_size=3),
    early=st.integers(0, 5),
    data=st.data(),
)
def test_a_stop_is_found_however_the_tokens_come(
    tokens: list[int], stops: list[str], early: int, data: st.DataObject
) -> None:
    """Against a search of every prefix of the whole text; steps of any size change nothing."""
    strings = StopStrings(stops, Letters(), not_before=early)
    ends, visible = Ends(len(tokens), frozenset(), strings), VisibleText(Letters(), strings)
    left, kept, shown, reason = list(tokens), [], "", None
    while left and reason is None:
        step = left[: data.draw(st.integers(1, 6))]
        cut, reason = ends.cut(step)
        kept += step[:cut]
        left = left[len(step) :]
        new = visible.push(step[:cut], ended=reason is not None)
        shown += new
    whole = Letters()
    grown, start, expected = "", 0, None
    for index, token in enumerate(tokens):
        grown += whole.push([token])
        if index < early:
            start = len(grown)
            continue
        places = [at for stop in stops if (at := grown.find(stop, start)) >= 0]
        if places:
            expected = (index + 1, grown[: min(places)])
            break
    if expected is None:
        assert (kept, reason, shown) == (tokens, "length", text_of(tokens))
    else:
        assert (len(kept), shown, reason) == (*expected, "stop")
        assert kept == tokens[: expected[0]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("stops"))


@pytest.mark.parametrize("stop", ["abab", "bb", "aabba"])
def test_the_loop_stops_where_plain_decoding_stops(models: Models, stop: str) -> None:
    """Steps of six accepted tokens; a stop may begin in one and end in the next."""
    free = SamplingParams(max_tokens=100, temperature=1.0, seed=79)
    [whole] = decode(make_loop(models.main, RootDrafter()), prompts()[2:3], [free])
    wanted = SamplingParams(max_tokens=100, temperature=1.0, seed=79, stop=(stop,))
    texts = {79: whole.prompt + whole.output}
    for drafter in (RootDrafter(), Scripted("right", texts), Scripted("random", texts)):
        [request] = decode(make_loop(models.main, drafter, text=Letters), prompts()[2:3], [wanted])
        assert request.finish_reason == "stop"
        assert request.output == whole.output[: len(request.output)]
        assert request.text == text_of(whole.output).split(stop)[0]
        assert stop in Letters().push(request.output)
        assert stop not in Letters().push(request.output[:-1])


def test_stop_strings_need_a_decoder(models: Models) -> None:
    with pytest.raises(EngineError, match="stop strings"):
        make_loop(models.main, RootDrafter()).add([1], SamplingParams(stop=("x",)))
