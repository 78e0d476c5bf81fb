"""Frozen settings: what a model is, how the engine runs it, how a request is decoded. Read once at the top."""

from mtp_engine.config.engine import DEFAULT_MODEL, DRAFT_VOCAB, DType, EngineConfig, Experts
from mtp_engine.config.model import AttentionConfig, LayerConfig, ModelConfig, MoEConfig, MTPConfig, RopeConfig
from mtp_engine.config.sampling import SamplingParams, Structure
from mtp_engine.config.shape import AUTO_NODES, MAX_TREE_NODES, TreeShape

__all__ = [
    "AUTO_NODES",
    "DEFAULT_MODEL",
    "DRAFT_VOCAB",
    "MAX_TREE_NODES",
    "AttentionConfig",
    "DType",
    "EngineConfig",
    "Experts",
    "LayerConfig",
    "MTPConfig",
    "MoEConfig",
    "ModelConfig",
    "RopeConfig",
    "SamplingParams",
    "Structure",
    "TreeShape",
]
