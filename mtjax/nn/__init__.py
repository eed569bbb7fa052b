"""Layers that know nothing of tasks' meaning: attention, row mixing, tokens, stacks of networks, gated experts."""

from mtjax.nn.attention import (
    FeedForward,
    MultiHeadAttention,
    TransformerLayer,
    attend,
    in_row_chunks,
    multitask_mask,
    readable_tokens,
)
from mtjax.nn.expert_use import ExpertUse, ablation_utility, linear_cka
from mtjax.nn.experts import ExpertLayout, GatedExperts, GatedOutput, masked_softmax
from mtjax.nn.row_mixing import RowMixing, TokenMixer, context_mask
from mtjax.nn.stacked import StackedDense, StackedLayerNorm, StackedMLP, TaskHeads
from mtjax.nn.tokenizer import FeatureTokenizer

__all__ = [
    "ExpertLayout",
    "ExpertUse",
    "FeatureTokenizer",
    "FeedForward",
    "GatedExperts",
    "GatedOutput",
    "MultiHeadAttention",
    "RowMixing",
    "StackedDense",
    "StackedLayerNorm",
    "StackedMLP",
    "TaskHeads",
    "TokenMixer",
    "TransformerLayer",
    "ablation_utility",
    "attend",
    "context_mask",
    "in_row_chunks",
    "linear_cka",
    "masked_softmax",
    "multitask_mask",
    "readable_tokens",
]
