"""mimo-nano in miniature: text, corpus, joint training, FP8 export, and the engine that reads it back."""

from collections.abc import Iterator

import pytest

from mtp_engine.models.export import fp8_settings
from mtp_engine.training.nano_run import NanoSettings
from mtp_engine.training.nano_text import Dialogue, NanoCorpus, build_corpus
from mtp_engine.training.optimiser import Rates

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 3,
    "hybrid_layer_pattern": [0, 1, 0], "moe_layer_freq": [0, 1, 1], "num_attention_heads": 4, "num_key_value_heads": 1,
    "head_dim": 24, "v_head_dim": 16, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 24,
    "swa_v_head_dim": 16, "sliding_window": 16, "n_routed_experts": 4, "max_position_embeddings": 512,
    "quantization_config": fp8_settings(16),
}  # fmt: skip
SETTINGS = NanoSettings(
    steps=300, length=64, rows=16, rates=Rates(muon=1e-2, adam=1e-2, warmup=10), log_every=50, checkpoint_s=1e9
)
NAMES = ["Ann", "Ben", "Tom", "Mia", "Sam", "Eva", "Leo", "Ida"]
ANIMALS = ["cat", "dog", "fox", "hen", "bee", "ant", "owl", "pig", "cow", "elk", "bat", "rat"]
PLACES = ["house", "garden", "forest", "field", "river"]


def dialogues() -> Iterator[Dialogue]:
    """A language to be learnt in a minute: prompts by chance, answers that follow from them."""
    for i, name in enumerate(NAMES):
        for j, animal in enumerate(ANIMALS):
            for k, place in enumerate(PLACES):
                other = ANIMALS[(j + 3) % len(ANIMALS)]
                yield (
                    f"Tell me about {name} and the {animal} in the {place}.",
                    f"{name} had a {animal}. The {animal} was in the {place}. One day the {animal} met a {other}. "
                    f"They went to the {PLACES[(k + 1) % 5]} and {NAMES[i - 1]} gave them some bread. They were happy.",
                )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> NanoCorpus:
    return build_corpus(dialogues(), tmp_path_factory.mktemp("corpus"), vocab=340)


