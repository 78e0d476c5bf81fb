"""Our loop inside transformers: `model.generate(..., custom_generate=transformers_generate(...))`."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mtp_engine.config import EngineConfig, SamplingParams
from mtp_engine.engine import Engine
from mtp_engine.errors import EngineError

_OURS = {  # transformers' own processors, whose settings we read off the generation config
    "RepetitionPenaltyLogitsProcessor", "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper",
    "MinPLogitsWarper", "MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor", "LogitNormalization",
    "InfNanRemoveLogitsProcessor",
}  # fmt: skip
_SEEN_TO = {"MaxLengthCriteria", "EosTokenCriteria"}  # the engine stops there by itself


def transformers_generate(
    engine: Engine | str | None = None, config: EngineConfig | None = None, *, streamer: Any = None
) -> Callable[..., Tensor]:
    """What transformers' `generate` takes as `custom_generate`: the engine decodes, transformers prepares.

    engine: one that is loaded, or what to load once it is needed: a name or folder, None being the model's own. It is kept
    for later calls, so keep what this returns. streamer: told of new tokens as they come (transformers hands its own to
    nobody). Sampling draws its seed from torch's generator, so that torch.manual_seed repeats a text.

    Raises EngineError for what the engine cannot do: beams, scores, and logits processors of one's own.
    """
    loaded: list[Engine] = [engine] if isinstance(engine, Engine) else []

    def generate(
        model: Any, input_ids: Tensor, logits_processor: Any = None, stopping_criteria: Any = None,
        generation_config: Any = None, **model_inputs: Any,
    ) -> Tensor:  # fmt: skip
        """input_ids: [B, N], padded in front. Returns [B, N + new], padded behind."""
        if not loaded:
            name = engine if isinstance(engine, str) else str(model.config._name_or_path)
            loaded.append(Engine.load(name, config))
        params = _params(generation_config, logits_processor or (), input_ids.shape[1])
        criteria = [each for each in stopping_criteria or () if type(each).__name__ not in _SEEN_TO]
        masks = model_inputs.get("attention_mask")  # a name of its own would have transformers give it twice
        masks = torch.ones_like(input_ids) if masks is None else masks
        rows = [
            _answer(loaded[0], row, row[mask.bool()], params, criteria, streamer)
            for row, mask in zip(input_ids, masks, strict=True)
        ]
        if streamer is not None:
            streamer.end()
        pad = _pad(generation_config)
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)

    return generate


def _answer(
    engine: Engine, row: Tensor, prompt: Tensor, params: SamplingParams, criteria: Iterable[Any], streamer: Any
) -> Tensor:
    """A row with its answer behind it. Other stopping criteria than the engine's own are asked after every token."""
    said: list[int] = []
    with_one = engine.stream([prompt.tolist()], params)
    try:
        for chunk in with_one:
            for token in chunk.token_ids:
                said.append(token)
                if streamer is not None:
                    streamer.put(torch.tensor([token]))
                ids = torch.cat([row, row.new_tensor(said)])[None]
                if any(bool(torch.as_tensor(each(ids, None)).all()) for each in criteria):
                    return ids[0]
            if chunk.finished and chunk.finished.error:
                raise EngineError(chunk.finished.error)
    finally:
        with_one.close()  # type: ignore[attr-defined]
    return torch.cat([row, row.new_tensor(said)])


def _params(config: Any, processors: Iterable[Any], length: int) -> SamplingParams:
    """The same in our words. length: of the padded prompts."""
    for setting, plain in (("num_beams", 1), ("num_return_sequences", 1), ("return_dict_in_generate", False)):
        if (getattr(config, setting, None) or plain) != plain:
            raise EngineError(f"{setting} is {getattr(config, setting)}: the engine decodes one text per prompt")
    if foreign := [type(each).__name__ for each in processors if type(each).__name__ not in _OURS]:
        raise EngineError(f"{foreign[0]} sees logits, which stay in the engine: use mtp_engine's own parameters")
    ends = config.eos_token_id
    ends = [] if ends is None else [int(end) for end in torch.as_tensor(ends).flatten()]
    samples = bool(config.do_sample)
    most = int(config.max_length) - length
    least = max(config.min_new_tokens or 0, (config.min_length or 0) - length)
    return SamplingParams(
        max_tokens=most,
        temperature=(1.0 if config.temperature is None else config.temperature) if samples else 0.0,
        top_k=(config.top_k or 0) if samples else 0,
        top_p=(config.top_p or 1.0) if samples else 1.0,
        min_p=(config.min_p or 0.0) if samples else 0.0,
        repetition_penalty=config.repetition_penalty or 1.0,
        min_tokens=min(most, max(0, least)),
        seed=int(torch.randint(2**62, ())),
        stop_token_ids=tuple(ends),
        ignore_eos=True,  # transformers' list of them counts
    )


def _pad(config: Any) -> int:
    found = config.pad_token_id if config.pad_token_id is not None else config.eos_token_id
    return int(torch.as_tensor(0 if found is None else found).flatten()[0])
